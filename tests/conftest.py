"""What every test shares: the seed of the day, the backends that can run here, and the accuracy table at the end."""

from __future__ import annotations

import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fused_nce.core import dispatch
from fused_nce.core.spec import Block, Spec, TanhClip

SEED = "FUSED_NCE_TEST_SEED"
KEPT = (SEED, "FUSED_NCE_BUILD")  # the second says how the package was installed, and steers nothing
QUIET = {name: None for name in os.environ if name.startswith("FUSED_NCE_") and name not in KEPT}


def pytest_configure(config: pytest.Config) -> None:
    """Choose the fresh seed once; test processes inherit it. A user's own settings must not steer the suite."""
    os.environ.setdefault(SEED, str(secrets.randbelow(2**31)))
    for name in QUIET:
        del os.environ[name]


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


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that cannot run here says why."""
    name = str(request.param)
    reason = why_not(name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


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
    """The largest η of the run per dtype and backend: how much of the error budget is used."""
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
