"""What adapters of losses that gather across processes share: whose negatives, and upstream's scale of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.group import gathered, world_size

DDP_COMPAT = ("upstream", "exact")


def has_group() -> bool:
    """Whether there is a default group, of one process perhaps."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """This process among them."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def everyone() -> str | None:
    """`group=` of a loss that gathers wherever there are several processes."""
    return "world" if world_size() > 1 else None


def mean_of_all(loss: Tensor) -> Tensor:
    """The mean over the processes, where upstream reports the whole batch's loss; the gradient stays this one's."""
    return loss + (gathered(loss.reshape(1)).mean() - loss.detach())


def gradient_times(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is another project's multiple of the exact one."""
    found: Tensor = x if factor == 1 else _GradientTimes.apply(x, factor)
    return found


class _GradientTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0] * ctx.factor, None


def check_ddp_compat(value: object) -> str:
    """Whose gradient scale holds among several processes, where upstream's is not that of the whole batch's loss.

    Raises:
        ValueError: for anything but "upstream" and "exact".
    """
    checks.check_choice("ddp_compat", value, DDP_COMPAT)
    return str(value)


def check_world(size: int, number: int) -> None:
    """A caller's count of the processes, and its place among them, are those of the default group.

    Raises:
        ValueError: naming the argument, the value seen and the value needed.
    """
    for name, given, need in (("world_size", size, world_size()), ("rank", number, rank())):
        if given != need:
            raise ValueError(f"{name}: got {given}, need {need}, torch.distributed's")
