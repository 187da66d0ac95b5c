"""What a model needs of the other processes: their rows, and a random exchange of images. One process: itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def count() -> int:
    """Processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(
    x: Tensor,  # (B, ...)
) -> Tensor:  # (processes·B, ...)
    """The rows of all processes by rank, without a gradient."""
    if count() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(count())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def shuffle(
    x: Tensor,  # (B, ...)
) -> tuple[Tensor, Tensor]:  # (B, ...), (processes·B,)
    """B rows of all processes' at random, no row twice, and the order that `unshuffle` needs.

    The order is the first process's draw, on the CPU: the same for all, and saved with that generator.
    """
    order = torch.randperm(count() * len(x)).to(x.device)
    if count() > 1:
        dist.broadcast(order, 0)
    return gathered(x)[_mine(order)], order


def unshuffle(
    x: Tensor,  # (B, ...)
    order: Tensor,  # (processes·B,)
) -> Tensor:  # (B, ...)
    """What became of this process's own rows, in their own order."""
    return gathered(x)[_mine(order.argsort())]


def _mine(order: Tensor) -> Tensor:
    return order.chunk(count())[dist.get_rank() if count() > 1 else 0]
