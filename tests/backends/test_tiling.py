"""Another tiling gives another last bit, never another accuracy: the error stays flat from one tile to a thousand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fused_nce import tile_loss
from fused_nce.core.tails import Nce
from tests.cases import Case, environment, features, run
from tests.conftest import why_not
from tests.marks import nightly_but

TILINGS = {"chunked": (0.2, 0.02, 0.002), "cpu": (2.0, 0.5, 0.1)}  # MiB of workspace
WIDE = Case("", "float32", 0, images=128, n_k=1000, n_c=3, d=4, scale=0.05)


def skip_unless_ready(backend):
    if why_not(backend):
        pytest.skip(f"{backend}: {why_not(backend)}")


def worst(case):
    """η over a few seeds; equal scores round the same way in every tile."""
    results = [run(dataclasses.replace(case, seed=seed, plant="equal" if seed == 0 else "random")) for seed in range(4)]
    return {name: max(result[name] for result in results) for name in ("neg_lse", "square", "dq", "dk")}


@pytest.mark.parametrize("clip", nightly_but([20.0], [20.0, None]))
@pytest.mark.parametrize("backend", TILINGS)
def test_error_does_not_grow_with_the_number_of_tiles(backend, clip):
    """One by one, a thousand panels cost neg_lse 14 times the error of one; 4 is what another summation order may."""
    skip_unless_ready(backend)
    case = dataclasses.replace(WIDE, backend=backend, clip=clip)
    one = worst(case)
    for workspace_mb in TILINGS[backend]:
        many = worst(dataclasses.replace(case, workspace_mb=workspace_mb))
        for name, eta in many.items():
            assert eta <= max(4 * one[name], 0.3), f"{name} at {workspace_mb} MiB: {eta:.2f} against {one[name]:.2f}"


@pytest.mark.parametrize("backend", TILINGS)
def test_tilings_agree(backend):
    """The tightest workspace against the widest, in float32: a few last bits."""
    skip_unless_ready(backend)
    case = dataclasses.replace(WIDE, backend=backend)
    losses = []
    for workspace_mb in (16, *TILINGS[backend]):
        q, k = (x.requires_grad_() for x in features(case))
        with environment(FUSED_NCE_WORKSPACE_MB=str(workspace_mb)):
            out = tile_loss(q, k, case.spec, Nce(0.04), scale=case.scale, backend=backend)
            losses.append((out.loss.detach(), *torch.autograd.grad(out.loss, (q, k))))
    for other in losses[1:]:
        for x, y in zip(losses[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6 * float(x.abs().max()))


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_gradient_of_scale_is_a_sum_of_few_roundings(backend):
    """A million products of one sign; a few running sums, as a BLAS dot has, exceeded the budget at 57,000."""
    skip_unless_ready(backend)
    case = Case(backend, "float32", 1, images=1024, n_k=1024, n_c=1, d=4, scale=100.0, tensor_scale=True, clip=4.0)
    for fields in ({"penalty": 3.0, "entry": "stats", "upstream": "ones"}, {"penalty": 0.04}):
        assert run(dataclasses.replace(case, **fields))["dscale"] <= 0.5
