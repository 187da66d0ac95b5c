"""`bench/gpu.sh` without a GPU: what it refuses, what it plans, and the whole of it on a CPU's tiny sizes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from bench.gpu import problems
from bench.host import ROOT
from tests.gpu import probe


def script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def test_the_script_refuses_what_it_does_not_know():
    for arguments, message in {
        ("--fast",): "got --fast",
        ("--out",): "--out needs",
        ("--device", "tpu"): "tpu",
    }.items():
        done = script(*arguments)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_says_that_there_is_no_gpu(tmp_path):
    done = script("--out", str(tmp_path))
    assert done.returncode == 1
    assert "torch sees no CUDA device" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.log"]


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path):
    done = script("--dry-run", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for name in ("machine", "build", "tests", "benchmark", "mem(check|check and racecheck)"):
        assert re.search(rf"^{name} +(\d+ s at most|left out) ", done.stdout, re.M), done.stdout
    assert all(p.label in done.stdout for p in problems.ALL)
    assert re.search(r"^torch sees .+ here\n\ndry run: nothing was run or written\n\Z", done.stdout, re.M)
    assert list(tmp_path.iterdir()) == []


def test_a_quick_run_has_time_for_all_that_comes_before_the_memory_checker():
    limits = {}
    for arguments in ((), ("--quick",)):
        plan = script("--dry-run", *arguments).stdout
        found = dict(re.findall(r"^(machine|build|tests|benchmark) +(\d+) s at most", plan, re.M))
        limits[arguments] = {name: int(seconds) for name, seconds in found.items()}
        assert len(found) == 4
    assert sum(limits["--quick",].values()) <= 180
    assert max(limits[()].values()) <= 480


@pytest.mark.nightly
def test_the_whole_script_on_a_cpu(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    done = script("--device", "cpu", "--quick", "--out", str(tmp_path / "out"), HOME=str(home))
    assert done.returncode == 0, done.stdout[-3000:]
    assert not (home / ".cache").exists()  # verdicts and compilers' caches go with the run
    for name in ("build", "tests", "benchmark", "problems for memcheck"):
        assert re.search(rf"^passed +{name} ", done.stdout, re.M), done.stdout[-3000:]
    assert list((tmp_path / "out").glob("trial-*.json"))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_probe_of_the_memory_checker_passes(backend, capsys):
    assert probe.main(["--device", "cpu", "--backend", backend]) == 0
    assert f"{backend} on cpu: {18 + len(probe.OPEN)} problems, 0 failed" in capsys.readouterr().out
