"""Every statistic of rows and of columns in the C++ kernels, each layout and transform, against the whole matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_nce import _extension, tile_stats
from fused_nce.backends import cpu
from fused_nce.core.spec import Bias, Block, Identity, Index, Labels, Separate, Spec, TanhClip
from fused_nce.core.statistics import STATISTIC

MODULE, REASON = _extension.status()
pytestmark = pytest.mark.skipif(MODULE is None, reason=REASON or "kernels built")

N, M, D = 70, 150, 10
ALL = tuple(name for name in STATISTIC if name in cpu.ATOMS)
# Scores are off by u·(4 + √D)·Σ|q·k|·scale ≤ 8u·10 and sums pile up as many again: relative to the largest element.
TOLERANCE = 200 * 2.0**-24

TRANSFORMS = {"none": Identity(), "clip": TanhClip(6.0), "wide clip": TanhClip(60.0), "bias": Bias()}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "block": (Block(3, 2), {"offset": 4}),
    "targets": (Index(), {"row_ids": torch.arange(N) * 2 % M}),
    "repeated targets": (Index(), {"row_ids": torch.arange(N) // 9}),
    "labels": (Labels(), {"row_ids": torch.arange(N) % 7 - 3, "column_ids": torch.arange(M) % 11}),
    "separate": (Separate(2), {"positives": torch.linspace(-2, 2, 2 * N).view(N, 2)}),
}
ITSELF: dict[str, tuple[Any, dict[str, Any]]] = {  # one matrix is both, its diagonal left out
    "block": (Block(5, 5), {}),
    "labels": (Labels(), {"row_ids": torch.arange(N) // 3 * (1 << 33)}),
}


def found(backend, layout, transform, arguments, itself, dtype=torch.float32):
    """Statistics, and the gradients of all of them at once, each at an upstream of its own."""
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(rows, D, generator=g).to(dtype).requires_grad_() for rows in (N, M))
    scale = torch.tensor(0.4, dtype=dtype, requires_grad=True)
    bias = torch.tensor(-0.7, dtype=dtype, requires_grad=True) if isinstance(transform, Bias) else None
    if "positives" in arguments:
        arguments = {"positives": arguments["positives"].to(dtype)}
    spec, keys = Spec(layout, transform, ALL, ALL, drop_self=itself), None if itself else k
    out = tile_stats(q, keys, spec, scale=scale, bias=bias, backend=backend, **arguments)
    total = torch.zeros((), dtype=dtype)
    for x in out.values():
        if x.requires_grad:  # an empty set's −inf is no loss
            total = total + torch.where(x.isfinite(), x * torch.randn(x.shape, generator=g), 0.0).sum()
    leaves = [x for x in (q, keys, scale, bias) if x is not None]
    return {**out, **dict(zip(("dq", "dk", "dscale", "dbias"), torch.autograd.grad(total, leaves), strict=False))}


@pytest.mark.parametrize("workspace_mb", ["16", "0.2"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("layout", "itself"), [*((x, False) for x in LAYOUTS), *((x, True) for x in ITSELF)])
def test_every_statistic(layout, itself, transform, workspace_mb, monkeypatch):
    place, arguments = (ITSELF if itself else LAYOUTS)[layout]
    exact = found("reference", place, TRANSFORMS[transform], arguments, itself, torch.float64)
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    ours = found("cpu", place, TRANSFORMS[transform], arguments, itself)
    assert ours.keys() == exact.keys()
    for name, y in exact.items():
        x, finite = ours[name], y.isfinite()
        if not y.numel():  # labels hold no scores of positives
            continue
        assert torch.equal(x.isinf(), y.isinf()), name
        error = torch.where(finite, x - y, 0.0).abs().max()
        assert error <= TOLERANCE * torch.where(finite, y, 0.0).abs().max().clamp(min=1.0), name
