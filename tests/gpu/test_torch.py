"""The ops within torch on a device: opcheck, torch.compile, autocast with a loss scaler."""

from __future__ import annotations

import pytest
import torch

from fused_nce import tile_loss
from fused_nce.core.tails import Nce
from tests.gpu.conftest import require
from tests.gpu.problems import SCALE, features, spec_of

OPS = torch.ops.fused_nce
SHAPE = (9, 3, 17)


def samples(place):
    """(op, arguments): the three ops over gradients wanted, reductions, a host's and a tensor's scale."""
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        for j, grad in enumerate(("qk", "q", "k", "")):
            q, k = features(SHAPE, place.device, dtype, seed=4 * i + j)
            q.requires_grad_("q" in grad)
            k.requires_grad_("k" in grad)
            scale = torch.tensor(0.5, device=place.device, requires_grad=j < 2) if (i + j) % 2 else None
            needs = [x is not None and x.requires_grad for x in (q, k, scale)]
            spec = spec_of(SHAPE[1]).code
            head = (0.7, spec, 0)
            reduction = ("mean", "sum", "none")[(i + j) % 3]
            yield OPS.stats.default, (q, k, scale, *head, place.backend)
            yield OPS.loss.default, (q, k, scale, *head, f"nce(0.04,{reduction})", needs, place.backend)
            leaves = [None if x is None else x.detach() for x in (q, k, scale)]
            pos, rows = OPS.stats(*leaves, *head, place.backend)
            d = (torch.ones_like(pos), torch.ones_like(rows))
            yield OPS.grads.default, (*leaves, *head, pos, rows, *d, needs, place.backend)


@pytest.mark.parametrize("third", range(3))
def test_opcheck(place, third):
    """All of torch's own checks."""
    found = list(samples(place))[third::3]
    assert len(found) == 12
    for op, arguments in found:
        torch.library.opcheck(op, arguments)


def test_compiles_without_a_break(place):
    torch._dynamo.reset()

    def loss(q, k):
        out = tile_loss(2 * q, k, spec_of(SHAPE[1]), Nce(0.04), scale=SCALE, backend=place.backend)
        return out.loss + 0.5 * out.nce.detach(), out.report["top1"]

    compiler = "inductor" if place.device == "cuda" else "aot_eager"
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        q, k = features(SHAPE, place.device)
        value, top1 = function(q, k)
        (3 * value).backward()
        results.append((value.detach(), top1, q.grad, k.grad))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("within", [True, False], ids=["backward within", "backward outside"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_loss_scaler(place, dtype, within):
    """float32 leaves under autocast give what 16-bit leaves give, at a scaler's 2^16 and in float32."""
    require(place, dtype)
    spec = spec_of(SHAPE[1])

    def loss(q, k):
        return tile_loss(q, k, spec, Nce(0.04), scale=SCALE, backend=place.backend).loss

    scaler = torch.amp.GradScaler(place.device, init_scale=2.0**16)
    q, k = features(SHAPE, place.device)
    with torch.autocast(place.device, dtype):
        value = loss(q, k)
        if within:
            scaler.scale(value).backward()
    if not within:
        scaler.scale(value).backward()
    assert value.dtype == q.grad.dtype == torch.float32
    half = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
    expected = loss(*half)
    (expected * 2.0**16).backward()
    assert torch.equal(value, expected)
    for wide, narrow in zip((q, k), half, strict=True):
        assert torch.isfinite(wide.grad).all()
        assert torch.equal(wide.grad, narrow.grad.float())
