"""What `group=` of a loss may be, and the processes that it stands for. Their work together is `core/distributed`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

from fused_nce.core import checks


@dataclass(frozen=True)
class Processes:
    """The processes whose keys are negatives, and how the keys come: what `group=` of a loss may be, beside a group.

    Args:
        group: a `ProcessGroup` that this process belongs to, or "world" for all processes.
        ring: blocks of keys circulate instead of being gathered: memory does not grow with the number of processes.
        wire_dtype: what keys (and the gradients of gathered ones) travel in, such as `torch.bfloat16`; None is their
            own dtype. Sums are taken in float32 at least, whatever the wire.
        timeout_s: seconds after which a process that has not come counts as lost; None: the group's own limit
            (`init_process_group(timeout=)`, which no greater number goes beyond). On a GPU it bounds the exchange that
            precedes a collective; a collective under way has the group's own. One that dies is noticed at once.
    """

    group: dist.ProcessGroup | str = "world"
    ring: bool = False
    wire_dtype: torch.dtype | None = None
    timeout_s: float | None = None

    def __deepcopy__(self, memo: object) -> Processes:
        return self  # a group has no copy, and nothing here changes

    def __post_init__(self) -> None:
        """Refuse what no collective could take."""
        checks.check_choice("wire_dtype", self.wire_dtype, (None, *checks.DTYPES))
        if self.timeout_s is not None:
            checks.check_number("timeout_s", self.timeout_s, above=0)


Group = dist.ProcessGroup | str | Processes | None
"""None: this process alone. A group, "world", or a `Processes` with options: the negatives of all its processes."""


class Peers(NamedTuple):
    """The processes of one call, as an op can be told of them; there are at least two."""

    name: str  # torch's, of the group
    rank: int  # of this process within the group
    size: int
    ring: bool
    wire_dtype: torch.dtype | None
    timeout_s: float  # inf: the group's own limit

    @property
    def group(self) -> dist.ProcessGroup:
        """The group itself."""
        return named_group(self.name)


def named_group(name: str) -> dist.ProcessGroup:
    """The group that torch knows by this name."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a str to torch < 2.12


def world_size() -> int:
    """The processes of the default group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(
    x: torch.Tensor,  # (B, ...)
) -> torch.Tensor:  # (processes·B, ...)
    """The rows of all processes of the default group, of which each has as many, by rank, without a gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def peers(group: Group) -> Peers | None:
    """What `group=` stands for; None where this process is alone in it.

    Raises:
        TypeError: something else than `Group`.
        ValueError: `torch.distributed` is not initialised, or this process is not of the group.
    """
    if group is None:
        return None
    how = group if isinstance(group, Processes) else Processes(group)
    if isinstance(how.group, str):
        checks.check_choice("group", how.group, ("world",))
    elif not isinstance(how.group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(how.group).__name__}, need a ProcessGroup, 'world', Processes or None")
    if not dist.is_initialized():
        raise ValueError("group: got one without torch.distributed, need init_process_group() first, or None")
    members = cast(dist.ProcessGroup, dist.group.WORLD if isinstance(how.group, str) else how.group)
    rank, size = dist.get_rank(members), dist.get_world_size(members)
    if rank < 0:
        raise ValueError("group: got one that this process is not a member of, need its own, or None")
    if size == 1:
        return None
    return Peers(members.group_name, rank, size, how.ring, how.wire_dtype, how.timeout_s or math.inf)
