"""The same bits: run after run, from a graph, on another stream, on another device; and no waiting for the device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from tests.gpu.conftest import Place, repeats, require
from tests.gpu.problems import SCALE, SHAPES, features, step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def count_changes(place, shape, dtype, count):
    """How many of `count` runs gave other bits than the first; counted on the device, read once."""
    q, k = features(shape, place.device, dtype)
    first = step(q, k, shape[1], place)
    changed = torch.zeros((), dtype=torch.int64, device=place.device)
    for _ in range(count):
        again = step(q, k, shape[1], place)
        changed += torch.stack([(a != b).any() for a, b in zip(first, again, strict=True)]).any()
    return int(changed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_equal(place, dtype):
    require(place, dtype)
    assert count_changes(place, (129, 5, 257), dtype, repeats(place, on_cpu=5, on_gpu=50)) == 0


@pytest.mark.nightly
@pytest.mark.parametrize("shape", SHAPES)
def test_a_thousand_runs_are_equal(kernels, shape):
    assert count_changes(kernels, shape, torch.bfloat16, repeats(kernels, on_cpu=20, on_gpu=1000)) == 0


# ---- graphs -----------------------------------------------------------------------------------------------------


def record(device, function):
    """(outputs, replay): a CUDA graph of a function, or what a CPU has for one, a call that writes the same tensors."""
    if device == "cpu":
        outputs = function()

        def rerun():
            for out, new in zip(outputs, function(), strict=True):
                out.copy_(new)

        return outputs, rerun
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return outputs, graph.replay


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_a_replayed_graph_writes_every_output(kernels, shape, dtype):
    """New inputs in the old memory, outputs poisoned: what the replay does not write stays NaN."""
    require(kernels, dtype)
    q, k = features(shape, kernels.device, dtype)
    outputs, replay = record(kernels.device, lambda: step(q, k, shape[1], kernels))
    for seed in (1, 2):
        for old, new in zip((q, k), features(shape, kernels.device, dtype, seed), strict=True):
            old.data.copy_(new.detach())
        for out in outputs:
            out.fill_(float("nan"))
        replay()
        assert all_equal(outputs, step(q, k, shape[1], kernels))


# ---- streams and devices ----------------------------------------------------------------------------------------


def test_a_side_stream(kernels):
    """Inputs that are still being made on the stream of the call, while the default stream reuses freed memory."""
    shape = (129, 5, 257)
    q, k = features(shape, kernels.device)
    expected = step(q, k, shape[1], kernels)
    if kernels.device == "cpu":
        assert all_equal(expected, step(q, k, shape[1], kernels))
        return
    side = torch.cuda.Stream()
    for _ in range(20):
        late_q, late_k = (torch.full_like(x, float("nan")).requires_grad_() for x in (q, k))
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(2_000_000)
            for x, source in ((late_q, q), (late_k, k)):
                x.data.copy_(source.detach())
            found = step(late_q, late_k, shape[1], kernels)
        torch.empty(1 << 22, device="cuda").fill_(float("nan"))  # what a workspace on the wrong stream would meet
        torch.cuda.current_stream().wait_stream(side)
        assert all_equal(expected, found)
        for x in (late_q, late_k, *found):
            x.record_stream(torch.cuda.current_stream())


def test_a_device_that_is_not_the_current_one(kernels):
    other = kernels.device
    if kernels.device == "cuda":
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device alone")
        other = "cuda:1"
    shape = (64, 16, 64)
    expected = step(*features(shape, kernels.device), shape[1], kernels)
    found = step(*features(shape, other), shape[1], Place(other, kernels.backend))
    for a, b in zip(expected, found, strict=True):
        assert b.device == torch.device(other)
        torch.testing.assert_close(a, b.to(a.device))


@contextmanager
def waiting_is_an_error(device):
    """Whatever makes the host wait for the GPU raises."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scale", ["number", "tensor"])
def test_the_host_never_waits(kernels, scale):
    q, k = features((64, 16, 64), kernels.device)
    factor = SCALE if scale == "number" else torch.tensor(SCALE, device=kernels.device).requires_grad_()
    step(q, k, 16, kernels, factor)  # compiles what there is to compile
    with waiting_is_an_error(kernels.device):
        found = step(q, k, 16, kernels, factor)
    assert all(bool(torch.isfinite(x).all()) for x in found)
