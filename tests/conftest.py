"""What every test shares: the seed of the day, the backends that can run here, and the accuracy table at the end."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fused_nce import _extension
from fused_nce.backends import cuda
from fused_nce.core import dispatch
from fused_nce.core.spec import Block, Spec, TanhClip

SEED = "FUSED_NCE_TEST_SEED"
KEPT = (SEED, "FUSED_NCE_BUILD")  # the second says how the package was installed, and steers nothing
for setting in [name for name in os.environ if name.startswith("FUSED_NCE_") and name not in KEPT]:
    del os.environ[setting]  # a user's own must not steer the suite
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children
os.environ.setdefault(SEED, str(secrets.randbelow(2**31)))  # once; test processes inherit it


MODULE: Any
MODULE, REASON = _extension.status()
needs_kernels = pytest.mark.skipif(MODULE is None, reason=REASON or "kernels built")


def pytest_report_header() -> str:
    """The seed, to run the same cases again."""
    return f"fuzz: fixed seed and {SEED}={os.environ[SEED]}"


@pytest.fixture
def fresh_seed() -> int:
    """The seed that is new on every run."""
    return int(os.environ[SEED])


def why_not(backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot run AMDIM's spec on this machine's CPU."""
    x = torch.empty(1, 1, dtype=dtype)
    return dispatch.why_not(backend, Spec(Block(1), TanhClip(20.0)), x, x)


ABSENT = {name: reason for name in dispatch.BACKENDS if (reason := why_not(name)) is not None}


@pytest.fixture(params=[name for name in dispatch.BACKENDS if name not in ABSENT])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here; the summary at the end says why the others cannot."""
    return str(request.param)


@pytest.fixture
def play_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as a GPU's for the `cuda` backend, where the kernels are built."""
    if MODULE is not None:
        monkeypatch.setattr(cuda, "why_not", lambda spec, q, k: cuda._unable(MODULE, spec, q, k))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU its tests are left out, as the summary says, rather than skipped one by one."""
    if not torch.cuda.is_available():
        left = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


def pytest_collection() -> None:
    """No search for garbage meanwhile: what is made stays, and looking through it took a fifth of the time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What is there before the first test stays: the many collections of garbage that tests ask for need not see it."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    """A test starts from one random state, whichever ran before it; that and the thread count are then as they were."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture
def record_eta(request: pytest.FixtureRequest) -> Callable[[str, str, dict[str, float]], None]:
    """A function that notes η for the table: backend, dtype, and each result's own, such as {"dq": 0.3}."""

    def record(backend: str, dtype: str, etas: dict[str, float]) -> None:
        request.node.user_properties.append(("eta", (backend, dtype, etas)))

    return record


COLUMNS = ("loss", "nce", "penalty", "pos", "neg_lse", "neg_max", "square", "dq", "dk", "dscale")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What could not run here, and the largest η per dtype and backend: how much of the error budget is used."""
    for name, reason in ABSENT.items():
        terminalreporter.write_line(f"not run here: {name}: {reason}")
    if not torch.cuda.is_available():
        terminalreporter.write_line("not run here: tests marked gpu: torch sees no CUDA device")
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "eta" and getattr(report, "when", "") == "call":
                    backend, dtype, etas = value
                    row = worst[backend, dtype]
                    row |= {key: max(row.get(key, 0.0), eta) for key, eta in etas.items()}
    if not worst:
        return
    terminalreporter.section("largest error / budget")
    terminalreporter.write_line(f"{'backend':14} {'dtype':9} " + " ".join(f"{name:>7}" for name in COLUMNS))
    for (backend, dtype), row in sorted(worst.items()):
        cells = " ".join(f"{row[name]:7.2f}" if name in row else f"{'-':>7}" for name in COLUMNS)
        terminalreporter.write_line(f"{backend:14} {dtype:9} {cells}")
