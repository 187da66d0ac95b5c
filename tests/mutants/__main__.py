"""`python -m tests.mutants [all|python|family|cpp|triton|trainer|adapters] [PART]`: plant each fault, and test that.

`JOBS` at a time, 2 by default. A fault that no test notices survives: the table says so and the exit status is 1.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fused_nce import _extension

from .adapters import ADAPTERS
from .family import FAMILY
from .faults import CPP, PYTHON, Fault
from .gpu import GPU
from .trainer import TRAINER
from .triton import TRITON

ROOT = Path(__file__).resolve().parent.parent.parent
PARALLEL = int(os.environ.get("JOBS", "2"))
TIMEOUT_S = 600  # a fault that hangs is noticed too
# The quick part of the engine's suite, likeliest first; -x stops at the first that fails.
TESTS = [
    "tests/core/test_golden.py",
    "tests/core/test_tails.py",
    "tests/core/test_fuzz.py",
    "tests/core/test_contract.py",
    "tests/core/test_nonfinite.py",
    "tests/losses/test_amdim.py",
    "tests/losses/test_family.py",
    "tests/losses/test_margins.py",
    "tests/losses/test_queue.py",
    "tests/losses/test_registry.py",
    "tests/core/test_dispatch.py",
    "tests/core/test_ops.py",
    "tests/backends/test_cuda_layouts.py",
    "tests/backends/test_cuda_together.py",
    "tests/backends/test_cuda_on_host.py",
]
SELECT = "not fresh and not opcheck and not compile"
IGNORE = shutil.ignore_patterns("__pycache__", "*.pyc", "mutants")


def plant(fault: Fault | None, folder: Path, *, kernels: bool) -> None:
    """A copy of what the tests need, with the fault in it; `kernels` to be built from the copy's own sources."""
    for name in ("fused_nce", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORE)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if kernels:
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copy(ROOT / "setup.py", folder)
        for built in (folder / "fused_nce").glob("_C*"):
            built.unlink()
    if fault is None:
        return
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.find) != 1:
        raise LookupError(f"{fault.file} has {text.count(fault.find)} times {fault.find!r}, need once")
    path.write_text(text.replace(fault.find, fault.replace), encoding="utf-8")


def command(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in the copy, which comes before any installed package."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "FUSED_NCE_BUILD": "cpu"}
    environment["PYTEST_ADDOPTS"] = "-x"  # of the tests that run others in a process of their own too
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def suite(fault: Fault | None, *, kernels: bool = False, tests: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether the tests that must notice a fault pass with it planted, and the line that says what they saw."""
    tests = (fault.tests if fault else tests) or TESTS
    kernels = kernels or (fault is not None and fault.file.startswith("csrc/"))
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        plant(fault, folder, kernels=kernels)
        try:
            if kernels:
                built = command(["setup.py", "-q", "build_ext", "--inplace"], folder)
                if built.returncode:
                    raise RuntimeError(f"it does not compile:\n{built.stderr[-2000:]}")
            where = command(["-c", "import fused_nce; print(fused_nce.__file__)"], folder)
            if not where.returncode and Path(where.stdout.strip()).parent != folder / "fused_nce":
                raise RuntimeError(f"the copy in {folder} is not what is imported: {where.stdout.strip()}")
            select = f"{SELECT} and (cpu or test_cuda) and not contract_holds" if kernels else SELECT
            done = command(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", select, *tests], folder)
        except subprocess.TimeoutExpired:
            return False, f"hangs for {TIMEOUT_S} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, (lines or done.stdout.splitlines() or [done.stderr[-200:]])[0 if lines else -1]


def main(group: str = "all", part: str = "") -> int:
    """Run a group of faults.

    Args:
        group: "python", "family", "cpp", "triton", "trainer", "adapters" or "all".
        part: only faults with this in their reason.
    """
    cpp = (*CPP, *GPU) if _extension.status()[0] is not None else ()
    if group in ("cpp", "all") and not cpp:
        print(f"C++ faults left out: {_extension.status()[1]}")
    groups: dict[str, tuple[Fault, ...]] = {
        "python": PYTHON,
        "family": FAMILY,
        "cpp": cpp,
        "triton": TRITON if importlib.util.find_spec("triton") is not None else (),
        "trainer": TRAINER,
        "adapters": ADAPTERS,
    }
    groups["all"] = tuple(fault for some in groups.values() for fault in some)
    faults = [f for f in groups[group] if part in f.reason]
    own = tuple(sorted({name for f in faults for name in f.tests}))
    for kernels, tests in {(f.file.startswith("csrc/"), own if f.tests else ()) for f in faults}:
        green, line = suite(None, kernels=kernels, tests=tests)
        print(f"without a fault{', kernels built anew' if kernels else ''}: {line}", flush=True)
        if not green:
            print("the suite must be green before a fault can turn it red")
            return 1
    start, survivors = time.monotonic(), []
    with ThreadPoolExecutor(PARALLEL) as pool:
        for index, (fault, (survived, line)) in enumerate(zip(faults, pool.map(suite, faults), strict=True), 1):
            survivors += [fault] if survived else []
            verdict = "SURVIVED" if survived else "killed"
            print(f"[{index:2}/{len(faults)}] {verdict:8} {fault.reason:55} {line[:110]}", flush=True)
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults killed in {time.monotonic() - start:.0f} s")
    for fault in survivors:
        print(f"survived: {fault.reason}: {fault.file}: {fault.find!r} -> {fault.replace!r}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
