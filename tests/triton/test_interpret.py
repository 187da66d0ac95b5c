"""The Triton kernels on a machine without a GPU: under the interpreter, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def interpret(*arguments: str, selected: str = "", marked: str = "not nightly") -> str:
    """Run tests under the interpreter; their last line. Fails with all they say."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", selected, "-m", marked, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_its_own_tests():
    assert "passed" in interpret("tests/triton/interpreted.py")


@pytest.mark.parametrize(
    ("file", "selected"),
    [
        pytest.param("test_golden.py", "triton", id="golden"),
        pytest.param("test_nonfinite.py", "triton and not 0.04 and not wide", id="nonfinite"),
        pytest.param("test_nonfinite.py", "triton", id="nonfinite, all", marks=pytest.mark.nightly),
    ],
)
def test_what_every_backend_is_held_to(file, selected):
    assert "passed" in interpret(f"tests/core/{file}", selected=selected)


VALUES = "triton and test_value_and_gradients and (float32 or float16)"
ONE_A_LAYOUT = "moco or nt_xent or siglip or (sup_con and not in) or (info_nce and targets)"


def test_a_loss_of_every_layout():
    assert "passed" in interpret("tests/losses/test_registry.py", selected=f"{VALUES} and ({ONE_A_LAYOUT})")


@pytest.mark.nightly
def test_every_loss():
    assert "passed" in interpret("tests/losses/test_registry.py", selected=VALUES)


@pytest.mark.nightly
def test_many_cases():
    assert "passed" in interpret("tests/triton/interpreted.py", marked="nightly")
