"""`python -m tests.mutants [all|python|family|cpp|triton|trainer|adapters] [PART]`: plant each fault, and test that.

`faults.txt` has them. `JOBS` at a time, 2 by default, each for `TIMEOUT_S` seconds at most, 1200 by default. A fault
that no test notices survives: the table says so and the exit status is 1.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fused_nce import _extension

ROOT = Path(__file__).resolve().parent.parent.parent
PARALLEL = int(os.environ.get("JOBS", "2"))
TIMEOUT_S = int(os.environ.get("TIMEOUT_S", "1200"))  # a fault that hangs is noticed too
# The quick part of the engine's suite, likeliest first; -x stops at the first that fails.
TESTS = [
    *(f"tests/core/test_{name}.py" for name in ("golden", "tails", "fuzz", "contract", "nonfinite")),
    *(f"tests/losses/test_{name}.py" for name in ("amdim", "family", "margins", "queue", "registry")),
    *(f"tests/core/test_{name}.py" for name in ("dispatch", "ops")),
    *(f"tests/backends/test_cuda_{name}.py" for name in ("layouts", "together", "on_host")),
]
NO_TESTS, ELSEWHERE = 5, 99  # pytest's exit status, and none of its own
DOES_NOT_COMPILE = "does not compile:"
# The tests in one process with the check that the copy is what they import: torch is slow to load.
RUN = f"""
import os, sys, fused_nce, pytest
if os.path.dirname(fused_nce.__file__) != os.path.join(os.getcwd(), "fused_nce"):
    print(fused_nce.__file__, file=sys.stderr)
    sys.exit({ELSEWHERE})
sys.exit(pytest.main(sys.argv[1:]))
"""
SELECT = "not fresh and not opcheck and not compile"
IGNORE = shutil.ignore_patterns("__pycache__", "*.pyc", "mutants")
MARK = re.compile(r"\s*(?:#|//) fault: ([\w-]+(?:, [\w-]+)*)$")
Mark = tuple[Path, int]  # a file, and the line in it that is changed, from 0


class Fault(NamedTuple):
    """One planted fault."""

    name: str
    old: str  # once in the marked line
    new: str
    reason: str  # the mistake that it stands for
    group: str
    tests: tuple[str, ...]  # that must notice it; the engine's quick ones if empty


def read() -> list[Fault]:
    """The table."""
    faults: list[Fault] = []
    group, tests = "", ""
    for line in (Path(__file__).parent / "faults.txt").read_text(encoding="utf-8").split("\n\n", 1)[1].splitlines():
        if line.startswith("["):
            group, _, tests = line[1:-1].partition(": ")
        elif line:
            name, change, reason = line.split(" ~ ")
            old, new = (change + " ").split(" → ")
            faults.append(Fault(name, old, new[:-1], reason, group, tuple(tests.split())))
    return faults


def marks(root: Path = ROOT) -> dict[str, list[Mark]]:
    """Where each name is marked."""
    found: dict[str, list[Mark]] = {}
    for path in (path for folder in ("fused_nce", "csrc") for path in sorted((root / folder).rglob("*.*"))):
        if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
                if (mark := MARK.search(line)) is not None:
                    for name in mark[1].split(", "):
                        found.setdefault(name, []).append((path, number + (mark.start() == 0)))
    return found


def ill_fitting(faults: Sequence[Fault]) -> list[str]:
    """What keeps a fault from being planted: a drifted one would plant nothing."""
    where, names = marks(), [fault.name for fault in faults]
    wrong = [f"{name}: marked in the code, and no fault" for name in where.keys() - set(names)]
    wrong += [f"{name}: twice in faults.txt" for name in set(names) if names.count(name) > 1]
    for fault in faults:
        places = where.get(fault.name, [])
        if len(places) != 1:
            wrong.append(f"{fault.name}: marked {len(places)} times, need once")
            continue
        path, number = places[0]
        code = MARK.sub("", path.read_text(encoding="utf-8").splitlines()[number])
        if code.count(fault.old) != 1 or fault.old == fault.new:
            wrong.append(f"{fault.name}: {path.relative_to(ROOT)}:{number + 1} has not once {fault.old!r}: {code}")
        elif path.suffix == ".py" and not parses(planted(fault, path, number)):
            wrong.append(f"{fault.name}: {path.relative_to(ROOT)} is no Python with it: any test would notice")
        wrong += [f"{fault.name}: no {test}" for test in fault.tests if not (ROOT / test.partition("::")[0]).is_file()]
    return wrong


def planted(fault: Fault, path: Path, number: int) -> str:
    """A file with the fault in its line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[number] = lines[number].replace(fault.old, fault.new, 1)
    return "".join(lines)


def parses(code: str) -> bool:
    """Whether it is Python."""
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def plant(fault: Fault | None, folder: Path, *, kernels: bool) -> None:
    """A copy of what the tests need, with the fault in it; `kernels` to be built from the copy's own sources."""
    for name in ("fused_nce", "tests", "docs", "csrc", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=IGNORE)
    shutil.copy(ROOT / "pyproject.toml", folder)
    if kernels:
        shutil.copy(ROOT / "setup.py", folder)
        for built in (folder / "fused_nce").glob("_C*"):
            built.unlink()
    if fault is not None:
        ((path, number),) = marks(folder)[fault.name]
        path.write_text(planted(fault, path, number), encoding="utf-8")


def command(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in the copy, which comes before any installed package."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "FUSED_NCE_BUILD": "cpu"}
    environment["PYTEST_ADDOPTS"] = "-x"  # of the tests that run others in a process of their own too
    # torch compiles with ccache where that is installed: of all copies, then, only what a fault changes.
    environment |= {"CCACHE_BASEDIR": str(folder), "CCACHE_NOHASHDIR": "1"}
    environment["FUSED_NCE_CXXFLAGS"] = "-O1"  # compiles in half the time, and is as wrong
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def suite(fault: Fault | None, *, kernels: bool = False, tests: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether a fault goes unnoticed by the tests that must see it, or is none, and the line that they end with."""
    named = fault.tests if fault else tests
    kernels = kernels or (fault is not None and fault.group == "cpp")
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        plant(fault, folder, kernels=kernels)
        try:
            if kernels:
                built = command(["setup.py", "-q", "build_ext", "--inplace"], folder)
                if built.returncode:
                    errors = re.findall(r"error: .*", built.stdout + built.stderr)
                    return fault is not None, " ".join([DOES_NOT_COMPILE, *errors[:1]])
            select = SELECT if named or not kernels else f"{SELECT} and (cpu or test_cuda) and not contract_holds"
            done = command(["-c", RUN, "-q", "-x", "-p", "no:cacheprovider", "-k", select, *(named or TESTS)], folder)
        except subprocess.TimeoutExpired:
            return False, f"hangs for {TIMEOUT_S} s"
    if done.returncode == NO_TESTS:
        raise RuntimeError(f"no test is selected: {' '.join(named or TESTS)}")
    if done.returncode == ELSEWHERE:
        raise RuntimeError(f"the copy in {folder} is not what is imported: {done.stderr.strip()}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, (lines or done.stdout.splitlines() or [done.stderr[-200:]])[0 if lines else -1]


def main(group: str = "all", part: str = "") -> int:
    """Run a group of faults.

    Args:
        group: "python", "family", "cpp", "triton", "trainer", "adapters" or "all".
        part: only faults with this in their reason.
    """
    every = read()
    if wrong := ill_fitting(every):
        print("\n".join(wrong))
        return 1
    left_out = {} if _extension.status()[0] is not None else {"cpp": _extension.status()[1]}
    if importlib.util.find_spec("triton") is None:
        left_out["triton"] = "triton is not installed"
    for name, why in left_out.items():
        print(f"{name} faults left out: {why}")
    faults = [f for f in every if group in ("all", f.group) and part in f.reason and f.group not in left_out]
    own = tuple(sorted({name for f in faults for name in f.tests}))
    for kernels, tests in {(f.group == "cpp", own if f.tests else ()) for f in faults}:
        green, line = suite(None, kernels=kernels, tests=tests)
        print(f"without a fault{', kernels built anew' if kernels else ''}: {line}", flush=True)
        if not green:
            print("the suite must be green before a fault can turn it red")
            return 1
    start, survivors = time.monotonic(), []
    with ThreadPoolExecutor(PARALLEL) as pool:
        for index, (fault, (survived, line)) in enumerate(zip(faults, pool.map(suite, faults), strict=True), 1):
            survivors += [fault] if survived else []
            verdict = "NO FAULT" if line.startswith(DOES_NOT_COMPILE) else "SURVIVED" if survived else "killed"
            print(f"[{index:2}/{len(faults)}] {verdict:8} {fault.reason:55} {line[:110]}", flush=True)
    print(f"{len(faults) - len(survivors)} of {len(faults)} faults killed in {time.monotonic() - start:.0f} s")
    for fault in survivors:
        print(f"survived: {fault.name}: {fault.reason}: {fault.old!r} -> {fault.new!r}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
