"""Two processes, and what they need to know of the model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.marks import nightly_but
from tests.train.pictures import write_images
from tests.train.runs import TINY, assert_the_same, differing, log, resumed, tensors, trainer


@pytest.mark.parametrize("pairs", nightly_but(["1>5,1>7,5>5", "1>5"], ["1>5,1>7,5>5", "1>5", "7>7", "5>7", "1>1"]))
def test_ddp_is_told_of_unused_parameters_exactly_where_there_are_some(tmp_path, pairs):
    run = trainer(tmp_path / "a", f"--loss.pairs=[{pairs}]")
    images, labels, _ = next(run.loader.batches(0))
    run.module(run.views(images), labels)[0].backward()
    unused = [name for name, p in run.module.named_parameters() if p.grad is None]
    assert run.config.leaves_some_unused() == bool(unused)
    assert run.accelerator.ddp_handler.find_unused_parameters == bool(unused)


@pytest.mark.parametrize("minutes", [10, 45.0])
def test_the_processes_wait_for_each_other_as_long_as_is_asked_for(tmp_path, minutes):
    """accelerate takes 10 minutes sharp for no wish, and gloo then waits for 30."""
    handler = trainer(tmp_path / "a", f"--run.timeout_minutes={minutes}").accelerator.init_handler
    assert handler.to_kwargs()["timeout"].total_seconds() == pytest.approx(60 * minutes)


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
CLI = ["-m", "fused_nce.cli"]


def distributed(*argv, method="amdim"):
    """Two processes on this machine, over gloo."""
    done = subprocess.run(
        [*LAUNCH, *CLI, "train", method, *map(str, argv)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.nightly  # launches ten processes; beside a second test worker one once aborted at exit
def test_two_processes_train_and_resume_exactly_and_one_takes_their_images(tmp_path):
    for out, first in (("a", "6"), ("b", "3")):
        status, printed = distributed(*TINY, f"--out={tmp_path / out}", f"--max-steps={first}")
        assert status == 0, printed
    status, printed = distributed(f"--resume={tmp_path / 'b'}", "--max-steps=6")
    assert status == 0, printed
    assert_the_same(tmp_path / "b", tmp_path / "a", 6)
    assert resumed(tmp_path / "a").config.optim.batch_size == 16


@pytest.mark.nightly
@pytest.mark.parametrize("pairs", ["1>5", "7>7"])
def test_two_processes_train_pairs_that_leave_a_head_unused(tmp_path, pairs):
    status, printed = distributed(*TINY, f"--loss.pairs=[{pairs}]", f"--out={tmp_path / 'a'}", "--max-steps=4")
    assert status == 0, printed
    assert log(tmp_path / "a")[-1]["step"] == 4


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["moco", "npid", "simclr"])
def test_two_processes_share_queue_bank_and_keys(tmp_path, method):
    """One model at the end, whichever process saved it; a bank and a queue hold what both encoded."""
    options = ["--preset=digits", "--batch-size=8", "--run.log_every=2", "--max-steps=2"]
    options += ["--model.splits=1", "--model.queue_size=40"] if method == "moco" else []
    for out in ("a", "b"):
        status, printed = distributed(*options, f"--out={tmp_path / out}", method=method)
        assert status == 0, printed
    ours, again = tensors(tmp_path / "a", 2), tensors(tmp_path / "b", 2)
    assert [k for k in ours if not torch.equal(ours[k], again[k])] == []
    if method == "moco":
        assert int(ours["model/queue.fill"]) == 32
        assert ours["model/queue.keys"][:32].unique(dim=0).shape[0] == 32
    if method == "npid":
        norms = ours["model/bank.vectors"].norm(dim=1)
        assert int(torch.isclose(norms, torch.ones(()), atol=1e-5).sum()) == 32


@pytest.mark.nightly
def test_two_processes_cache_more_negatives_and_one_speaks(tmp_path):
    options = [*TINY, "--negatives=32", "--checkpoint-activations=true", "--scale.ring=true", "--max-steps=4"]
    status, printed = distributed(*options, f"--out={tmp_path / 'a'}")
    assert status == 0, printed
    assert printed.count("finished at step 4") == printed.count("AMDIM on digits") == 1
    assert log(tmp_path / "a")[-1]["step"] == 4


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc to find a process to kill")
def test_torchrun_replaces_a_killed_process_and_the_run_goes_on_exactly(tmp_path):
    out, steps = tmp_path / "a", 40
    command = [*TINY, f"--max-steps={steps}", "--run.save_minutes=0.01"]
    # Without it torchrun hands the new processes the store of the dead ones, addresses and all.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launched = subprocess.Popen(
        [*LAUNCH, "--max-restarts=1", *CLI, "train", "amdim", *command, f"--out={out}"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step_*")):
        assert time.monotonic() < deadline
        assert launched.poll() is None, launched.communicate()[0]
        time.sleep(0.1)
    children = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    printed = launched.communicate(timeout=240)[0]
    assert launched.returncode == 0, printed
    assert "resumed from" in printed
    assert distributed(*command, f"--out={tmp_path / 'b'}")[0] == 0
    assert_the_same(out, tmp_path / "b", steps)


@pytest.mark.nightly
def test_accelerate_launches_as_torchrun_does(tmp_path):
    """`--multi_gpu` is its word for several processes by torchrun; `--cpu` takes MPI."""
    words = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, "--main_process_port=0", *CLI]
    options = [*TINY, "--max-steps=4"]
    done = subprocess.run(
        [*command, "train", "amdim", *options, f"--out={tmp_path / 'a'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished at step 4") == 1
    assert distributed(*options, f"--out={tmp_path / 'b'}")[0] == 0
    assert differing(tensors(tmp_path / "a", 4), tensors(tmp_path / "b", 4)) == []


OTHER = """
import os, sys
from fused_nce import cli
from fused_nce.train.machine import host
rank = int(os.environ["RANK"])
if {unlike_hosts}:
    host.use_bf16 = lambda precision, device: precision == "auto" and rank == 0
sys.exit(cli.main(["train", "amdim", *sys.argv[1:], f"--optim.lr=0.00{{1 if {unlike_hosts} else rank + 1}}"]))
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("unlike_hosts", "said"), [(False, "optim.lr: 0.00"), (True, "precision: ")])
def test_processes_that_were_started_with_other_settings_say_so(tmp_path, unlike_hosts, said):
    """Or on hosts of which one alone has bfloat16, where "auto" would train in two precisions."""
    (tmp_path / "other.py").write_text(OTHER.format(unlike_hosts=unlike_hosts))
    done = subprocess.run(
        [*LAUNCH, str(tmp_path / "other.py"), *TINY, "--max-steps=2", f"--out={tmp_path / 'a'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert f"processes: differ in their settings, {said}" in done.stderr
    assert not (tmp_path / "a").exists()


DEAD_READER = """
import multiprocessing, os, signal, sys
from pathlib import Path
from fused_nce import cli
from fused_nce.train.loop import Trainer
real, rank = Trainer._passes, os.environ["RANK"]

def passes(self, batches):
    if self.step == 3 and rank == "1":
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
    return real(self, batches)

Trainer._passes = passes
status = cli.main(["train", "amdim", *sys.argv[2:]])
Path(sys.argv[1], rank).write_text(str(status))
sys.exit(status)
"""


@pytest.mark.nightly
def test_a_reader_of_one_process_that_dies_ends_all_with_the_run_saved(tmp_path):
    write_images(tmp_path / "images", 40)
    (tmp_path / "dead.py").write_text(DEAD_READER)
    options = [*TINY, f"--data={tmp_path / 'images'}", "--augment.geometry=crop", "--run.workers=1"]
    options += ["--optim.accumulate=2", "--max-steps=5"]
    started = time.monotonic()
    done = subprocess.run(
        [*LAUNCH, str(tmp_path / "dead.py"), str(tmp_path), *options, f"--out={tmp_path / 'a'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"], done.stderr
    for words in (
        "data: a process that reads",
        "data: another process cannot read",
        "ends the run at step 3, which is",
    ):
        assert words in done.stderr
    assert "a bug of fused_nce" not in done.stderr
    assert time.monotonic() - started < 200  # not the reader's time limit
    assert distributed(f"--resume={tmp_path / 'a'}", "--max-steps=5")[0] == 0
    assert distributed(*options, f"--out={tmp_path / 'b'}")[0] == 0
    assert differing(tensors(tmp_path / "a", 5), tensors(tmp_path / "b", 5)) == []
