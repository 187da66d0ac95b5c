"""`python -m bench.calls [--write]`: what a call of each loss launches and moves on a GPU, counted without one.

Each problem of `bench.gpu.problems` runs at its full size, forward and backward, with nothing computed: the driver of
`csrc/cuda` over a machine that counts (`tally.cpp`), Triton's kernels taken down with their grids, and torch's own
operators by its profiler, which sees those within ours too. What a call launches, how much it reads and writes, and
how many scores each kernel meets is committed, `bench/results/static-calls.json`; a test fails where one changes.
`--write` also compiles Triton's kernels for sm_90 and takes down what their main loops issue.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench import static
from bench.gpu import problems, rivals
from bench.gpu.problems import Problem
from bench.host import ROOT
from bench.text import markdown
from fused_nce import _extension
from fused_nce.backends import cuda, triton
from fused_nce.backends.triton import configs
from fused_nce.bench.formulas import FORMULAS
from fused_nce.core import upstream
from fused_nce.core.workspace import GPU_DEFAULT_MB

TABLE = ROOT / "bench/results/static-calls.json"
BACKENDS = ("cuda", "triton")
ARCHITECTURE = "sm_90"
# Operators with a kernel of their own on a GPU that launch none.
FREE = {"as_strided", "view", "empty", "empty_strided", "resize_", "set_", "_reshape_alias", "unfold", "alias"}
SHRINKS = {"sum", "amax", "max", "linalg_vector_norm", "all", "any"}  # write next to nothing
Call = dict[str, Any]  # of the JSON


class Kernel(NamedTuple):
    """Of all launches of one kernel in a call."""

    name: str
    launches: int
    bytes: int  # read and written, but for those of scores
    scores: int = 0
    flop: int = 0
    strip_bytes: int = 0  # of scores that leave the chip
    strip: int = 0  # of those that are alive together
    programs: int = 0  # of one launch of Triton's
    tiles: float = 0  # of one program
    walked_bytes: int = 0  # what the programs read of tiles that many others read too: from the L2
    code: dict[str, Any] | None = None  # of Triton's: what `bench.static` says of it


SUMS = ("launches", "bytes", "scores", "flop", "strip_bytes", "walked_bytes")  # over all launches; the rest is of one


def problems_counted() -> dict[str, tuple[Problem, torch.dtype]]:
    """By label: the benchmark's in bfloat16, and, for the cost, sweeps in other dtypes and some that no card runs."""
    sweep = [*problems.CROSSOVER, *problems.LARGER]
    for_cost = (*problems.BOTH_WAYS, *problems.PLAIN, *problems.SQUARES, *problems.ROWS_ALONE, *problems.HELD)
    found = {p.label: (p, torch.bfloat16) for p in (*problems.ALL, *for_cost)}
    found |= {f"{p.label}, float32": (p, torch.float32) for p in sweep}
    return found | {f"{p.label}, float16": (p, torch.float16) for p in problems.THIN}


# ---- torch's operators -------------------------------------------------------------------------------------------


@cache
def launches(name: str) -> bool:
    """Whether a kernel of a GPU stands behind torch's operator, rather than a view or other operators."""
    if name in FREE or not hasattr(torch.ops.aten, name):
        return False
    of = torch._C
    overloads = getattr(torch.ops.aten, name).overloads()
    full = [f"aten::{name}" if one == "default" else f"aten::{name}.{one}" for one in overloads]
    return name in ("copy_", "_local_scalar_dense") or any(
        of._dispatch_has_kernel(one) and of._dispatch_has_kernel_for_dispatch_key(one, "CUDA") for one in full
    )


def operators(run: Callable[[], Any]) -> tuple[Counter[str], int]:
    """How often a call dispatches each operator that launches a kernel, and the bytes of their tensors."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # it tells that it finds no GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiled:
        run()
    found: Counter[str] = Counter()
    moved = 0
    open_nodes = list(profiled.profiler.kineto_results.experimental_event_tree())
    while open_nodes:
        node = open_nodes.pop()
        name = node.name.removeprefix("aten::")
        if not node.name.startswith("aten::") or not launches(name):
            open_nodes += node.children
            continue
        inputs = getattr(node.extra_fields, "inputs", [])
        flat = [x for one in inputs for x in (one if isinstance(one, list) else [one])]
        tensors = [x for x in flat if hasattr(x, "sizes")]
        sizes = [math.prod(x.sizes) * x.dtype.itemsize for x in tensors]
        if all(sizes) or any(x.sizes and size for x, size in zip(tensors, sizes, strict=True)):  # else there is nothing
            found[name] += 1
            moved += sum(sizes) + (0 if name in SHRINKS else max(sizes, default=0))
    return found, moved


# ---- the backends ------------------------------------------------------------------------------------------------


@contextmanager
def counting_cuda() -> Iterator[list[Kernel]]:
    """The `cuda` backend takes CPU tensors, and counts; what it found is there at the end."""
    module, reason = _extension.status()
    if not hasattr(module, "cuda_tally"):
        raise RuntimeError(reason or "the kernels were built without the emulation of a GPU")
    found: list[Kernel] = []
    assert module is not None
    with (
        mock.patch.object(cuda, "why_not", lambda spec, q, k: cuda._unable(module, spec, q, k)),
        mock.patch.object(upstream, "_has_kernel", return_value=True),
    ):
        module.cuda_tally(True)
        try:
            yield found
        finally:
            for name, (count, scores, flop, moved, strip_bytes, strip) in module.cuda_tally(False).items():
                found.append(Kernel(name, count, moved, scores, flop, strip_bytes, strip))


class Launch(NamedTuple):
    """One of Triton's."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def counted(self, codes: dict[str, dict[str, Any]] | None) -> Kernel:
        """What it moves; of a pass over tiles, how many; with `codes`, which keeps them, what its code issues."""
        named = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.options
        name, programs = self.kernel.__name__, math.prod(self.grid)
        rows, stored = self.rows(named), "stored" in named
        # Of a strip: its rows, and as many of the other side where nothing is walked through.
        cut = {"x", "out", *([] if stored else ["y"])} if "start" in named else set()
        tensors = {key: x for key, x in named.items() if isinstance(x, Tensor) and key != "stored"}
        sizes = {key: x.numel() * x.element_size() for key, x in tensors.items()}
        moved = sum(size * rows // named["n_x"] if key in cut else size for key, size in sizes.items())
        if "walk" not in named:
            return Kernel(name, 1, moved, programs=programs)
        tiles: float = -(-min(named["walk"], named["n_y"]) // named["Y"])
        scores = rows * named["n_y"] * (self.grid[2] if len(self.grid) > 2 else 1)
        if named.get("MIRRORED"):  # of each block those from the diagonal on, in programs of any length
            scores -= named["X"] ** 2 * math.comb(self.grid[0], 2)
            tiles = scores / (named["X"] * named["Y"]) / programs
        key = f"{name} {named['x'].dtype} {self.options}"
        if codes is not None and key not in codes:
            codes[key] = self.code(named)
        kept = scores * named["stored"].element_size() if stored else 0
        walked = int(programs * tiles * self.tile_bytes(named))
        code = None if codes is None else codes[key]
        return Kernel(name, 1, moved, scores, 0, kept, kept, programs, tiles, walked, code)

    def rows(self, named: dict[str, Any]) -> int:
        """That a launch has; of a strip its own."""
        if "start" not in named:
            return int(named.get("n_x", 0))
        if "sums" in named:
            return int(named["sums"].shape[1])
        return int(min(named["n_x"] - named["start"], self.grid[0] * named["X"]))

    def tile_bytes(self, named: dict[str, Any]) -> int:
        """Read for one tile of scores: y, x too where no chunk holds D, and the slice of y that weights multiply."""
        x, y, d, chunk, part = (named[name] for name in ("X", "Y", "D", "CHUNK", "SLICE"))
        multiplies = named.get("GRADIENT", not {"stored", "blocks"} & named.keys())
        width = d if d <= chunk == part or not multiplies else d + part
        return int((y * width + x * d * (d > chunk)) * named["x"].element_size())

    def code(self, named: dict[str, Any]) -> dict[str, Any]:
        """What `bench.static` reads in it, compiled for the card that the driver poses as."""
        compiled = self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.options)
        tile = configs.Tile(
            named["X"], named["Y"], named["CHUNK"], named["SLICE"], named["num_warps"], named["num_stages"]
        )
        dtype = named["x"].dtype
        build = static.read(compiled, "", ARCHITECTURE, dtype, named["D"], tile)
        names = (*static.PER_SCORE, "matrix_clocks_per_score", "registers", "shared_bytes", "shapes", "serialised")
        return {"scores": tile.x * tile.y, "resident": build.resident, **{name: getattr(build, name) for name in names}}


def together(kernels: Sequence[Kernel]) -> Iterator[Kernel]:
    """Launches that are alike in all, as one."""
    alike: list[tuple[Kernel, list[Kernel]]] = []
    for kernel in kernels:
        same = next((those for first, those in alike if first == kernel), None)
        if same is None:
            alike.append((kernel, same := []))
        same.append(kernel)
    for first, those in alike:
        sums = {name: len(those) * getattr(first, name) for name in SUMS}
        yield first._replace(**sums)


@contextmanager
def counting_triton(compile_them: bool) -> Iterator[list[Kernel]]:
    """Triton's launches are taken down; what was found is there at the end."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fused_nce.backends.triton import stored

    taken: list[Launch] = []
    products: list[Kernel] = []
    found: list[Kernel] = []

    def launching(kernel: Any, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: taken.append(Launch(kernel, grid, arguments, options))

    def multiply(w: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
        kept, size = w.numel() * w.element_size(), y.numel() * y.element_size() + 4 * out.numel() * (1 + add)
        name = f"gemm {str(w.dtype).removeprefix('torch.')}"
        products.append(Kernel(name, 1, size, 0, 2 * w.numel() * y.shape[1], kept, kept))

    with (
        mock.patch.object(triton, "why_not", return_value=None),
        mock.patch.object(configs, "architecture_of", return_value=ARCHITECTURE),
        mock.patch.object(JITFunction, "__getitem__", launching),
        mock.patch.object(stored, "multiply", multiply),
        mock.patch.object(upstream, "_is_known_one", return_value=False),
    ):
        yield found
    with mock.patch.object(driver, "_active", static.Card(ARCHITECTURE)):
        codes: dict[str, dict[str, Any]] | None = {} if compile_them else None
        found += together([*(launch.counted(codes) for launch in taken), *products])


def count(label: str, backend: str, compile_them: bool = False) -> Call:
    """One call's row of the JSON.

    Args:
        label: of `problems_counted`.
        backend: of `BACKENDS`.
        compile_them: with what Triton's kernels issue.

    Raises:
        RuntimeError: for `cuda` where the kernels, or the emulation of a GPU, are not built.
    """
    problem, dtype = problems_counted()[label]
    formula = FORMULAS[problem.loss]
    inputs = formula.inputs(problem, partial(torch.zeros, dtype=dtype))
    for keys in inputs[1:] if problem.rows_alone and not problem.call().shared else ():
        keys.requires_grad_(False)
    loss = rivals.with_backend(formula.ours, backend)
    counting = counting_cuda() if backend == "cuda" else counting_triton(compile_them)
    with rivals.workspace(problem.workspace_mb or GPU_DEFAULT_MB), counting as kernels:
        torchs, moved = operators(lambda: rivals.step(loss, inputs))
    return {
        "label": label,
        "backend": backend,
        "launches": sum(k.launches for k in kernels) + sum(torchs.values()),
        "torch": dict(sorted(torchs.items())),
        "torch_bytes": moved,
        "kernels": [{name: x for name, x in k._asdict().items() if x} for k in kernels],
    }


# ---- the table ---------------------------------------------------------------------------------------------------


@cache
def committed() -> dict[tuple[str, str], Call]:
    """The table, by label and backend."""
    rows = json.loads(TABLE.read_text(encoding="utf-8"))["calls"]
    return {(row["label"], row["backend"]): row for row in rows}


def own(call: Call) -> int:
    """Launches of our kernels and cuBLAS'."""
    return sum(kernel["launches"] for kernel in call["kernels"])


def moved_bytes(call: Call) -> int:
    """Read and written, scores and torch's tensors included."""
    return sum(k.get("bytes", 0) + k.get("strip_bytes", 0) for k in call["kernels"]) + int(call["torch_bytes"])


def numbers(call: Call) -> dict[str, float]:
    """All that is counted of a call, by what it is of: the sums over a kernel's launches, whose code may be several."""
    found = {"launches": call["launches"], "bytes of torch's": call["torch_bytes"]}
    found |= {f"launches of torch's {name}": times for name, times in call["torch"].items()}
    for kernel in call["kernels"]:
        strips, programs = (kernel["launches"] * kernel.get(name, 0) for name in ("strip", "programs"))
        sums = {name: kernel.get(name, 0) for name in SUMS}
        sums |= {"strips": strips, "programs": programs, "tiles": programs * kernel.get("tiles", 0)}
        for name, count in sums.items():
            of = f"{name} of {kernel['name']}"
            found[of] = found.get(of, 0) + count
    return {of: round(count, 3) for of, count in found.items()}  # tiles are a float


def regressions(found: Sequence[Call]) -> list[str]:
    """A line for each number that is not the committed table's, and each call that it lacks.

    One that became less too: the model is made from the table, so a stale row is as wrong as a dearer call.
    """
    lines = []
    for call in found:
        name = f"{call['label']}, {call['backend']}"
        before = committed().get((call["label"], call["backend"]))
        if before is None:
            lines.append(f"{name}: not in {TABLE.name}")
            continue
        new, old = numbers(call), numbers(before)
        lines += [
            f"{name}: {new.get(of, 0)} {of}, was {old.get(of, 0)}"
            for of in old | new
            if new.get(of, 0) != old.get(of, 0)
        ]
    return lines


def report(found: Sequence[Call]) -> str:
    """A Markdown table."""
    rows = [
        [
            call["label"],
            call["backend"],
            f"{own(call)}",
            f"{sum(call['torch'].values())}",
            f"{moved_bytes(call) / 1e6:.1f}",
        ]
        for call in found
    ]
    return markdown(["call", "backend", "our launches", "torch's", "MB"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, judge; the number of regressions."""
    parser = argparse.ArgumentParser(prog="python -m bench.calls", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="problems whose label has this text")
    parser.add_argument("--backend", choices=BACKENDS, help="one alone")
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    labels = [label for label in problems_counted() if options.only in label]
    chosen = [options.backend] if options.backend else BACKENDS
    found = [count(label, backend, options.write) for label in labels for backend in chosen]
    print(report(found))
    if options.write:
        new = {(call["label"], call["backend"]): call for call in found}
        kept = committed() if TABLE.exists() else {}
        rows = [(kept | new).get((label, backend)) for label in problems_counted() for backend in BACKENDS]
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows if row is not None)
        TABLE.write_text(f'{{"schema":1,"calls":[\n{lines}\n]}}\n', encoding="utf-8")
        committed.cache_clear()
    worse = regressions(found)
    print("\n".join(worse), end="\n" if worse else "", file=sys.stderr)
    return len(worse)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
