"""The agreement of several processes on what they are about to do together.

A collective that two processes enter with different sizes aborts one of them from C++ or hangs both. So before the
first one they exchange one integer, on the host, within a time limit: a digest of sizes and settings. All go on, or
all tell each other what they have, and raise the same error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.group import Peers, named_group

TEXT_BYTES = 2048  # of what a process has, told where the digests differ

Seen = Mapping[str, int | str]
"""Sizes and settings of a call, by name; the digest and the error speak of nothing else."""


class ProcessLostError(RuntimeError):
    """Another process of the group died, or came too late."""


def finish(what: str, timeout_s: float, start: Callable[[], Any], *, host: bool = True) -> None:
    """Start a collective and wait for it.

    Args:
        what: its name, for the error.
        timeout_s: the limit of a wait on the host; inf: the group's own.
        start: begins the work and returns it.
        host: wait on the host with a limit; False for a GPU, whose stream waits, under the group's own limit.

    Raises:
        ProcessLostError: where a process does not come in time, or its connection breaks.
    """
    with lost(what, timeout_s):
        work = start()
        if work is not None:
            work.wait(timedelta(seconds=timeout_s)) if host and math.isfinite(timeout_s) else work.wait()


@contextmanager
def lost(what: str, timeout_s: float) -> Iterator[None]:
    """What torch raises for a broken or late collective, by its name.

    Raises:
        ProcessLostError: for it.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        limit = f"{timeout_s:g} s" if math.isfinite(timeout_s) else "the group's own limit"
        raise ProcessLostError(
            f"group: {what} did not finish within {limit} on every process: one died, is late or does something else "
            f"({str(error).splitlines()[0][:200]})"
        ) from error


_host_groups: dict[str, dist.ProcessGroup] = {}


def _host_group(name: str) -> dist.ProcessGroup:
    """A group of the same processes for tensors on the CPU: itself, or a gloo group beside an NCCL one, with its limit.

    An exchange on the GPU would make the host wait for every kernel that is queued.
    """
    group = named_group(name)
    if "cpu" in {device.type for device in group._device_types}:
        return group
    if name not in _host_groups:
        ranks = dist.get_process_group_ranks(group)
        options = group._get_backend(next(iter(group._device_types))).options
        limit = None if options is None else options._timeout  # of a backend without any
        beside = dist.new_group(ranks, timeout=limit, backend="gloo", use_local_synchronization=True)
        _host_groups[name] = cast(dist.ProcessGroup, beside)
    return _host_groups[name]


_exchanges = threading.local()
RAISED = "raised"


def exchanges() -> int:
    """How often this thread has met the other processes to agree."""
    return getattr(_exchanges, "count", 0)


def tell(peers: Peers, error: Exception) -> None:
    """Come to the exchange that the others wait in with what went wrong here, so that all of them raise it."""
    said = f"{type(error).__name__}: {error}"[: TEXT_BYTES // 4]
    with contextlib.suppress(ValueError, ProcessLostError):
        agree(peers.name, peers.timeout_s, {RAISED: said})


def agree(name: str, timeout_s: float, seen: Seen) -> None:
    """All processes see the same, such as {"N": 64, "scale": "10.0"}, or all raise the same error.

    Raises:
        ValueError: naming what differs and where, on every process alike.
        ProcessLostError: where one does not answer.
    """
    _exchanges.count = exchanges() + 1
    group, text = _host_group(name), json.dumps(dict(seen)).encode()
    mine = torch.tensor([int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)])
    digests = mine.new_empty(dist.get_world_size(group))
    finish("the exchange of sizes", timeout_s, lambda: group._allgather_base(digests, mine))
    if bool((digests == mine).all()):
        return
    padded = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
    padded[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    texts = padded.new_empty(len(digests) * TEXT_BYTES)
    finish("the exchange of settings", timeout_s, lambda: group._allgather_base(texts, padded))
    everyone = [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in texts.view(-1, TEXT_BYTES)]
    for rank, one in enumerate(everyone):
        if RAISED in one:
            raise ValueError(f"group: process {rank} raised {one[RAISED]}")
    names = list(dict.fromkeys(key for one in everyone for key in one))
    differ = [key for key in names if len({one.get(key) for one in everyone}) > 1]
    first: dict[tuple[str, ...], int] = {}  # what was seen, and the first process that saw it
    for rank, one in enumerate(everyone):
        first.setdefault(tuple(_shown(key, one.get(key)) for key in differ if key in one), rank)
    found = "; ".join(f"{', '.join(words)} on process {rank}" for words, rank in list(first.items())[:4])
    raise ValueError(
        f"group: got {found}; need the same on all {len(everyone)} processes (drop_last=True drops an uneven last "
        "batch)"
    )


def settings(peers: Peers, scale: object, spec: str, tail: str | None = None) -> dict[str, str]:
    """What the processes of a call must have in common beside their sizes, as text.

    Args:
        peers: how the keys come.
        scale: a number, such as 1 / temperature, or a tensor, whose value is not read.
        spec: its code: layout, clip, whether rows are normalised to a bound.
        tail: its code: the loss, penalty and reduction.
    """
    found = {"ring": str(peers.ring), "wire": str(peers.wire_dtype)}
    found["scale (1 / temperature)"] = "a tensor" if isinstance(scale, Tensor) else repr(scale)
    return found | {"scores": spec} | ({"loss, penalty, reduction, weight": tail} if tail is not None else {})


def _shown(name: str, value: int | str) -> str:
    return f"{name} = {checks.DTYPES[value] if name.endswith('dtype') and isinstance(value, int) else value}"


def dtype_number(x: Tensor) -> int:
    """A float dtype as the exchange carries it."""
    return checks.DTYPES.index(x.dtype)
