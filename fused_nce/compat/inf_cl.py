"""Inf-CL's losses (inf_cl, 1.2), on any device and any width."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce.compat.base import scalar, tensor
from fused_nce.compat.processes import check_ddp_compat, everyone, gradient_times
from fused_nce.core import checks
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.group import world_size
from fused_nce.core.spec import Block, Index, Spec
from fused_nce.core.statistics import deficit, softplus
from fused_nce.core.tails import Nce
from fused_nce.losses.common import check_rows

DIAGONAL = Spec(Block(1), stats=Nce().stats)
TARGETS = Spec(Index(), stats=Nce().stats)


def cal_flash_loss(
    q: Tensor,  # (N, D)
    k: Tensor,  # (M, D)
    labels: Tensor | None = None,  # (N,), integers
    scale: float | Tensor | None = None,
    head_dim: int = 256,
) -> Tensor:
    """Each query's InfoNCE among the keys, (N,), in nats, scores scale·⟨q, k⟩; within the process.

    Args:
        q: rows as they are.
        k: M >= N without labels.
        labels: each query's key; None is i for query i.
        scale: factor of the scores; a tensor of one element is learnable. None is 1.
        head_dim: without effect: no width is excluded.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    spec, factor, ids = _given(q, k, labels, scale, head_dim)
    found = tile_stats(q, k, spec, scale=factor, row_ids=ids)
    return softplus(deficit(found["neg_lse"], found["pos"].squeeze(1)))


def cal_inf_loss(
    q: Tensor,  # (N, D)
    k: Tensor,  # (M, D)
    labels: Tensor | None = None,  # (N,), integers
    scale: float | Tensor | None = None,
    head_dim: int = 256,
    *,
    ddp_compat: str = "upstream",
) -> Tensor:
    """The mean of `cal_flash_loss` (which see) over the queries of this process among the keys of all, 0-d.

    Args:
        q: rows as they are.
        k: M >= N without labels; all processes have the same N and M.
        labels: as of `cal_flash_loss`; keys of this process.
        scale: as of `cal_flash_loss`.
        head_dim: without effect.
        ddp_compat: "upstream" or "exact": under DDP, whether the gradient of the scale is upstream's, which adds what
            the processes have of it before DDP takes their mean, or the whole batch's.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    spec, factor, ids = _given(q, k, labels, scale, head_dim)
    if check_ddp_compat(ddp_compat) == "upstream" and isinstance(factor, Tensor):
        factor = gradient_times(factor, world_size())  # fault: processes-scale-inf-cl
    return tile_loss(q, k, spec, Nce(), scale=factor, row_ids=ids, group=everyone()).loss


cal_ring_loss = cal_inf_loss  # upstream's two differ in the kernel, which is one here


def _given(
    q: Tensor, k: Tensor, labels: Tensor | None, scale: float | Tensor | None, head_dim: int
) -> tuple[Spec, float | Tensor, Tensor | None]:
    """Layout, scale and targets, checked."""
    check_rows("q", q, "k", k, same_n=False)
    checks.checked_int("head_dim", head_dim)
    if scale is None:
        scale = 1.0
    scale = scalar(scale, q)
    if labels is None:
        if k.shape[0] < q.shape[0]:
            raise ValueError(f"k: got M = {k.shape[0]}, need >= N = {q.shape[0]} without labels")
        return DIAGONAL, scale, None
    if tensor("labels", labels).is_floating_point():
        raise TypeError(f"labels: got {labels.dtype}, need integers")
    return TARGETS, scale, labels.to(q.device, torch.int64)
