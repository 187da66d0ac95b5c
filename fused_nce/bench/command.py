"""`fused-nce bench`: a loss on this machine, ours on every backend beside what else here computes it.

One interleaved run: loss and fresh gradients, warm, in an order drawn anew each round. The table goes to the terminal;
table, picture and a JSON to send go to a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from fused_nce import last_path
from fused_nce.bench import memory, timers
from fused_nce.bench.formulas import FORMULAS
from fused_nce.bench.progress import Progress
from fused_nce.bench.rivals import RIVALS, Problem, Rival, Subject, errors, ours, step
from fused_nce.core import dispatch
from fused_nce.measure import environment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COLUMNS = {"moco_nce": 16, "amdim_nce": 49}  # a row: a queue of 16 batches, a map's locations
ROUNDS, TIMED_S = 30, 12.0
LIMIT_S, CALL_S = 110.0, 2.5  # of the whole, and of one call of another way: two warm ones, and two rounds at least
MEMORY_S, COMPILE_S = 5.0, 20.0  # left for a peak of memory, and for one that compiles once more
MIB = 2**20


class Parser(argparse.ArgumentParser):
    """A slip is one line, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def main(argv: Sequence[str]) -> int:
    """`fused-nce bench [options]`."""
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog="fused-nce bench", description=__doc__, formatter_class=form)
    cuda = torch.cuda.is_available()
    parser.add_argument("--loss", choices=list(FORMULAS), default="info_nce", help="what is timed")
    parser.add_argument("--n", type=int, default=1024, help="rows: the batch (for nt_xent of both views, so even)")
    parser.add_argument("--d", type=int, default=256, help="width of the embeddings")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the embeddings")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("fused-nce-bench"), help="folder")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes the longest")
    options = parser.parse_args(argv)
    for name in ("n", "d"):
        if getattr(options, name) < 4:
            raise ValueError(f"--{name}: must be at least 4, got {getattr(options, name)}")
    if options.loss == "nt_xent" and options.n % 2:
        raise ValueError(f"--n: must be even for nt_xent, whose rows are two views of a batch, got {options.n}")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"--device: must be cpu or cuda, got {options.device!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not cuda):
        raise ValueError(f"--device: must be {'cpu or cuda' if cuda else 'cpu, as torch sees no GPU'}, got {device}")
    record = measured(problem_of(options.loss, options.n, options.d), options.dtype, device, not options.no_compile)
    text = table(record)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    files = {"bench.json": json.dumps(record, indent=1, ensure_ascii=False), "bench.md": text}
    for name, content in files.items():
        (options.out / name).write_text(content + "\n", encoding="utf-8")
    print(f"\nwrote {', '.join(files)}{draw(record, options.out / 'bench.png')} into {options.out}")
    return 0


def problem_of(loss: str, n: int, d: int) -> Problem:
    """One call at this size."""
    label = f"{loss} of {n:,} rows, width {d}"
    return Problem(
        loss, label, n, n * COLUMNS.get(loss, 1), d, 49 if loss == "amdim_nce" else 1, 4 if loss == "cpc_nce" else 1
    )


def measured(problem: Problem, dtype: str, device: torch.device, compiling: bool = True) -> dict[str, Any]:
    """Every way that can run here, as the JSON has it; those that cannot, with the reason."""
    begin = time.perf_counter()
    on = partial(_on, problem, DTYPES[dtype], device)
    exact = step(ours("chunked", problem), _on(problem, torch.float64, device))
    left_out: dict[str, str] = {}
    ways = dict(_ways(problem, on(), compiling, left_out))
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    warm_s: dict[str, float] = {}
    path = None
    with Progress(2 * len(ways) + 1) as tick:
        for name, rival in ways.items():
            tick(f"{rival.label}: warm-up")
            try:
                loss = rival.make(problem)
                if loss is None:
                    left_out[rival.label] = rival.why_none(problem.loss)
                    continue
                if name != "ours" and time.perf_counter() - begin > LIMIT_S / 2:
                    left_out[rival.label] = f"no time left within {LIMIT_S:.0f} s"
                    continue
                call = partial(step, loss, on())
                found = {"label": rival.label, **errors([x.double() for x in call()], exact)}
                if name == "ours":  # fault: bench-chosen
                    path = last_path()
                    found["label"] += f" ({path.backend})" if path else ""
                once = time.perf_counter()
                call()
                warm_s[name] = time.perf_counter() - once
            except Exception as error:  # another project's code, or a compiler that is not there
                left_out[rival.label] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
                continue
            if name != "ours" and warm_s[name] > CALL_S:
                left_out[rival.label] = f"one call takes {warm_s.pop(name):.1f} s"
                continue
            rows[name], steps[name] = found, call
        tick("timing")
        clock = timers.synchronized_wall_ms if device.type == "cuda" else timers.wall_ms
        left = max(0.0, 0.7 * LIMIT_S - (time.perf_counter() - begin))
        rounds = int(max(2, min(ROUNDS, left / sum(warm_s.values()), max(3, TIMED_S / sum(warm_s.values())))))
        with timers.without_gc():
            times = timers.interleave(steps, rounds, clock)
        for name in rows:
            tick(f"{ways[name].label}: memory")
            rows[name] |= timers.spread(times[name])
            room = LIMIT_S - (time.perf_counter() - begin) - MEMORY_S - COMPILE_S * ways[name].compiles
            rows[name]["peak_memory_mib"] = _peak_mib(name, problem, dtype, device, steps[name]) if room > 0 else None
            if room <= 0:
                left_out[f"{ways[name].label}, its peak memory"] = f"no time left within {LIMIT_S:.0f} s"
    return {
        "schema": 1,
        "date_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": environment(),
        "problem": {"loss": problem.loss, "n": problem.n, "m": problem.m, "d": problem.d, "steps": problem.steps},
        "label": problem.label,
        "dtype": dtype,
        "device": str(device),
        "rounds": rounds,
        "seconds": round(time.perf_counter() - begin, 1),
        "chosen": path.backend if path else None,
        "chosen_because": path.reason if path else "",
        "ways": rows,
        "left_out": left_out,
    }


def _on(problem: Problem, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(x.detach().to(device).requires_grad_(x.requires_grad) for x in problem.inputs(dtype))


def _ways(problem: Problem, inputs: Sequence[Tensor], compiling: bool, left_out: dict[str, str]) -> Any:
    """Name and rival of what may run; why not, of the rest."""
    room, need = _available_bytes(inputs[0].device), 12 * problem.n * problem.m * 4 * problem.steps
    for name, rival in sorted(RIVALS.items(), key=lambda item: item[0] != "ours"):  # what is late is another's
        if name == "chunked" or (rival.compiles and not compiling):
            continue
        if name != "ours" and need > room:
            left_out[rival.label] = f"its scores would take some {need / 2**30:.1f} GiB, {room / 2**30:.1f} are free"
            continue
        yield name, rival
    step(ours(None, problem), inputs)
    chosen = last_path()
    for backend in dispatch.BACKENDS:
        if backend == "reference" or (chosen and backend == chosen.backend):  # the tests' oracle; ours itself
            continue
        label = f"fused_nce, {backend}"
        try:
            step(ours(backend, problem), inputs)
        except (ValueError, RuntimeError) as error:
            left_out[label] = str(error).partition("\n")[0].rpartition("cannot run this: ")[2]
        else:
            yield backend, Rival(label, partial(ours, backend))


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        words = Path("/proc/meminfo").read_text(encoding="ascii").split()
        return int(words[words.index("MemAvailable:") + 1]) << 10
    except (OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _peak_mib(name: str, problem: Problem, dtype: str, device: torch.device, call: Callable[[], Any]) -> float | None:
    """Above inputs and gradients; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        made = sum(x.nbytes for x in kept[1:])
        return round((torch.cuda.max_memory_allocated(device) - before - made) / MIB, 2)
    try:
        return max(0.0, memory.peak(Subject(name, problem, DTYPES[dtype]), torch.get_num_threads())["peak_memory_mib"])
    except (RuntimeError, OSError, AttributeError):
        return None


def table(record: dict[str, Any]) -> str:
    """Markdown, the fastest first; what was left out, and why, below."""
    ways = sorted(record["ways"].values(), key=lambda row: float(row["time_ms_median"]))
    own = record["ways"]["ours"]["time_ms_median"]
    lines = [
        "| way | median, ms | ± | ÷ ours | peak, MiB | value error | gradient error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in ways:
        peak = "–" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.1f}"
        ms, spread = row["time_ms_median"], row["time_ms_iqr"] / 2
        found = [row["label"], f"{ms:.3g}", f"{spread:.2g}", f"{ms / own:.2f}", peak]  # fault: bench-ratio
        lines.append("| " + " | ".join([*found, f"{row['value_error']:.0e}", f"{row['gradient_error']:.0e}"]) + " |")
    host = record["environment"]
    because = record["chosen_because"]
    head = f"{record['label']}, {record['dtype']}, {record['device']}: loss and gradients, {record['rounds']} rounds"
    return "\n".join([
        head, "", *lines, "",
        f"chosen: {record['chosen']}{f' ({because})' if because else ', the first of the automatic order'}",
        *(f"left out: {label}: {why}" for label, why in record["left_out"].items()),
        f"{host['processor']}, {host['threads']} threads, {host['instruction set']}; torch {host['torch']}, "
        f"fused_nce {host['fused_nce']}; {record['seconds']:.0f} s",
    ])  # fmt: skip


def draw(record: dict[str, Any], path: Path) -> str:
    """Bars of time and of peak memory; the file's name for the last line, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return " (no picture: pip install matplotlib)"
    ways = sorted(record["ways"].items(), key=lambda item: -float(item[1]["time_ms_median"]))
    figure = Figure(figsize=(9.6, 1.3 + 0.34 * len(ways)), dpi=130, facecolor="white", layout="constrained")
    colours = ["#0072B2" if name == "ours" or row["label"].startswith("fused_nce") else "#999999" for name, row in ways]
    labels = [row["label"] for _, row in ways]
    columns = (("time_ms_median", "ms, loss and gradients"), ("peak_memory_mib", "peak MiB above inputs and gradients"))
    for ax, (key, title) in zip(figure.subplots(1, 2, sharey=True), columns, strict=True):
        values = [row[key] or 0.0 for _, row in ways]
        ax.barh(labels, values, color=colours)
        for place, value in enumerate(values):
            ax.annotate(f" {value:.3g}", (value, place), va="center", fontsize=8)
        ax.set_title(title, fontsize=9.5, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.15)
    figure.suptitle(f"{record['label']}, {record['dtype']}, {record['environment']['processor']}", fontsize=10)
    figure.savefig(path)
    return f", {path.name}"
