"""Which processes a loss takes its negatives from, and their agreement on what they are about to do together.

A collective that two processes enter with different sizes aborts one of them from C++ or hangs both. So before the
first one they exchange eight integers, on the host, within a time limit: all go on, or all raise the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fused_nce.core import checks

WORDS = 8  # integers of the exchange, whatever the loss: processes that run different losses still agree on its length


class ProcessLostError(RuntimeError):
    """Another process of the group died, or came too late."""


@dataclass(frozen=True)
class Processes:
    """The processes whose keys are negatives, and how the keys come: what `group=` of a loss may be, beside a group.

    Args:
        group: a `ProcessGroup` that this process belongs to, or "world" for all processes.
        ring: blocks of keys circulate instead of being gathered: memory does not grow with the number of processes.
        wire_dtype: what keys (and the gradients of gathered ones) travel in, such as `torch.bfloat16`; None is their
            own dtype. Sums are taken in float32 at least, whatever the wire.
        timeout_s: seconds after which a process that has not come counts as lost. On a GPU it bounds the exchange that
            precedes a collective; a collective under way has the group's own limit (`init_process_group(timeout=)`).
    """

    group: dist.ProcessGroup | str = "world"
    ring: bool = False
    wire_dtype: torch.dtype | None = None
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what no collective could take."""
        checks.check_choice("wire_dtype", self.wire_dtype, (None, *checks.DTYPES))
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
    timeout_s: float

    @property
    def group(self) -> dist.ProcessGroup:
        """The group itself."""
        return named_group(self.name)


def named_group(name: str) -> dist.ProcessGroup:
    """The group that torch knows by this name."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]  # a str to torch < 2.12


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
    return Peers(members.group_name, rank, size, how.ring, how.wire_dtype, how.timeout_s)


def finish(what: str, timeout_s: float, start: Callable[[], Any], *, host: bool = True) -> None:
    """Start a collective and wait for it.

    Args:
        what: its name, for the error.
        timeout_s: the limit of a wait on the host.
        start: begins the work and returns it.
        host: wait on the host with a limit; False for a GPU, whose stream waits, under the group's own limit.

    Raises:
        ProcessLostError: where a process does not come in time, or its connection breaks.
    """
    with lost(what, timeout_s):
        work = start()
        if work is not None:
            work.wait(timedelta(seconds=timeout_s)) if host else work.wait()


@contextmanager
def lost(what: str, timeout_s: float) -> Iterator[None]:
    """What torch raises for a broken or late collective, by its name.

    Raises:
        ProcessLostError: for it.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise ProcessLostError(
            f"group: {what} did not finish within {timeout_s:g} s on every process: one died, is late or does "
            f"something else ({str(error).splitlines()[0][:200]})"
        ) from error


_host_groups: dict[str, dist.ProcessGroup] = {}


def _host_group(name: str) -> dist.ProcessGroup:
    """A group of the same processes for tensors on the CPU: itself, or a gloo group beside an NCCL one.

    An exchange on the GPU would make the host wait for every kernel that is queued.
    """
    group = named_group(name)
    if "cpu" in {device.type for device in group._device_types}:
        return group
    if name not in _host_groups:
        ranks = dist.get_process_group_ranks(group)
        beside = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _host_groups[name] = cast(dist.ProcessGroup, beside)
    return _host_groups[name]


def agree(name: str, timeout_s: float, seen: Mapping[str, int]) -> None:
    """All processes see the same numbers, such as {"N": 64, "D": 128}, or all raise the same error.

    Raises:
        ValueError: naming what differs and where, on every process alike.
        ProcessLostError: where one does not answer.
    """
    group = _host_group(name)
    values = list(seen.values())
    mine = torch.tensor(values + [0] * (WORDS - len(values)), dtype=torch.int64)
    everyone = mine.new_empty(dist.get_world_size(group) * WORDS)
    finish("the exchange of sizes", timeout_s, lambda: group._allgather_base(everyone, mine))
    rows = everyone.view(-1, WORDS)[:, : len(values)].tolist()
    if all(row == rows[0] for row in rows):
        return
    differ = [i for i in range(len(values)) if len({row[i] for row in rows}) > 1]
    names = list(seen)
    first: dict[tuple[str, ...], int] = {}  # what was seen, and the first process that saw it
    for rank, row in enumerate(rows):
        first.setdefault(tuple(_shown(names[i], row[i]) for i in differ), rank)
    found = "; ".join(f"{', '.join(words)} on process {rank}" for words, rank in list(first.items())[:4])
    raise ValueError(
        f"group: got {found}; need the same on all {len(rows)} processes (drop_last=True drops an uneven last batch)"
    )


def _shown(name: str, value: int) -> str:
    return f"{name} = {checks.DTYPES[value] if name.endswith('dtype') else value}"


def dtype_number(x: Tensor) -> int:
    """A float dtype as the exchange carries it."""
    return checks.DTYPES.index(x.dtype)
