"""Problems on a device, and one training step of each."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce import tile_loss, tile_stats
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.gpu.conftest import Place

SCALE = 0.203125  # exact in every dtype
# (N, n_c, D): below, at and beyond a tile; few rows against many columns; a width that no vector divides.
SHAPES = [(7, 3, 33), (64, 16, 64), (129, 5, 257), (16, 49, 128)]


def spec_of(n_c: int) -> Spec:
    """AMDIM's."""
    return Spec(Block(n_c), TanhClip(20.0))


def features(
    shape: tuple[int, int, int], device: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(q, k), leaves on the device, the same numbers on every one."""
    n, n_c, d = shape
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, d, generator=g).to(device, dtype).requires_grad_() for rows in (n, n * n_c))
    return q, k


def step(q: Tensor, k: Tensor, n_c: int, place: Place, scale: float | Tensor = SCALE) -> list[Tensor]:
    """Loss, statistics and gradients of both entries of the engine: everything that the ops write."""
    out = tile_loss(q, k, spec_of(n_c), Nce(0.04), scale=scale, backend=place.backend)
    stats = tile_stats(q, k, spec_of(n_c), scale=scale, backend=place.backend)
    total = stats["neg_lse"].sum() + stats["square"].mean() - stats["pos"].sum()
    return [
        out.loss.detach(),
        out.pos,
        *out.rows.values(),
        *torch.autograd.grad(out.loss, (q, k)),
        *torch.autograd.grad(total, (q, k)),
    ]
