"""Problems and shorthands that several test files share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce import tile_loss
from fused_nce.core.engine import LossParts
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce

SPEC = Spec(Block(3), TanhClip(20.0))
N, N_C, D = 7, 3, 33
SCALE = 0.203125  # exact in every dtype


def features(n: int = N, n_c: int = N_C, d: int = D, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """(q, k), leaves."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, d, generator=g).to(dtype).requires_grad_() for rows in (n, n * n_c))


def run(
    backend: str,
    q: Tensor,
    k: Tensor,
    reduction: str = "mean",
    spec: Spec = SPEC,
    scale: float | Tensor = SCALE,
    penalty: float = 0.04,
    **options: Any,
) -> LossParts:
    """`tile_loss` with AMDIM's tail."""
    return tile_loss(q, k, spec, Nce(penalty, reduction), scale=scale, backend=backend, **options)


def grads_of(out: Tensor, q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """(dq, dk)."""
    return torch.autograd.grad(out, (q, k), **options)
