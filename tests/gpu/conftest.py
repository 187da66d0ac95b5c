"""Each device with each backend that could run there; what cannot is skipped with its reason."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from fused_nce.core import dispatch
from fused_nce.core.spec import Block, Spec, TanhClip

HOME = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # backends whose kernels are for one kind of device
WHOLE = ("reference",)  # holds all scores, and is not made for a graph


class Place(NamedTuple):
    """Where a test runs."""

    device: str
    backend: str


PLACES = [Place(d, name) for d in ("cpu", "cuda") for name in dispatch.BACKENDS if HOME.get(name, d) == d]


def parameters(places: list[Place]) -> list[object]:
    """For `pytest.mark.parametrize`; those on a CUDA device carry the mark `gpu`."""
    return [pytest.param(p, marks=[pytest.mark.gpu] * (p.device == "cuda"), id="-".join(p)) for p in places]


def require(place: Place, dtype: torch.dtype = torch.float32) -> Place:
    """The place, or a skip that says why it is none here."""
    if place.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    x = torch.empty(1, 1, dtype=dtype, device=place.device)
    reason = dispatch.why_not(place.backend, Spec(Block(1), TanhClip(20.0)), x, x)
    if reason is not None:
        pytest.skip(f"{place.backend} on {place.device}: {reason}")
    return place


@pytest.fixture(params=parameters(PLACES))
def place(request: pytest.FixtureRequest) -> Place:
    """Every device × backend."""
    return require(request.param)


@pytest.fixture(params=parameters([p for p in PLACES if p.backend not in WHOLE or p.device == "cpu"]))
def kernels(request: pytest.FixtureRequest) -> Place:
    """The same without the oracle on a GPU: what must neither wait for the device nor resist a graph."""
    return require(request.param)


def repeats(place: Place, on_cpu: int, on_gpu: int) -> int:
    """A GPU is where the many are needed."""
    return on_gpu if place.device == "cuda" else on_cpu


def peak_bytes(call: Callable[[], object]) -> int:
    """What a call asks of the CUDA allocator at once beyond what is held: bytes asked for, not whole blocks of them."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    del result
    return int(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
