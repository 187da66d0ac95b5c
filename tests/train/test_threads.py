"""`run.threads`: as many as other processes leave cores free, on a machine that is played here."""

import os
from itertools import pairwise

import pytest
import torch

from bench import busy
from fused_nce import cli, measure
from fused_nce.train.machine import threads
from fused_nce.train.machine.threads import LONGEST_S, WAIT_S, Threads, Usage, usage
from tests.train.runs import TINY


class Machine:
    """Cores that are shared fairly among the trainer's threads and endless loops."""

    def __init__(self, patch, cores, most):
        self.cores, self.loops, self.at, self.busy, self.own = cores, 0.0, 100.0, 7.0, 3.0
        patch.setattr(threads.time, "monotonic", lambda: self.at)
        patch.setattr(threads, "usage", lambda: Usage(self.at, self.busy, self.own))
        patch.setattr(measure, "cores", lambda: cores)
        torch.set_num_threads(most)

    def steps(self, seconds, loops, each=0.26):
        """The number of threads of each step meanwhile."""
        found = []
        for _ in range(round(seconds / each)):
            have = torch.get_num_threads()
            share = min(1.0, self.cores / (have + loops))
            self.at += each
            self.busy += each * share * (have + loops)
            self.own += each * share * have
            threads.look()
            found.append(torch.get_num_threads())
        return found


def settled(steps):
    """The last number, which does not flutter for the second half."""
    assert len(set(steps[len(steps) // 2 :])) == 1
    return steps[-1]


@pytest.mark.parametrize(
    ("cores", "most", "loops", "left"),
    # The last one: a thread more than are free takes a sixteenth of each, which is little.
    [(2, 2, 0, 2), (2, 2, 1, 1), (2, 2, 4, 1), (2, 2, 0.3, 2), (16, 16, 1, 15), (16, 16, 8, 8), (16, 8, 1, 8),
     (16, 8, 10, 7)],
)  # fmt: skip
def test_as_many_threads_as_cores_are_free(monkeypatch, caplog, cores, most, loops, left):
    machine = Machine(monkeypatch, cores, most)
    with Threads("auto"):
        assert settled(machine.steps(20, loops)) == left
        assert settled(machine.steps(20, 0)) == most
    assert ("run.threads fixes" in caplog.text) == (left != most)


def test_a_busy_machine_is_seen_at_the_first_look_and_a_burst_changes_nothing(monkeypatch):
    machine = Machine(monkeypatch, 2, 2)
    with Threads("auto"):
        assert machine.steps(1, 1)[1] == 1
        assert machine.steps(WAIT_S, 0)[-1] == 1
        assert machine.steps(1, 0)[-1] == 2
        for _ in range(5):
            assert set(machine.steps(0.52, 1) + machine.steps(3, 0)) == {2}


def test_what_comes_and_goes_changes_the_number_ever_more_rarely(monkeypatch):
    machine = Machine(monkeypatch, 2, 2)
    with Threads("auto"):
        steps = [n for _ in range(300) for n in machine.steps(2, 1) + machine.steps(WAIT_S + 1, 0)]
        assert 2 < sum(a != b for a, b in pairwise(steps)) < 40
        machine.steps(LONGEST_S, 1)
        assert machine.steps(LONGEST_S + 2, 0)[-1] == 2


def test_a_number_is_kept_and_the_one_before_put_back(monkeypatch):
    machine = Machine(monkeypatch, 2, 2)
    with Threads(3):
        with Threads("auto"):
            assert machine.steps(5, 4)[-1] == 1
        assert set(machine.steps(5, 4)) == {3}
    assert torch.get_num_threads() == 2
    with Threads("auto"):
        monkeypatch.setattr(threads, "usage", lambda: None)  # /proc is gone
        assert set(machine.steps(5, 4)) == {2}
    torch.set_num_threads(1)
    with Threads("auto"):
        assert set(machine.steps(5, 4)) == {1}


def test_under_a_quota_of_time_the_hosts_cores_say_nothing(tmp_path, monkeypatch):
    quota = tmp_path / "cpu.max"
    for text, cores in (
        ("50000 100000\n", 1),
        ("max 100000\n", measure.affinity()),
        ("9900000 100000\n", measure.affinity()),
    ):
        quota.write_text(text)
        assert measure.cores(quota) == cores
    monkeypatch.setattr(measure, "cores", lambda: 1)
    monkeypatch.setattr(measure, "affinity", lambda: 2)
    torch.set_num_threads(2)
    assert Threads("auto").seen is None


def test_what_linux_says(tmp_path):
    pid, core = os.getpid(), min(os.sched_getaffinity(0))
    (tmp_path / "stat").write_text(
        f"cpu  9 9 9 9 9 9 9 9 9 9\ncpu{core} 100 20 3 4000 5000 600 70 8 0 0\ncpu999 1 1 1 1\nx 1\n"
    )
    below = {str(pid): "77 78 ", "77": "79", "79": ""}  # a fork server's child is a child; 78 has ended meanwhile
    for (name, children), ticks in zip(below.items(), ("30 12 5 3", "1 2 0 0", "4 0 0 0"), strict=True):
        (tmp_path / name / "task" / name).mkdir(parents=True)
        (tmp_path / name / "task" / name / "children").write_text(children)
        (tmp_path / name / "stat").write_text(f"{name} (a) b (c) S 1 1 1 1 1 1 1 1 1 1 {ticks} 20 0 9 0\n")
    tick = os.sysconf("SC_CLK_TCK")
    seen = usage(tmp_path)
    assert seen is not None
    assert seen[1:] == (801 / tick, 57 / tick)
    (tmp_path / "stat").unlink()
    assert usage(tmp_path) is None
    seen = usage()
    assert seen is None or seen.busy >= seen.own > 0


@pytest.mark.parametrize("setting", ["auto", "1"])
def test_a_run_and_its_evaluation_heed_their_neighbours(tmp_path, monkeypatch, capsys, setting):
    torch.set_num_threads(2)
    seen, at = [], [0.0]

    def read():
        at[0] += 1.0
        seen.append(torch.get_num_threads())
        return Usage(at[0] - 1e6, 2 * at[0], 0.0)

    monkeypatch.setattr(threads, "usage", read)
    out = f"--out={tmp_path / 'run'}"
    assert cli.main(["train", "amdim", *TINY, f"--run.threads={setting}", "--max-steps=2", out]) == 0
    assert torch.get_num_threads() == 2
    assert cli.main(["eval", str(tmp_path / "run"), "--protocols=knn", "--baselines=false", "--cost=false"]) == 0
    assert seen[-1:] == ([1] if setting == "auto" else [])
    assert torch.get_num_threads() == 2
    refused = ["train", "amdim", *TINY, f"--out={tmp_path / 'b'}", "--run.threads"]
    need = "auto or a whole number in [1, 1024]"
    for value, words in (("0", need), ("1025", need), ("many", need[:22]), ("1.5", need[:22])):
        assert cli.main([*refused, value]) == 2
        assert f"run.threads: must be {words}, got {value}\n" in capsys.readouterr().err


@pytest.mark.nightly
def test_the_busy_bench_measures_steps(capsys, monkeypatch):
    monkeypatch.setattr(busy, "CORES", 1)
    monkeypatch.setattr(busy, "WAYS", {"ours": "auto", "1 thread": "1"})
    options = ["--loops", "0", "1", "--steps", "2", "--rounds", "1", "--batch-size", "8"]
    assert busy.main(options) in (0, 1)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 0", "| 1"))]
    assert [row.split("|")[1].strip() for row in rows] == ["0", "1"]
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split("|")[1:])


def test_no_loop_of_the_busy_bench_is_left():
    with busy.busy(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
    assert all(loop.poll() is not None for loop in loops)
