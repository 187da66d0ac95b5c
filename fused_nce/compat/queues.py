"""The key queues of moco, lightly and pytorch-metric-learning as a `MemoryQueue`: their state, or the module itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_nce.losses.queue import MemoryQueue


class _Ring(NamedTuple):
    """What a queue holds."""

    keys: Tensor  # (K, D)
    labels: Tensor | None  # (K,)
    pointer: int  # where the next key goes
    fill: int  # real keys


def memory_queue(source: nn.Module | Mapping[str, Any], prefix: str = "") -> MemoryQueue:
    """A `MemoryQueue` that goes on where another project's queue is: the same keys in the same slots, copied.

    What upstream does not keep is taken as its own code would find it. moco and lightly use their random start as keys,
    so all K count as filled; pytorch-metric-learning's rows of zeros are the empty ones.

    Args:
        source: moco's builder, lightly's `MemoryBankModule` (or a loss that is one, or has one as `memory_bank`),
            pytorch-metric-learning's `CrossBatchMemory`, or the state dict of one. lightly's bank is in a state only if
            it was registered as persistent; pass the module otherwise.
        prefix: of the names in a state, such as "module." of DistributedDataParallel.

    Returns:
        MemoryQueue in the keys' dtype and on their device, with labels if there are any.

    Raises:
        ValueError: for a source without one of their queues, or an empty one.
    """
    holder = getattr(source, "memory_bank", source) if isinstance(source, nn.Module) else source

    carried = getattr(holder, "_metadata", {}).get(prefix.rstrip("."), {})  # by our adapters' states

    def read(name: str) -> Any:
        if isinstance(holder, nn.Module):
            return getattr(holder, prefix + name, None)
        return holder.get(prefix + name, carried.get(name))

    for read_ring in (_moco, _lightly, _pml):
        ring = read_ring(read)
        if ring is not None:
            return _queue(ring)
    seen = type(source).__name__ if isinstance(source, nn.Module) else f"keys {', '.join(sorted(source)[:6])}"
    raise ValueError(f"source: got {seen}, need {prefix}queue, {prefix}bank or {prefix}embedding_memory of a queue")


def _moco(read: Callable[[str], Any]) -> _Ring | None:
    """`queue` (D, K) of unit columns, `queue_ptr` (1,)."""
    queue = read("queue")
    return None if queue is None else _Ring(queue.t(), None, int(read("queue_ptr")), queue.shape[1])


def _lightly(read: Callable[[str], Any]) -> _Ring | None:
    """`bank` (K, D) of unit rows, `bank_ptr` (1,)."""
    bank = read("bank")
    if bank is None:
        return None
    if bank.dim() != 2 or not bank.numel():
        raise ValueError(
            f"source: got a bank of shape {tuple(bank.shape)}, need (K, D): it has seen no batch, or has no size"
        )
    return _Ring(bank, None, int(read("bank_ptr")), bank.shape[0])


def _pml(read: Callable[[str], Any]) -> _Ring | None:
    """`embedding_memory` (K, D) of rows as they came, `label_memory` (K,); where and how full is in the module."""
    keys = read("embedding_memory")
    if keys is None:
        return None
    real = (keys != 0).any(dim=1).nonzero()
    fill = pointer = int(real[-1]) + 1 if len(real) else 0
    extra = read("_extra_state") or {name: read(name) for name in ("queue_idx", "has_been_filled")}
    if extra.get("queue_idx") is not None:
        pointer = int(extra["queue_idx"])
        fill = len(keys) if extra["has_been_filled"] else pointer
    return _Ring(keys, read("label_memory"), pointer, fill)


def _queue(ring: _Ring) -> MemoryQueue:
    size, dim = ring.keys.shape
    queue = MemoryQueue(size, dim, dtype=ring.keys.dtype, labels=ring.labels is not None).to(ring.keys.device)
    with torch.no_grad():
        real = torch.arange(size, device=ring.keys.device) < ring.fill
        queue.keys.copy_(torch.where(real[:, None], ring.keys, queue.keys))  # unit vectors where there is nothing yet
        if queue.labels is not None and ring.labels is not None:
            queue.labels.copy_(torch.where(real, ring.labels, queue.labels))
        queue.pointer.fill_(ring.pointer % size)
        queue.fill.fill_(ring.fill)
    return queue
