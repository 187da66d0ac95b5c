"""The plain call as one function of a GPU (`csrc/cuda/whole.cpp`), over the emulation, beside the operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_nce import amdim_nce, clip_loss, cpc_nce, info_nce, last_path, moco_nce, nt_xent
from fused_nce.backends import cuda
from fused_nce.core.engine import loss_of
from fused_nce.losses import NCEOutput, moco
from tests.conftest import MODULE, needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("play_gpu")]
ULPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def count_served(module, monkeypatch):
    """How many calls were: a loss that falls back to the operators would pass every comparison with them."""
    seen, whole = [], module.whole_loss

    def listen(*arguments):
        seen.append(whole(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "whole_loss", listen)
    return lambda: sum(x is not None for x in seen)


@pytest.fixture
def served(monkeypatch):
    return count_served(cuda, monkeypatch)


def draw(seed, *sizes):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) * 1.7


def losses(backend: str) -> dict[str, Any]:
    """A loss of leaves and a 0-d scale, and the leaves' shapes."""
    to: dict[str, Any] = {"backend": backend}
    return {
        "amdim": (lambda a, c, t: amdim_nce(a, c, scale=t, clip=8.0, penalty=0.05, **to), [(9, 24), (9, 5, 24)]),
        "info_nce": (lambda q, k, t: info_nce(q, k, temperature=t, normalize=True, **to), [(11, 20), (11, 20)]),
        "plain": (lambda q, k, t: info_nce(q, k, temperature=t, penalty=0.1, **to), [(11, 20), (11, 20)]),
        "none": (lambda q, k, t: info_nce(q, k, temperature=t, reduction="none", **to), [(11, 20), (11, 20)]),
        "hardness": (lambda q, k, t: info_nce(q, k, temperature=t, normalize=True, hardness=0.7, **to),
                     [(11, 20), (11, 20)]),
        "nt_xent": (lambda a, b, t: nt_xent(a, b, temperature=t, **to), [(7, 33), (7, 33)]),
        "moco": (lambda q, k, t: moco_nce(q, k.detach(), draw(5, 40, 24).to(q.dtype), temperature=t, **to),
                 [(9, 24), (9, 24)]),
        "moco, scale 0": (lambda q, k, t: NCEOutput(*loss_of(
            q, draw(5, 40, 24).to(q.dtype), moco.SPEC, moco.TAIL, scale=t - t.detach(), own_keys=k.detach(),
            normalize=True, parts=False, **to)[:4]), [(9, 24), (9, 24)]),
        "cpc": (lambda p, t, s: cpc_nce(p, t, **to), [(2, 9, 16), (2, 9, 16)]),
        "clip": (lambda a, b, t: clip_loss(a, b, t, **to), [(11, 20), (11, 20)]),
    }  # fmt: skip


LOSSES = losses("cuda")


def leaves_of(name, dtype):
    leaves = [draw(i, *shape).to(dtype).requires_grad_() for i, shape in enumerate(LOSSES[name][1])]
    return [*leaves, torch.tensor(0.4, requires_grad=True)]


def gradients(value, leaves, **options):
    return torch.autograd.grad(value, leaves, allow_unused=True, **options)


def close(found, exact, dtype):
    for x, y in zip(found, exact, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert (x.double() - y.double()).abs().max() <= ULPS[dtype] * (y.double().abs().max() + 1e-3)


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "clip"])  # whose columns are the operators' here
def test_it_is_what_the_operators_are(name, dtype, served, monkeypatch):
    hold_to_the_operators(cuda, name, dtype, served, monkeypatch)


def hold_to_the_operators(module, name, dtype, served, monkeypatch):
    """The loss, its parts and report; gradients of it, of its parts, at several upstreams, of several at once."""
    backend = module.__name__.rpartition(".")[2]
    loss, leaves = losses(backend)[name][0], leaves_of(name, dtype)
    out = loss(*leaves)
    assert served() == (2 if name == "cpc" else 1)
    assert last_path() == (backend, "requested")
    with torch.no_grad():
        silent = loss(*leaves)
    monkeypatch.setattr(module, "whole_loss", None)
    wanted = loss(*leaves)
    for x in (out, silent):
        close([x.loss, x.nce, x.penalty], [wanted.loss, wanted.nce, wanted.penalty], torch.float32)
        for a, b in zip(x.stats.values(), wanted.stats.values(), strict=True):  # differences of larger numbers, some
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert not silent.loss.requires_grad
    exact = gradients(wanted.loss, leaves, retain_graph=True)
    close(gradients(out.loss, leaves, retain_graph=True), exact, dtype)
    if "moco" not in name:  # whose queue may have changed by then
        parts = [x.loss + 2 * x.nce.sum() - 3 * x.penalty for x in (out, wanted)]
        found, exact = (gradients(x, leaves, retain_graph=True) for x in parts)
        close(found, exact, dtype)
    both = torch.tensor([1.0, -2.5])
    several = {"grad_outputs": (both,), "is_grads_batched": True, "retain_graph": True}
    found, exact = (gradients(x.loss, leaves, **several) for x in (out, wanted))
    close(found, exact, dtype)
    close(gradients(-2.5 * out.loss, leaves), gradients(-2.5 * wanted.loss, leaves), dtype)


def test_rows_that_lie_apart_and_rows_without_a_norm():
    """Strided rows, a row of zeros, and one whose norm no float holds, which is NaN and not zeros."""
    q, k = draw(0, 8, 40)[:, ::2], draw(1, 40, 8).T[:, ::2]
    q = q.clone().index_fill_(0, torch.tensor([3]), 0.0).requires_grad_()
    ours, theirs = (info_nce(q, k, normalize=True, backend=name).loss for name in ("cuda", "reference"))
    close([ours, *gradients(ours, [q])], [theirs, *gradients(theirs, [q])], torch.float32)
    with torch.no_grad():
        q[5] = 1e30
        rows = info_nce(q, k, normalize=True, reduction="none", backend="cuda").nce
    assert torch.equal(rows.isnan(), torch.arange(8) == 5)


def test_a_queue_may_change_before_the_backward(served):
    hold_a_queue_that_changes("cuda", served)


def hold_a_queue_that_changes(backend, served):
    """The gradients are those of before."""
    q, k, queue = draw(0, 6, 16).requires_grad_(), draw(1, 6, 16), draw(2, 30, 16)
    (before,) = gradients(moco_nce(q, k, queue, backend=backend).loss, [q])
    out = moco_nce(q, k, queue, backend=backend)
    queue.zero_()
    assert torch.equal(gradients(out.loss, [q])[0], before)
    assert served() == 2
    assert not out.nce.requires_grad
    with pytest.raises(RuntimeError, match="double backward"):
        gradients(moco_nce(q, k, queue, backend=backend).loss, [q], create_graph=True)


def test_a_frozen_side_costs_no_gemm():
    q, k = draw(0, 8, 16), draw(1, 8, 16)
    for needs, gemms in (((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)):
        leaves = [x.clone().requires_grad_(need) for x, need in zip((q, k), needs, strict=True)]
        MODULE.cuda_tally(True)
        loss = info_nce(*leaves, normalize=True, backend="cuda").loss
        assert MODULE.cuda_tally(False)["gemm float32"][0] == gemms
        assert loss.requires_grad == any(needs)


def test_what_it_does_not_serve_goes_to_the_operators(served):
    q, k = draw(0, 6, 16), draw(1, 6, 16)
    info_nce(q, k, torch.arange(6), backend="cuda")  # an index, which it would have to read
    info_nce(q, k, symmetric=True, backend="cuda")
    moco_nce(q, k, draw(2, 9, 16), normalize=False, backend="cuda")
    with torch.autocast("cpu"):
        info_nce(q, k, backend="cuda")
    assert served() == 0
