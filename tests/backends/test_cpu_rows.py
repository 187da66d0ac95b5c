"""The generic row kernels, of any CPU but x86 with AVX2, against plain formulas: here, and as aarch64 has them.

The aarch64 build runs under qemu-user (Debian: g++-aarch64-linux-gnu, qemu-user-static). It has no torch, so brgemm,
the driver's threads and any speed are not tested there.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from bench.host import ROOT
from tests.marks import nightly_but

FLAGS = ("-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-static")
SOURCES = (ROOT / "tests/backends/rows_check.cpp", ROOT / "csrc/cpu/rows_generic.cpp")
TARGETS = {"here": ("g++",), "aarch64": ("aarch64-linux-gnu-g++", "qemu-aarch64-static")}


@pytest.mark.parametrize("level", nightly_but(["-O0"], ["-O0", "-O3"]))  # -O3, as shipped, compiles for 11 s
@pytest.mark.parametrize("target", TARGETS)
def test_the_generic_rows_are_the_formulas(target, level, tmp_path):
    compiler, *emulator = TARGETS[target]
    for tool in (compiler, *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    program = tmp_path / "rows_check"
    subprocess.run([compiler, level, *FLAGS, f"-I{ROOT / 'csrc'}", *map(str, SOURCES), "-o", str(program)], check=True)
    found = subprocess.run([*emulator, str(program)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert int(found.stdout.split()[0]) > 100_000
    if (target, level) == ("aarch64", "-O3"):  # four floats an instruction: the loops are vectors there too
        code = subprocess.run(["aarch64-linux-gnu-objdump", "-d", program], capture_output=True, text=True, check=True)
        assert len(re.findall(r"\tfml[as]\tv\d+\.4s", code.stdout)) > 1000
