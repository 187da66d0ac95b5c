"""The Triton kernels on a machine without a GPU: under the interpreter, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PATHS = [x for x in [os.environ.get("PYTHONPATH", "")] if x]  # of another torch and Triton: `make test-oldest`
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpret(*arguments: str, selected: str = "", marked: str = "not nightly") -> str:
    """Run tests under the interpreter; their last line. Fails with all they say."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    command += ["-p", "tests.triton.once"]
    done = subprocess.run(
        [*command, "-k", selected, "-m", marked, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *PATHS))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_its_own_tests():
    every = ("interpreted", "wholly", "two_sided", "contact")
    assert "passed" in interpret(*(f"tests/triton/{name}.py" for name in every))


VALUES = "test_value_and_gradients and (float32 or float16)"
ONE_A_LAYOUT = "moco or nt_xent or siglip or (sup_con and not in) or (info_nce and (targets or margin or weights))"
HELD_TO = ("tests/core/test_golden.py", "tests/core/test_nonfinite.py", "tests/losses/test_registry.py")


def test_what_every_backend_is_held_to():
    """Golden values, inputs that are not finite, and a loss of every layout."""
    few = f"test_golden or (test_nonfinite and not 0.04 and not wide) or ({VALUES} and ({ONE_A_LAYOUT}))"
    assert "passed" in interpret(*HELD_TO, selected=f"triton and ({few})")


@pytest.mark.nightly
def test_all_of_what_every_backend_is_held_to():
    assert "passed" in interpret(*HELD_TO, selected=f"triton and (test_golden or test_nonfinite or ({VALUES}))")


@pytest.mark.nightly
def test_many_cases():
    assert "passed" in interpret(
        *(f"tests/triton/{name}.py" for name in ("interpreted", "two_sided", "contact")), marked="nightly"
    )
