"""Beside other packages: the examples run as their first lines say, on one process and two; so do submitit and W&B."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fused_nce.train.saving import checkpoint
from tests.train.runs import TINY, resumed, trainer

pytestmark = pytest.mark.nightly
ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


def need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (make test-compat installs it, make test-examples all but wandb)")


@pytest.mark.parametrize(
    ("name", "package", "launcher", "options"),
    [
        ("fabric", "lightning", [], []),
        ("fabric", "lightning", [], ["--devices=2"]),
        ("hf_trainer", "transformers", [], []),
        ("hf_trainer", "transformers", TORCHRUN, []),
        ("hf_trainer", "transformers", ACCELERATE, []),
    ],
)
def test_an_example_learns(name, package, launcher, options):
    need(package)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / f"examples/{name}.py"), "--epochs=4", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(value) for value in re.findall(r"loss'?:? '?([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] - 0.3, done.stdout
    (accuracy,) = re.findall(r"kNN accuracy ([\d.]+)%", done.stdout)  # of one process alone
    assert float(accuracy) > 85


def test_submitit_starts_a_run_as_the_documents_say(tmp_path, monkeypatch):
    need("submitit")
    submitit = importlib.import_module("submitit")
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python no-run\n(class Training:.*?)```", page, re.DOTALL)
    command = ["train", "amdim", *TINY, "--max-steps=3", f"--out={tmp_path / 'run'}"]
    snippet, replaced = re.subn(r"main\(\[.*?\]\)", lambda _: f"main({command})", snippet)
    assert replaced == 1
    space: dict[str, Any] = {"submitit": submitit, "__name__": "__main__"}  # so that the class travels with the job
    exec(snippet, space)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    executor = submitit.LocalExecutor(folder=tmp_path / "jobs")
    executor.update_parameters(timeout_min=5)
    assert executor.submit(space["Training"]()).result() == 0
    assert checkpoint.newest(tmp_path / "run").name == "step_00000003"


def test_weights_and_biases_takes_a_run_offline(tmp_path, monkeypatch, caplog):
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer(tmp_path / "a", "--max-steps=4", "--run.wandb=mine").run()
    time.sleep(1.1)  # W&B calls its folders by the second
    resumed(tmp_path / "a", "--max-steps=8").run()
    assert "W&B" not in caplog.text  # which would say what it could not take
    wanted, deadline = ((tmp_path / "a" / "wandb_id").read_bytes(), b"nce_minus_chance"), time.monotonic() + 60
    while True:  # its own process writes, after the run has ended too
        kept = [path.read_bytes() for path in (tmp_path / "a" / "wandb").glob("offline-run-*/*.wandb")]
        if len(kept) == 2 and all(words in content for content in kept for words in wanted):
            break
        assert time.monotonic() < deadline, [len(content) for content in kept]
        time.sleep(0.2)
