"""Negatives from every process: what `group=` of a loss may be, and what stands beside it.

```
loss = info_nce(queries, keys, group="world").loss     # each process calls it with its own part of the batch
loss.backward()                                        # under DDP: the gradient of one process on the whole batch
```

Every process has the same number of rows (`drop_last=True`). It reports its own part of the loss; the mean over the
processes is the loss of the whole batch. That, and DDP's averaging of gradients, make every parameter's gradient the
one of a single process on the whole batch, those of a temperature inside the loss included.
"""

from __future__ import annotations

from torch import Tensor

from fused_nce.core.distributed.collectives import gather
from fused_nce.core.distributed.processes import ProcessLostError, dtype_number
from fused_nce.core.group import Group, Processes, peers

__all__ = ["Group", "ProcessLostError", "Processes", "all_gather", "world_size"]


def world_size(group: Group) -> int:
    """Processes whose negatives a loss with this `group=` sees; 1 for None.

    A loss that reports the whole batch's sum, or another project's scale, is ours times a power of it.

    Raises:
        TypeError, ValueError: as a loss with this `group=` would.
    """
    everyone = peers(group)
    return 1 if everyone is None else everyone.size


def all_gather(
    x: Tensor,  # (n, ...)
    group: Group = "world",
) -> Tensor:  # (size·n, ...)
    """The rows of every process, by rank, with the exact gradient: each process gets the sum of what all owe its rows.

    Raises:
        TypeError, ValueError: what `group` is not; or, on every process alike, shapes that differ.
        ProcessLostError: a process died or came too late.
    """
    everyone = peers(group)
    if everyone is None:
        return x
    seen = {"n": x.shape[0], "numel": x.numel(), "requires_grad": int(x.requires_grad)}
    if x.is_floating_point():
        seen["dtype"] = dtype_number(x)
    return gather([x], everyone, seen)[0]
