"""The agreement of several processes on what they are about to do together.

A collective that two processes enter with different sizes aborts one of them from C++ or hangs both. So before the
first one they exchange eight integers, on the host, within a time limit: all go on, or all raise the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.group import named_group

WORDS = 8  # integers of the exchange, whatever the loss: processes that run different losses still agree on its length


class ProcessLostError(RuntimeError):
    """Another process of the group died, or came too late."""


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
