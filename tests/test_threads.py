"""How OpenMP's threads wait: chosen by the command line for its own process, and for nobody else's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import busy
from fused_nce import _threads

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (["python", "-m", "fused_nce.cli", "train"], True),
        (["python", "-u", "-W", "ignore", "-m", "fused_nce.cli", "eval", "x"], True),
        (["python", "bin/fused-nce", "train"], True),
        (["python", "train.py", "fused-nce"], False),
        (["python", "-m", "pytest"], False),
        (["python"], False),
    ],
)
def test_the_command_line_is_known_by_how_it_was_started(arguments, ours):
    assert _threads.is_command_line(arguments) == ours


def environment(*words, **more):
    clean = {name: value for name, value in os.environ.items() if name not in _threads.CHOSEN}
    done = subprocess.run(
        [sys.executable, *words], env=clean | more, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


SHOW = f"import json, os; print(json.dumps({{n: os.environ[n] for n in {list(_threads.WAITS)} if n in os.environ}}))"


def test_a_program_that_imports_the_package_keeps_its_own_way(tmp_path):
    assert environment("-c", "import fused_nce\n" + SHOW) == {}
    (tmp_path / "fused-nce").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fused_nce.cli\n{SHOW}")
    assert environment(str(tmp_path / "fused-nce")) == _threads.WAITS


@pytest.mark.parametrize(
    ("chosen", "loaded", "added"),
    [
        ({}, False, _threads.WAITS),
        ({}, True, {}),
        ({"GOMP_SPINCOUNT": "7"}, False, {}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, False, {}),
    ],
)
def test_what_is_chosen_already_stays(monkeypatch, chosen, loaded, added):
    before = {name: value for name, value in os.environ.items() if name not in _threads.CHOSEN} | chosen
    monkeypatch.setattr(os, "environ", dict(before))
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/fused-nce", "train"])
    if not loaded:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    _threads.wait_without_spinning()
    assert os.environ == before | added


@pytest.mark.parametrize(("beside", "status"), [(0.02, 0), (0.03, 0), (0.04, 1)])
def test_the_busy_bench_judges_a_step_by_its_share(monkeypatch, capsys, beside, status):
    """One loop beside one core leaves half: twice and 1.5 times the quiet 10 ms are allowed."""
    monkeypatch.setattr(busy.measure, "cores", lambda: 1)
    seconds = iter([[0.01], [0.01], [beside], [beside]])
    monkeypatch.setattr(busy, "step_seconds", lambda steps, threads, way, options: next(seconds))
    assert busy.main(["--loops", "0", "1", "--rounds", "1"]) == status
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 0", "| 1"))]
    ms, ratio = f"{1e3 * beside:.0f}", f"{100 * beside:.2f}"
    assert rows == [
        "| 0 | 1.00 | 1.00 | 10 | 1.00 | 10 | 1.00 |",
        f"| 1 | 0.50 | 3.00 | {ms} | {ratio} | {ms} | {ratio} |",
    ]


def test_no_loop_is_left():
    with busy.busy(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
    assert all(loop.poll() is not None for loop in loops)


@pytest.mark.nightly
def test_the_busy_bench_measures_steps(capsys):
    options = ["--loops", "0", "1", "--steps", "2", "--rounds", "1", "--batch-size", "8"]
    assert busy.main(options) in (0, 1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 0", "| 1"))]
    assert [row.split("|")[1].strip() for row in rows] == ["0", "1"]
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split("|")[1:])
