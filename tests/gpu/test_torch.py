"""The ops within torch on a device: opcheck, torch.compile, autocast with a loss scaler."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_map_only

from fused_nce import tile_loss
from fused_nce.bench import card
from fused_nce.core import dispatch, first_contact
from fused_nce.core.tails import Nce
from fused_nce.losses.registry import LOSSES
from tests.core.test_ops import samples
from tests.gpu.conftest import PLACES, Place, parameters, repeats, require
from tests.gpu.problems import SCALE, features, spec_of

SHAPE = (9, 3, 17)


def placed(place):
    """The samples of `tests/core/test_ops.py` on the place's device, for its backend; what it refuses is left out."""

    def move(x):
        return x.detach().to(place.device).requires_grad_(x.requires_grad)

    for op, arguments in samples("reference"):
        here = (*tree_map_only(torch.Tensor, move, arguments[:-1]), place.backend)
        try:
            op(*here)
        except ValueError as error:
            if "cannot run this" not in str(error):
                raise
        else:
            yield op, here


ONCE = [p for p in PLACES if p.device == "cuda"] + [Place("cpu", "chunked")]


@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("place", parameters(ONCE), indirect=True)
def test_opcheck(place, part):
    """All of torch's own checks, on every sixth sample; on a CPU on one, where `tests/core` has seen to them."""
    found = list(placed(place))
    assert len(found) >= 60
    for op, arguments in found[part :: repeats(place, on_cpu=len(found), on_gpu=6)]:
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
    assert value.dtype == torch.float32
    half = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
    expected = loss(*half)
    (expected * 2.0**16).backward()
    assert torch.equal(value, expected)
    for wide, narrow in zip((q, k), half, strict=True):
        assert wide.grad is not None
        assert narrow.grad is not None
        assert wide.grad.dtype == torch.float32
        assert torch.isfinite(wide.grad).all()
        assert torch.equal(wide.grad, narrow.grad.float())


@pytest.mark.parametrize("name", ["dim_mi", "cpc_nce/sequence"])  # whose backwards compute with the backend anew
def test_the_doctors_backward_is_no_call_of_its_own(name, kernels, monkeypatch):
    """It has no first test, and is taken for large where the forward is."""
    monkeypatch.setattr(first_contact, "_verdicts", {})
    monkeypatch.setattr(first_contact, "trial", None)
    module, seen = dispatch.backend_module(kernels.backend), []
    grads = module.grads

    def heard(*given):
        seen.append(first_contact.large())
        return grads(*given)

    monkeypatch.setattr(module, "grads", heard)
    wrong, _ = card.compared(LOSSES[name], 24, torch.float32, kernels.backend, torch.device(kernels.device))
    assert (wrong, first_contact._verdicts, seen[-1]) == ("", {}, True)
