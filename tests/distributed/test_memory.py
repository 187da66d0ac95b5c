"""Peak memory of a process among four: its own workspace beside what it must hold, and none that grows in a ring."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import pytest
import torch

from fused_nce import amdim_nce, workspace_bytes
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.distributed import Processes
from fused_nce.measure import reset_peak, status_bytes

from .launch import run

N, N_C, D = 512, 25, 64  # of a process
KEYS_BYTES = 4 * N * N_C * D
M_MMAP_THRESHOLD = -3  # glibc's
SLACK = 3 << 20  # what BLAS, the allocator and gloo keep

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to reset a high-water mark"
    ),
]


def peak(rank: int, ring: bool) -> tuple[int, int]:
    """Above the inputs of a loss: until it has made its gradients, and with the backward."""

    def once(n: int) -> tuple[int, int]:
        a, c = torch.randn(n, D).requires_grad_(), torch.randn(n, N_C, D).requires_grad_()
        reset_peak()
        before = status_bytes("VmRSS")
        loss = amdim_nce(a, c, group=Processes(ring=ring), backend="cpu").loss
        made = status_bytes("VmHWM")
        loss.backward()
        return made - before, status_bytes("VmHWM") - before

    # What is freed goes back at once: pages of a fragmented heap are the allocator's.
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 18)
    once(8)
    once(8)
    return once(N)


@pytest.fixture(scope="module")
def worst(tmp_path_factory: pytest.TempPathFactory):
    """Of the processes, by their number."""

    @functools.cache
    def at(size: int, ring: bool) -> tuple[int, ...]:
        return tuple(map(max, zip(*run(tmp_path_factory.mktemp("peak"), size, peak, ring), strict=True)))

    return at


OWN = 4 * N * D + KEYS_BYTES + 4 * N * N_C + 4 * 6 * N  # gradients, positives, statistics
SPEC = Spec(Block(N_C), TanhClip(20.0))


def test_gathered_keys_and_their_gradients_are_all_that_grows(worst):
    size = 4
    formula = workspace_bytes(SPEC, N, size * N * N_C, D, torch.float32, backend="cpu")
    assert formula <= 16 << 20
    assert 4 * N * size * N * N_C > 4 * (formula + SLACK)  # a score tensor would be seen
    made, whole = worst(size, False)
    assert made <= OWN + 2 * size * KEYS_BYTES + formula + SLACK
    # On its way home a gradient is in gloo's reduce-scatter once more.
    assert whole <= OWN + 3 * size * KEYS_BYTES + formula + SLACK


def test_a_ring_takes_no_more_among_four_than_among_three(worst):
    four, three = worst(4, True), worst(3, True)
    assert four[1] <= three[1] + SLACK
    # Two blocks and two accumulators on the wire, and a step's own gradients beside the sums.
    formula = workspace_bytes(SPEC, N, N * N_C, D, torch.float32, backend="cpu")
    assert four[1] <= 2 * OWN + 4 * KEYS_BYTES + formula + SLACK
