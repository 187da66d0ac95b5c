"""The clocks of CUDA events, over a make-believe GPU (how it spins, when it takes a sample again), and of a call."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bench import call
from bench.host import ROOT
from fused_nce.bench import timers
from fused_nce.bench.timers import DeviceTimer, synchronized_wall_ms

CYCLES_PER_MS = 2_000_000


class FakeGpu:
    """Spins are noted, not waited for; every pair of events lies as far apart as the last spin, or 7 ms."""

    def __init__(self) -> None:
        self.spins_ms: list[float] = []
        self.synchronized = 0
        self.now_s = 0.0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                pass

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 10.0 if len(gpu.spins_ms) <= 3 else 7.0  # three calibrations of 20 M cycles

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.spins_ms.append(cycles / CYCLES_PER_MS))
        monkeypatch.setattr(torch.cuda, "synchronize", self._synchronize)
        monkeypatch.setattr(timers, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def _synchronize(self) -> None:
        self.synchronized += 1


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    fake.install(monkeypatch)
    return fake


def test_a_slow_host_is_given_a_longer_spin_and_timed_again(gpu):
    timer = DeviceTimer()
    assert gpu.spins_ms == [10.0] * 3
    calls: list[None] = []

    def slow_to_launch():
        calls.append(None)
        gpu.now_s += 0.004

    assert timer(slow_to_launch) == 7.0
    assert len(calls) == 2  # the first spin of 0.05 ms was over before the launches were
    assert gpu.spins_ms[3] == pytest.approx(timer.MARGIN_MS)
    assert gpu.spins_ms[4] == pytest.approx(1.5 * 4 + timer.MARGIN_MS)
    timer(slow_to_launch)
    assert len(calls) == 3  # it remembers


def test_a_call_that_waits_for_the_device_is_timed_with_its_gaps(gpu):
    timer = DeviceTimer()
    calls: list[None] = []

    def waits():
        calls.append(None)
        gpu.now_s += 2e-3 * gpu.spins_ms[-1]

    timer.LONGEST_SPIN_MS = 3.0
    assert timer(waits) == 7.0
    assert len(calls) == timer.ATTEMPTS
    assert max(gpu.spins_ms[3:]) <= 3.0 + 1e-6
    assert timer(waits) == 7.0  # asked once now, behind a spin that fills the queue
    assert len(calls) == timer.ATTEMPTS + 1
    assert gpu.spins_ms[-1] <= timer.QUEUE_MS


def test_wall_time_waits_before_and_after(gpu):
    def call():
        gpu.now_s += 0.002

    assert synchronized_wall_ms(call) == pytest.approx(2)
    assert gpu.synchronized == 2


def test_small_calls_are_timed_beside_another_build(tmp_path):
    assert call.block(tmp_path).startswith("No record is committed yet")
    record = call.main(["--rows", "2", "--against", str(ROOT), "--out", str(tmp_path / "call-a.json")])
    assert [row["loss"] for row in record["calls"]] == list(call.LOSSES)
    assert all(row["ours_us"] > 0 and row["other_us"] > 0 for row in record["calls"])
    record["host"]["cpu_model"], record["against"] = "A CPU", 40 * "a"
    record["calls"] = [record["calls"][0] | {"ours_us": 30.0, "eager_us": 60.0, "other_us": 120.0, "python_calls": 40}]
    (tmp_path / "call-a.json").write_text(json.dumps(record))
    (tmp_path / "call-b.json").write_text(json.dumps(record | {"date_utc": "2020-01-01T00:00:00Z", "calls": []}))
    assert "| amdim_nce | 2 | 30 | 60 | 0.50 | 40 | 120 | 0.250 |" in call.block(tmp_path)
    assert "aaaaaaa, µs" in call.block(tmp_path)
