"""What the adapters of losses that gather across processes share: where there are several, they say so and stop."""

from __future__ import annotations

import torch

from fused_nce.core import checks

DDP_COMPAT = ("upstream", "exact")


def world_size() -> int:
    """The processes of the default group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def alone(name: str) -> None:
    """One process, or none of whose rows another should have seen.

    Raises:
        NotImplementedError: naming what would gather.
    """
    if world_size() > 1:
        raise NotImplementedError(f"{name}: got {world_size()} processes, need 1: no negatives cross processes yet")


def check_ddp_compat(value: object) -> str:
    """Whose gradient scale holds among several processes, where upstream's is not that of the whole batch's loss.

    Raises:
        ValueError: for anything but "upstream" and "exact".
    """
    checks.check_choice("ddp_compat", value, DDP_COMPAT)
    return str(value)
