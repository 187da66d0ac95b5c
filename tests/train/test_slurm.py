"""SLURM's tasks as processes of a run, and a preempted job that goes on by itself; `srun` and `scontrol` are played."""

import logging
import os
import signal
import socket
import subprocess
import sys

import pytest

from fused_nce.train import command
from fused_nce.train.loop import Trainer
from fused_nce.train.machine import slurm
from fused_nce.train.machine.interrupt import Interrupt
from tests.train.runs import TINY, log, resumed, trainer

STEP = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[007,009]",
    "SLURM_JOB_ID": "4000123",
    "SLURM_STEP_ID": "0",
}


def joined(devices=0, **changed):
    found = {key: value for key, value in {**STEP, **changed}.items() if value is not None}
    slurm.join(found, devices)
    return {key: found.get(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}


def test_a_task_of_a_step_knows_its_place():
    place = {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu007"}
    assert joined() == joined(devices=8) == place
    assert joined(devices=1) == place | {"LOCAL_RANK": "0"}  # each task has a GPU of its own
    assert joined(SLURM_STEP_TASKS_PER_NODE="9,7", SLURM_NODEID="1") == place | {"LOCAL_WORLD_SIZE": "7"}
    assert joined(FUSED_NCE_SLURM="0") == dict.fromkeys(place)
    assert joined(MASTER_ADDR="other") == place | {"MASTER_ADDR": "other"}
    outside = dict.fromkeys(place)
    assert joined(SLURM_STEP_NUM_TASKS=None) == joined(SLURM_STEP_NUM_TASKS="1") == outside  # the batch script itself
    assert joined(RANK="0") == outside | {"RANK": "0"}  # torchrun came first
    ports = []
    for rank, step in (("0", "0"), ("11", "0"), ("0", "1")):
        found = STEP | {"SLURM_PROCID": rank, "SLURM_STEP_ID": step}
        slurm.join(found, 0)
        ports.append(found["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


def test_tasks_that_are_runs_of_their_own_are_not_joined_by_mpi(monkeypatch):
    """`srun --mpi=pmi2` names every task; accelerate would go by that. What mpirun started stays one run."""
    left = {"FUSED_NCE_SLURM": "0", "PMI_RANK": "11", "PMI_SIZE": "16"}
    for step, kept in ((STEP, False), (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, True), ({}, True)):
        found = step | left
        assert not slurm.join(found, 0)
        assert ("PMI_RANK" in found, "PMI_SIZE" in found) == (kept, kept)
    for name, value in {**STEP, **left}.items():
        monkeypatch.setenv(name, value)
    slurm.join(devices=0)
    assert command._first_process()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("a-1.b,c", "a-1.b"),
        ("n[1-2]-ib", "n1-ib"),
        ("rack[1-2]n[03-04]", "rack1n03"),
        ("node7", "node7"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert slurm.first_host(nodes) == first


def test_what_is_not_slurms_is_refused():
    with pytest.raises(ValueError, match=r"^SLURM_PROCID: got None, need a number, as srun sets it$"):
        joined(SLURM_PROCID=None)
    with pytest.raises(ValueError, match=r"^SLURM_LOCALID: got 'x', need a number"):
        joined(SLURM_LOCALID="x")
    with pytest.raises(ValueError, match=r"^SLURM_STEP_TASKS_PER_NODE: got '8x2', need counts, such as 8\(x2\),4"):
        joined(SLURM_STEP_TASKS_PER_NODE="8x2")
    with pytest.raises(ValueError, match=r"^SLURM_STEP_NODELIST: got '\[1-2\]', need a list of hosts"):
        joined(SLURM_STEP_NODELIST="[1-2]")


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A command that writes down what it is asked; its exit status is that of the file `status`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\necho no such job >&2\nexit $(cat {folder}/status)\n'
    )
    (folder / "scontrol").chmod(0o755)
    (folder / "status").write_text("0")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return folder


@pytest.mark.parametrize("way", ["SIGUSR1", "SIGUSR2"])
def test_a_preempted_job_is_saved_queued_and_goes_on_by_the_same_command(tmp_path, monkeypatch, scontrol, caplog, way):
    argv = [*TINY, f"--out={tmp_path / 'a'}", "--max-steps=9"]
    own = Trainer._update

    def signalled(self, *given):
        if self.step == 2 and "SLURM_RESTART_COUNT" not in os.environ:
            signal.raise_signal(getattr(signal, way))
        return own(self, *given)

    monkeypatch.setattr(Trainer, "_update", signalled)
    with caplog.at_level(logging.INFO):
        assert command.main(["amdim", *argv]) == 0
    assert (scontrol / "asked").read_text() == "requeue 77\n"
    assert "SLURM: job 77 is queued again" in caplog.text
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert command.main(["amdim", *argv]) == 0
    assert resumed(tmp_path / "a").step == 9
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # another job, queued again too, does not take the folder for its own
    with pytest.raises(ValueError, match="holds a run already"):
        command.parse("amdim", argv)
    assert (scontrol / "asked").read_text() == "requeue 77\n"


def test_a_job_that_cannot_be_queued_says_so(scontrol, caplog, monkeypatch):
    (scontrol / "status").write_text("1")
    slurm.queue_again(signal.SIGUSR1, first=True)
    assert "SLURM: job 77 is not queued again (no such job); --resume goes on by hand" in caplog.text
    slurm.queue_again(signal.SIGUSR1, first=False)
    monkeypatch.delenv("SLURM_JOB_ID")
    slurm.queue_again(None, first=True)
    assert (scontrol / "asked").read_text() == "requeue 77\n"


def test_a_handler_that_stood_before_queues_the_job_itself(tmp_path, scontrol):
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append("submitit"))
    try:
        run = trainer(tmp_path / "a", "--max-steps=9")
        update = run._update

        def signalled(*given):
            signal.raise_signal(signal.SIGUSR2)
            return update(*given)

        run._update = signalled
        assert (run.run(), run.preempted, heard) == ("interrupted", True, [])
        slurm.queue_again(run.interrupt.preempted, first=True)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == ["submitit"]
    assert not (scontrol / "asked").exists()


def test_outside_of_a_job_its_signals_are_somebody_elses(tmp_path, monkeypatch):
    """A user's handler, for dumping stacks say, stands; one set in C, which could not be set back, does everywhere."""
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("user"))
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGUSR1)
        assert (interrupt.requested, heard) == (False, ["user"])
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setattr(signal, "getsignal", lambda number: None)
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGUSR1)
        assert (interrupt.requested, heard) == (False, ["user", "user"])
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.nightly  # launches two processes
@pytest.mark.parametrize("how", ["srun", "mpirun"])
def test_two_tasks_train_as_one_run(tmp_path, how):
    """As `srun --ntasks=2 fused-nce train …` starts them, or `mpirun`, which is `accelerate launch --cpu`'s way."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names, step = {
        "srun": (("SLURM_PROCID", "SLURM_LOCALID"), {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "5"}),
        "mpirun": (
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        ),
    }[how]
    step |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    line = [sys.executable, "-m", "fused_nce.cli", "train", "amdim", *TINY, f"--out={tmp_path / 'a'}", "--max-steps=4"]
    tasks = [
        subprocess.Popen(
            line,
            env=os.environ | step | dict.fromkeys(names, rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    printed = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert log(tmp_path / "a")[-1]["step"] == 4
    assert resumed(tmp_path / "a").config.optim.batch_size == 16  # both tasks' images
