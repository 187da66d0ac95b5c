"""`python -m bench.static_cuda [sm_80 …] [--write]`: what the compiler made of the GPU kernels, without a GPU.

Compiles `csrc/cuda/*.cu` for each architecture and prints registers, shared memory, stack and spills of each kernel,
and what it issues for a score: the instructions of the main loops' cheapest turns (`sass.py`), which no turn without a
positive, the row itself, the row's end or a new maximum exceeds. The exit status is 1 where a kernel has a stack or
spills, since what a row kernel keeps in registers it touches for every score, and where one issues more, in all or to
one pipe, than the committed table says for this nvcc. `--write` makes the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench import sass
from bench.host import ROOT
from fused_nce import _nvcc

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
TABLE = ROOT / "bench/results/static-cuda.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")  # 8.6 and 8.9 run sm_80's code
TYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}

COUNTS = ("issued", "special", "alu", "slots")  # of a score: in the table, none may grow
# Kernels with a loop over scores, and how many scores a turn has: kColumns of rows.h, kRowsAtOnce of columns.h.
TURNS = {"fold": 8, "fold_optional": 8, "weigh": 8, "weigh_prefix": 8, "loss": 8, "loss_summary": 8, "fold_columns": 4}


class Kernel(NamedTuple):
    """What ptxas tells of one kernel, and what its machine code issues for a score and thread."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    issued: float | None = None  # instructions a score; None: no loop over scores, or nobody has looked
    special: float | None = None  # of them exponentials and reciprocals
    alu: float | None = None  # of them in the ALU pipe
    slots: float | None = None  # issue slots of an sm_90 (`sass.Turn.slots`), of one loop after the other

    @property
    def clean(self) -> bool:
        """Everything is in registers; the latest keep a problem's place elsewhere, outside the loop over scores."""
        few = 96 if self.architecture in ("sm_100", "sm_120") and self.name.endswith("together") else 0
        return max(self.stack_bytes, self.spill_bytes) <= few


def parse(text: str) -> list[Kernel]:
    """The kernels in the output of `-Xptxas -v`.

    Raises:
        ValueError: where a kernel's lines are not as they are known.
    """
    found = []
    for block in text.split("Compiling entry function")[1:]:
        head = re.match(r" '(\w+)' for '(sm_\w+)'", block)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        registers = re.search(r"Used (\d+) registers", block)
        if not (head and frame and registers):
            raise ValueError(f"nvcc: got {block!r}, need a name, a stack frame and registers")
        shared = re.search(r"(\d+) bytes smem", block)
        stack, stores, loads = map(int, frame.groups())
        found.append(
            Kernel(label(head[1]), head[2], int(registers[1]), int(shared[1]) if shared else 0, stack, stores + loads)
        )
    return found


def label(mangled: str) -> str:
    """`loss clip shift bfloat16 together` of a kernel's mangled name: which template it is."""
    name = re.search(
        r"\d+([a-z_]+)_kernel(?:I((?:Lb[01]E)*)(?:LNS0_6ExtrasE([0-3])E)?(f|13__nv_bfloat16|6__half)?(?:Li(\d)E)?E)?",
        mangled,
    )
    if name is None:
        return mangled
    flags = re.findall(r"Lb([01])E", name[2] or "")
    names = ("clip", "totals") if name[1] == "fold_optional" else ("shift",) if len(flags) == 1 else ("clip", "shift")
    words = [name[1], *(word for word, flag in zip(names, flags, strict=False) if flag == "1")]
    extras = ("", "columns", "extras", "marks")[int(name[3] or 0)]
    several = "together" if name[5] not in (None, "1") else ""
    return " ".join(filter(None, [*words, extras, TYPES.get(name[4] or "", ""), several]))


def specials(kernel: str) -> int:
    """Exponentials and reciprocals that a score needs at least: of the loss, of the clip, of a column's statistics."""
    words = kernel.split()
    return 1 + 2 * ("clip" in words) + ("columns" in words)


def counted(kernel: Kernel, code: str) -> Kernel:
    """With the cost of a score: of the loops of a loss, one after the other.

    Other functions have one, or nvcc wrote it twice, for a condition that no turn changes: the dearer counts.
    """
    scores = TURNS.get(kernel.name.split()[0])
    if scores is None:
        return kernel
    turns = sass.turns(code, scores * specials(kernel.name))
    if not kernel.name.startswith("loss"):
        turns = [max(turns, default=sass.Turn(0, 0))]
    return kernel._replace(**{name: sum(getattr(turn, name) for turn in turns) / scores for name in COUNTS})


def disassembler(nvcc: _nvcc.Nvcc) -> str | None:
    """The toolkit's nvdisasm, else the one that Triton brings; None without either."""
    beside = Path(nvcc.path).resolve().with_name("nvdisasm")
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec and spec.origin else beside
    return next((str(path) for path in (beside, triton) if path.exists()), shutil.which("nvdisasm"))


def compile_for(nvcc: _nvcc.Nvcc, source: Path, architecture: str, entries: Sequence[str] = ()) -> list[Kernel]:
    """The kernels of one file; of PTX these entries alone, where some are named.

    Raises:
        RuntimeError: with the compiler's own words, where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder, "out.cubin"))
        command = [nvcc.path, *_nvcc.FLAGS, "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        command += [f"-Xptxas=--entry={entry}" for entry in entries]
        done = subprocess.run([*command, str(source), "-o", binary], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} for {architecture}: {done.stderr.strip()}")
        tool = disassembler(nvcc)
        listing = tool and subprocess.run([tool, "-c", binary], capture_output=True, text=True, check=True).stdout
    kernels = parse(done.stdout + done.stderr)
    if not listing:
        return kernels
    codes = {label(mangled): code for mangled, code in sass.functions(listing).items()}
    return [counted(kernel, codes[kernel.name]) for kernel in kernels]


@cache
def committed() -> dict[str, dict[str, dict[str, float]]]:
    """COUNTS a score of the committed table, by architecture and kernel."""
    return dict(json.loads(TABLE.read_text(encoding="utf-8"))["counts"])


def regressions(nvcc: _nvcc.Nvcc, found: Sequence[Kernel]) -> list[str]:
    """A line for each count that is more than the table says, and each kernel that it lacks; none for another nvcc."""
    if json.loads(TABLE.read_text(encoding="utf-8"))["nvcc"] != list(nvcc.release):
        return []
    lines = []
    for kernel in found:
        if kernel.issued is None:
            continue
        before = committed().get(kernel.architecture, {}).get(kernel.name, {})
        for name in COUNTS:
            if getattr(kernel, name) > before.get(name, -1):
                was = f"{getattr(kernel, name)} {name} a score, was {before.get(name)}"
                lines.append(f"{kernel.architecture} {kernel.name}: {was}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.static_cuda", description=__doc__)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--write", action="store_true", help=f"what was counted into {TABLE.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    nvcc = _nvcc.find()
    if nvcc is None:
        print("no nvcc: nothing to compile")
        return 0
    found = sorted(
        kernel
        for source in sorted(SOURCES.glob("*.cu"))
        for architecture in options.architectures
        for kernel in compile_for(nvcc, source, architecture)
    )
    heads = ("registers", "shared", "stack", "spills", *COUNTS)
    print(f"{'kernel':32} {'arch':7} {' '.join(f'{head:>9}' for head in heads)}   bytes, instructions a score")
    for k in found:
        sizes = (f"{x:9}" if isinstance(x, int) else f"{x:9.1f}" if x is not None else f"{'':9}" for x in k[2:])
        print(f"{k.name:32} {k.architecture:7} {' '.join(sizes)}")
    if options.write:
        same = json.loads(TABLE.read_text(encoding="utf-8"))["nvcc"] == list(nvcc.release)
        counts = {a: x for a, x in committed().items() if same and a not in options.architectures}
        for k in found:
            if k.issued is not None:
                counts.setdefault(k.architecture, {})[k.name] = {name: getattr(k, name) for name in COUNTS}
        text = json.dumps({"nvcc": nvcc.release, "counts": dict(sorted(counts.items()))}).replace("}, ", "},\n")
        TABLE.write_text(text + "\n", encoding="utf-8")
        committed.cache_clear()
    worse = regressions(nvcc, found)
    print("\n".join(worse), end="\n" if worse else "")
    return 0 if not worse and all(kernel.clean for kernel in found) else 1


if __name__ == "__main__":
    sys.exit(main())
