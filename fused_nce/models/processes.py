"""A random exchange of images between the processes, and back. One process: with itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fused_nce.core.group import gathered, world_size


def shuffle(
    x: Tensor,  # (B, ...)
) -> tuple[Tensor, Tensor]:  # (B, ...), (processes·B,)
    """B rows of all processes' at random, no row twice, and the order that `unshuffle` needs.

    The order is the first process's draw, on the CPU: the same for all, and saved with that generator.
    """
    order = torch.randperm(world_size() * len(x)).to(x.device)
    if world_size() > 1:
        dist.broadcast(order, 0)
    return gathered(x)[_mine(order)], order


def unshuffle(
    x: Tensor,  # (B, ...)
    order: Tensor,  # (processes·B,)
) -> Tensor:  # (B, ...)
    """What became of this process's own rows, in their own order."""
    return gathered(x)[_mine(order.argsort())]


def _mine(order: Tensor) -> Tensor:
    return order.chunk(world_size())[dist.get_rank() if world_size() > 1 else 0]
