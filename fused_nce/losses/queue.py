"""A ring of past keys, MoCo's dictionary: any batch size, wrapping without loss, saved whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.losses.common import normalized


class MemoryQueue(nn.Module):
    """The last `size` keys, in place, on the device; nothing waits for it and it compiles without a break.

    Until it has turned once it holds random unit vectors, as MoCo's does: valid negatives, so that shapes stay fixed.
    `filled` gives the real keys alone.

    Args:
        size: K >= 1 keys; no relation to the batch size is needed.
        dim: D.
        dtype: of the storage; bfloat16 halves it.
        labels: keep an int64 label with each key, -1 before the first turn.

    Attributes:
        keys: (K, D), unit rows.
        labels: (K,) int64, or None.
        pointer: 0-d int64, where the next key goes.
        fill: 0-d int64, how many real keys there are. All four are saved in the state.

    Example:
        ```
        queue = MemoryQueue(64, 16)
        queries, keys = torch.randn(8, 16), torch.randn(8, 16)
        loss = moco_nce(queries, keys, queue.keys).loss
        queue.update(keys)
        ```
    """

    keys: Tensor
    labels: Tensor | None
    pointer: Tensor
    fill: Tensor

    def __init__(self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, labels: bool = False) -> None:
        super().__init__()
        size, dim = (checks.checked_int(*given, at_least=1) for given in (("size", size), ("dim", dim)))
        if dtype not in checks.DTYPES:
            raise TypeError(f"dtype: got {dtype}, need float64, float32, bfloat16 or float16")
        self.size, self.dim = size, dim
        self.register_buffer("keys", torch.empty(size, dim, dtype=dtype))
        self.register_buffer("labels", torch.empty(size, dtype=torch.int64) if labels else None)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))
        self.reset()

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"size={self.size}, dim={self.dim}, dtype={self.keys.dtype}, labels={self.labels is not None}"

    @torch.no_grad()
    def reset(self) -> None:
        """As new: random unit vectors, nothing filled."""
        random = torch.randn(self.size, self.dim, device=self.keys.device)
        self.keys.copy_(normalized(random))
        self.pointer.zero_()
        self.fill.zero_()
        if self.labels is not None:
            self.labels.fill_(-1)

    @torch.no_grad()
    def update(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Put a batch in, over the oldest. Of more than K keys the last K stay.

        Args:
            keys: (B, D), stored as they are: unit rows, for a loss that takes the queue as it is.
            labels: (B,) int64, where labels are kept.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value needed.
        """
        checks.check_tensor("keys", keys, ("B", "D"))
        if keys.shape[1] != self.dim:
            raise ValueError(f"keys: got width D = {keys.shape[1]}, need the queue's {self.dim}")
        if keys.device != self.keys.device:
            raise ValueError(f"keys: got device {keys.device}, need the queue's {self.keys.device}")
        if (labels is None) != (self.labels is None):
            kept = "no labels" if self.labels is None else "labels"
            raise ValueError(f"labels: got {'none' if labels is None else 'some'}, need what the queue keeps: {kept}")
        batch = keys.shape[0]
        if labels is not None:
            checks.check_ids("labels", labels, batch, "B", self.keys.device)
        kept_rows = min(batch, self.size)
        first = self.pointer + (batch - kept_rows)
        slots = (first + torch.arange(kept_rows, device=self.keys.device)) % self.size  # fault: queue-batch-overflows
        self.keys.index_copy_(0, slots, keys[batch - kept_rows :].to(self.keys.dtype))
        if labels is not None and self.labels is not None:
            self.labels.index_copy_(0, slots, labels[batch - kept_rows :])
        self.pointer.copy_((self.pointer + batch) % self.size)
        self.fill.copy_((self.fill + batch).clamp(max=self.size))

    def filled(self) -> Tensor:
        """(fill, D), the real keys in the order of their slots. Reads `fill`: on a GPU it waits."""
        return self.keys[: int(self.fill)]
