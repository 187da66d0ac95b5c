"""Where an update's time goes: its parts, the operators in them, and a trace for Perfetto."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, record_function

TRACE_NAME = "trace.json.gz"
BEFORE, WARM, UPDATES = 4, 2, 10  # updates that are not recorded, recorded and thrown away, and counted
OPERATORS = 12  # lines of the table
PREFIX = "update: "
# In the order of an update; `rest` is what lies between them: the log, the progress bar, agreeing with other processes.
PARTS = ("data", "views", "encoder", "probes", "loss", "backward", "checks", "optimizer", "rest")


class part(record_function):
    """A part of an update, of `PARTS`; costs microseconds where nobody profiles.

    On a GPU that is profiled it ends when its kernels have: autograd launches them from a thread of its own, and the
    profiler does not count those as the part's.
    """

    on_gpu = False

    def __init__(self, name: str) -> None:
        super().__init__(PREFIX + name)

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if part.on_gpu:
            torch.cuda.synchronize()
        super().__exit__(kind, value, traceback)


class Row(NamedTuple):
    """A line of a table."""

    name: str
    ms: float  # an update, without the rows inside it
    share: float  # of the update


class Profile:
    """Records `UPDATES` updates of a run, as a context manager around its loop; `step` ends each.

    Args:
        run_dir: folder of the run, which gets the trace.
        device: that the run trains on.
    """

    count = BEFORE + WARM + UPDATES  # updates that it needs

    def __init__(self, run_dir: Path, device: torch.device) -> None:
        self.path, self.on_gpu = run_dir / TRACE_NAME, device.type == "cuda"
        self.parts: list[Row] = []
        self.operators: list[Row] = []
        self.seen = 0
        gpu = [ProfilerActivity.CUDA] if self.on_gpu else []
        self._profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *gpu],
            schedule=torch.profiler.schedule(wait=BEFORE, warmup=WARM, active=UPDATES, repeat=1),
            on_trace_ready=self._read,
        )

    def __enter__(self) -> Profile:
        part.on_gpu = self.on_gpu
        self._profiler.start()
        self._update = part("rest").__enter__()
        return self

    def step(self) -> None:
        """After each update."""
        self._update.__exit__(None, None, None)
        self._profiler.step()
        self.seen += 1
        self._update = part("rest").__enter__()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._update.__exit__(kind, value, tb)
        if kind is not None:
            self._profiler.on_trace_ready = None  # of an update that is not whole  # fault: profile-hides-error
        self._profiler.stop()
        part.on_gpu = False

    def _read(self, profiler: Any) -> None:
        profiler.export_chrome_trace(str(self.path))
        events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
        spans = [event for event in events if event.name.startswith(PREFIX)]
        own = dict.fromkeys(PARTS, 0.0)
        for event, us in zip(spans, _own(spans), strict=True):
            own[event.name.removeprefix(PREFIX)] += us
        total = sum(own.values())
        self.parts = [Row(name, us / UPDATES / 1e3, us / total) for name, us in own.items()]
        averages = [
            a
            for a in profiler.key_averages()
            if a.device_type == torch.autograd.DeviceType.CPU and not a.key.startswith((PREFIX, "ProfilerStep"))
        ]
        times = {a.key: a.self_device_time_total if self.on_gpu else a.self_cpu_time_total for a in averages}
        slowest = sorted(times, key=times.__getitem__, reverse=True)[:OPERATORS]
        self.operators = [Row(name, times[name] / UPDATES / 1e3, times[name] / total) for name in slowest]

    def table(self) -> str:
        """Both tables, for a terminal."""
        if not self.parts:
            return f"profile: no table, it takes {self.count} updates, got {self.seen}"
        heads = ("part of an update (wall time)", f"operator, itself ({'GPU' if self.on_gpu else 'wall'} time)")
        lines = [
            line for head, rows in zip(heads, (self.parts, self.operators), strict=True) for line in _lines(head, rows)
        ]
        return "\n".join(
            [*lines, f"mean of {UPDATES} updates; the trace is in {self.path} (open it in ui.perfetto.dev)"]
        )


def _lines(head: str, rows: Sequence[Row]) -> list[str]:
    table = [f"{head:48}{'ms':>10}{'share':>9}"]
    return [*table, *(f"{row.name[:47]:48}{row.ms:10.2f}{row.share:9.1%}" for row in rows), ""]


def _own(spans: Sequence[Any]) -> list[float]:
    """The time of each span of one thread without those inside it, µs."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i].time_range.start, -spans[i].time_range.end))
    own, open_spans = [0.0] * len(spans), list[int]()
    for i in order:
        span = spans[i]
        own[i] = span.time_range.elapsed_us()
        while open_spans and spans[open_spans[-1]].time_range.end <= span.time_range.start:
            open_spans.pop()
        if open_spans:
            own[open_spans[-1]] -= own[i]
        open_spans.append(i)
    return own
