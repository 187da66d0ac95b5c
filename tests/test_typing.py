"""`py.typed` holds: a file that calls every public name, under mypy --strict and pyright where that is installed."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_nce
from fused_nce import distributed, models

USER = Path(__file__).parent / "typing" / "user.py"
RAISED = "fused_nce.nt_xent(q, k, temperature='x')\n"


def wrong(folder: Path) -> Path:
    """The same file with a call of a wrong type, which a checker that sees the types refuses."""
    path = folder / "wrong.py"
    path.write_text(USER.read_text(encoding="utf-8") + "\n" + RAISED, encoding="utf-8")
    return path


def test_the_users_file_calls_every_public_name_and_runs():
    text = USER.read_text(encoding="utf-8")
    public = dict.fromkeys(fused_nce.__all__, "fused_nce")
    public |= dict.fromkeys(models.__all__, "models") | dict.fromkeys(distributed.__all__, "distributed")
    assert not [name for name, of in public.items() if not re.search(rf"\b{of}\.{name}\b|\b{name}\]", text)]
    runpy.run_path(str(USER), run_name="__main__")


@pytest.mark.nightly  # `make lint` runs mypy on it at each change
def test_mypy_strict_sees_the_types(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--ignore-missing-imports"]
    root = USER.parents[2]
    for path, code in ((USER, 0), (wrong(tmp_path), 1)):
        done = subprocess.run([*command, str(path)], cwd=root, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if path.name in line]
        assert bool(lines) == bool(code), done.stdout


@pytest.mark.nightly
def test_pyright_sees_the_types(tmp_path):
    found = shutil.which("basedpyright") or shutil.which("pyright")
    if found is None:
        pytest.skip("neither pyright nor basedpyright is installed")
    options = ["--level", "error", "--pythonpath", sys.executable]
    for path, code in ((USER, 0), (wrong(tmp_path), 1)):
        done = subprocess.run(
            [found, *options, str(path)], cwd=USER.parents[2], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout
