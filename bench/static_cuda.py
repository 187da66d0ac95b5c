"""`python -m bench.static_cuda [sm_80 …]`: what the compiler says of the GPU kernels, without a GPU.

Compiles `csrc/cuda/*.cu` for each architecture and prints registers, shared memory, stack and spills of each kernel.
The exit status is 1 where one has a stack or spills: what a row kernel keeps in registers it touches for every score.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from fused_nce import _nvcc

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TYPES = {"f": "float32", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


class Kernel(NamedTuple):
    """What ptxas tells of one kernel."""

    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int

    @property
    def clean(self) -> bool:
        """Everything is in registers."""
        return self.stack_bytes == 0 and self.spill_bytes == 0


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
    name = re.search(r"\d+([a-z_]+)_kernel(?:I((?:Lb[01]E)*)(f|13__nv_bfloat16|6__half)?(?:Li(\d)E)?E)?", mangled)
    if name is None:
        return mangled
    flags = re.findall(r"Lb([01])E", name[2] or "")
    lone = "clip" if name[1] == "fold_optional" else "shift"
    names = (lone,) if len(flags) == 1 else ("clip", "shift", "bias or labels" if name[1] == "fold" else "extras")
    words = [name[1], *(word for word, flag in zip(names, flags, strict=False) if flag == "1")]
    several = ["together"] if name[4] not in (None, "1") else []
    return " ".join([*words, *([TYPES[name[3]]] if name[3] else []), *several])


def compile_for(nvcc: _nvcc.Nvcc, source: Path, architecture: str) -> list[Kernel]:
    """The kernels of one file.

    Raises:
        RuntimeError: with the compiler's own words, where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc.path, *_nvcc.FLAGS, "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, str(source), "-o", str(Path(folder, "out.cubin"))], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for {architecture}: {done.stderr.strip()}")
    return parse(done.stdout + done.stderr)


def main(architectures: list[str]) -> int:
    """Print the table."""
    nvcc = _nvcc.find()
    if nvcc is None:
        print("no nvcc: nothing to compile")
        return 0
    found = [
        kernel
        for source in sorted(SOURCES.glob("*.cu"))
        for architecture in architectures or ARCHITECTURES
        for kernel in compile_for(nvcc, source, architecture)
    ]
    print(f"{'kernel':32} {'arch':7} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>7}   bytes")
    for k in sorted(found):
        print(f"{k.name:32} {k.architecture:7} {k.registers:9} {k.shared_bytes:7} {k.stack_bytes:6} {k.spill_bytes:7}")
    return 0 if all(kernel.clean for kernel in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
