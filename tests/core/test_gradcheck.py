"""Central differences in float64, for every differentiable input, each output by itself."""

from __future__ import annotations

import pytest
import torch

from fused_nce import tile_loss, tile_stats
from fused_nce.core.spec import Block, Identity, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.marks import nightly_but

BACKENDS = ("reference", "chunked")
# images, rows_per_image, images beside the rows' own, n_c, D
SHAPES = [
    (images, rows, extra, n_c, d)
    for images, rows, extra in (
        (1, 1, 1),
        (2, 1, 0),
        (2, 2, 1),
        (3, 1, 0),
        (4, 1, 2),
        (2, 3, 0),
        (5, 1, 0),
        (1, 3, 2),
        (3, 2, 0),
    )
    for n_c, d in ((1, 1), (1, 3), (2, 2), (3, 1), (4, 3), (2, 5))
]
assert len(SHAPES) >= 50


def inputs(shape, seed):
    images, rows, extra, n_c, d = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(images * rows, d, dtype=torch.float64, generator=g).requires_grad_()
    k = torch.randn((images + extra) * n_c, d, dtype=torch.float64, generator=g).requires_grad_()
    return q, k, torch.tensor(0.9, dtype=torch.float64, requires_grad=True)


def check(f, leaves):
    assert torch.autograd.gradcheck(f, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, check_undefined_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("index", "shape"), nightly_but([*enumerate(SHAPES)][::4], enumerate(SHAPES)), ids=str)
def test_gradients(backend, index, shape):
    """All three parts of the loss and all statistics, clip and reduction by turns."""
    *_, extra, n_c, _ = shape
    spec = Spec(Block(n_c, shape[1]), (TanhClip(3.0), Identity(), TanhClip(50.0))[index % 3])
    tail = Nce((0.3, 0.0)[index % 2], ("mean", "sum", "none")[index % 3])
    offset = index % (extra + 1)

    def loss(q, k, scale):
        out = tile_loss(q, k, spec, tail, scale=scale, offset=offset, backend=backend)
        return (out.loss, out.nce, out.penalty) if tail.penalty else (out.loss, out.nce)

    def stats(q, k, scale):
        out = tile_stats(q, k, spec, scale=scale, offset=offset, backend=backend)
        return out["pos"], out["neg_lse"], out["square"]

    check(loss, inputs(shape, index))
    check(stats, inputs(shape, index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_across_strips_and_panels(backend, monkeypatch):
    """The same where every strip and panel is as small as it gets."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.0002")
    spec = Spec(Block(2), TanhClip(4.0))

    def loss(q, k, scale):
        out = tile_loss(q, k, spec, Nce(0.3), scale=scale, backend=backend)
        return out.loss, out.nce, out.penalty

    check(loss, inputs((6, 1, 0, 2, 3), 1))
