"""The same command once more: after a process, a node or a job was lost, and after none was."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_nce import cli
from fused_nce.train import command
from fused_nce.train.loop import Trainer
from fused_nce.train.machine import torchrun
from fused_nce.train.saving import lock
from tests.train.runs import TINY, log, trainer

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = """
import json, os, sys
from fused_nce.train import command
rank, rounds = int(os.environ["RANK"]), json.loads(sys.argv[1])
for agents, restarts, argv in rounds:
    os.getppid = lambda: agents[rank]
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
    try:
        said = command.parse("amdim", argv)[2]
    except ValueError as error:
        said = str(error)
    print(json.dumps(said))
sys.stdin.read()  # the first process has the store
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def two_nodes(*rounds):
    """What `parse` says to the processes of two nodes, round after round: (agents, restarts, argv)."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "none"}
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        program = [sys.executable, "-c", ROUNDS, json.dumps(rounds)]
        environment = os.environ | rendezvous | place
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(program, env=environment, stdin=pipe, stdout=pipe, text=True))
    try:
        second, first = (process.communicate(timeout=300)[0].splitlines() for process in reversed(started))
    finally:
        for process in started:
            process.kill()
    return [[json.loads(line) for line in lines] for lines in zip(first, second, strict=True)]


def test_a_node_that_joins_or_replaces_another_goes_on_with_all(tmp_path, monkeypatch):
    """Agents 11 and 12 began the run. Whoever was there before knows it, at whatever rank; a later launch does not."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr("os.getppid", lambda: 11)
    trainer(tmp_path / "a", "--max-steps=1").run()
    lock.release(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    options = [*TINY, "--max-steps=1"]
    ours, other = [*options, f"--out={tmp_path / 'a'}"], [*options, f"--out={tmp_path / 'b'}"]
    said = two_nodes(
        ((11, 13), 0, ours),  # a new node
        ((14, 13), 0, [*ours, "--overwrite"]),  # another that gets rank 0, instead of the node that began
        ((15, 14), 0, ours),  # and of the one after it
        ((21, 22), 0, other),  # a launch of the same name, later
        ((21, 22), 1, other),
        ((11, 22), 0, other),  # it was refused, so nobody has a claim any more
    )
    refused = f"out: {tmp_path / 'b'} holds a run already; use --resume {tmp_path / 'b'}, --overwrite, or another --out"
    assert said == [[True, True]] * 3 + [[refused, False]] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing was replaced
    kept = (tmp_path / "a" / torchrun.LAUNCH_NAME).read_text().split("\n")
    assert kept == ["none", *(f"{socket.gethostname()} {agent}" for agent in (14, 15))]


def test_a_launch_that_is_refused_leaves_the_mark_of_another(tmp_path, monkeypatch):
    """Between two attempts of the other nobody holds the folder's lock."""
    for name, status in (("job7", False), ("other", None), ("job7", True)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        if status is None:
            with pytest.raises(ValueError, match="holds a run already"):
                command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}"])
        else:
            settings, folder, resume = command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}", "--max-steps=1"])
            assert resume == status
            Trainer(settings, folder, resume=resume).run()


@pytest.mark.nightly
def test_a_second_agent_joins_a_run_that_trains(tmp_path):
    """torch gives rank 0 to the smaller address: the newcomer's."""
    options = [*TINY, "--max-steps=4000", "--max-minutes=1", "--run.save_minutes=0.01", f"--out={tmp_path / 'a'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-conf=last_call_timeout=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    agents, deadline = [], time.monotonic() + 240
    try:
        for address in ("127.0.0.2", "127.0.0.1"):
            with (tmp_path / address).open("w") as file:
                program = [*launch, f"--local-addr={address}", "-m", "fused_nce.cli", "train", "amdim", *options]
                agents.append(subprocess.Popen(program, env=environment, stdout=file, stderr=file))
            while not list((tmp_path / "a").glob("checkpoints/step_*")):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert [agent.wait(240) for agent in agents] == [0, 0], (tmp_path / "127.0.0.1").read_text()
    finally:
        for agent in agents:
            agent.terminate()
    printed = (tmp_path / "127.0.0.1").read_text()
    assert re.search(r"resumed from .*step_", printed), printed
    assert "reached 1.0 minutes" in printed
    steps = [line["step"] for line in log(tmp_path / "a")]
    assert steps == sorted(set(steps))


def test_one_command_begins_a_run_and_goes_on_with_it(tmp_path, capsys):
    options = [*TINY, f"--out={tmp_path / 'a'}", "--go-on"]
    for steps, said in (("1", "finished at step 1"), ("2", "finished at step 2"), ("2", "nothing left to train")):
        assert cli.main(["train", "amdim", *options, f"--max-steps={steps}"]) == 0
        assert said in capsys.readouterr().out
    assert cli.main(["train", "amdim", *options, "--overwrite"]) == 2
    assert "leave out --overwrite" in capsys.readouterr().err
    assert cli.main(["train", "amdim", *options, "--optim.lr=0.5"]) == 2
    assert "resume: the settings differ" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "a" / "checkpoints")  # as of a run that was killed before its first
    assert cli.main(["train", "amdim", *options, "--optim.lr=0.5"]) == 2
    assert "resume: the settings differ" in capsys.readouterr().err
    assert cli.main(["train", "simclr", "--data=digits", *options[-2:]]) == 2
    assert "is a run of amdim" in capsys.readouterr().err


# --- the lock -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_trained_in_with_a_warning(tmp_path, monkeypatch, caplog, missing):
    def lockf(file, how):
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    run = trainer(tmp_path / "a", "--max-steps=1")
    assert caplog.text.count(f"cannot be locked ({os.strerror(missing)}): only one run may train there") == 1
    lock._held.clear()
    with pytest.raises(ValueError, match="holds a run already"):  # whether it was left behind cannot be known
        trainer(tmp_path / "a", "--max-steps=1")
    assert run.run() == "finished"


@pytest.mark.parametrize("held_s", [1, 1000])
def test_a_run_that_goes_on_waits_for_the_lock_of_a_lost_node(tmp_path, monkeypatch, caplog, held_s):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    trainer(tmp_path / "a", "--max-steps=1").run()
    lock.release(tmp_path / "a")
    clock, real = [0.0], fcntl.lockf

    def lockf(file, how):
        if clock[0] < held_s:
            raise BlockingIOError(errno.EAGAIN, "held")
        return real(file, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(lock.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    same = [*TINY, f"--out={tmp_path / 'a'}", "--max-steps=1"]
    with pytest.raises(ValueError, match="is being trained by another process"):
        command.parse("amdim", [f"--resume={tmp_path / 'a'}"])  # given by hand: at once
    assert clock[0] == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if held_s > lock.LEASE_S:
        with pytest.raises(ValueError, match="is being trained by another process"):
            command.parse("amdim", same)
        assert clock[0] == lock.LEASE_S
    else:
        assert command.parse("amdim", same)[2]
    assert caplog.text.count("waiting, 300 s at most") == 1


# --- torchrun -----------------------------------------------------------------------------------------------------


def test_a_restart_by_torchrun_goes_on_from_the_checkpoint(tmp_path, monkeypatch):
    """The command is the first one once more, with a count of restarts beside it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # several launches may be called so
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}", "--max-steps=2"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    settings, folder, resume = command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}", "--max-steps=2"])
    assert not resume  # lost before its first checkpoint
    Trainer(settings, folder).run()
    again = command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}", "--max-steps=3", "--overwrite"])
    assert again[2]
    assert Trainer(*again[:2], resume=True).step == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # another node was lost, which is not counted here
    assert command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}", "--max-steps=3"])[2]
    # Another launch does not get the run that it found, at no attempt, whatever it is called.
    monkeypatch.setattr("os.getppid", lambda: 1)
    for attempt, launch in (("1", "other"), ("0", "none"), ("1", "none")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with pytest.raises(ValueError, match="holds a run already"):
            command.parse("amdim", [*TINY, f"--out={tmp_path / 'a'}"])
