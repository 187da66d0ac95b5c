"""Losses around losses: with a memory of past batches, of two views, and the one of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.compat.pml.base import Indices, PairLoss, Rows, class_ids, upstream
from fused_nce.compat.processes import check_ddp_compat, gathered, gradient_times, rank, world_size
from fused_nce.core import checks
from fused_nce.losses.common import check_rows, widened


class CrossBatchMemory(nn.Module):
    """A loss of a batch with the rows of past batches, its own included; a row and its own copy are no pair.

    Args:
        loss: one of this module, or one of upstream's.
        embedding_size: D.
        memory_size: K rows.
        miner: upstream's, whose choice goes to upstream's code.

    Attributes:
        embedding_memory: (K, D), as they came.
        label_memory: (K,) int64.
        queue_idx: where the next row goes.
        has_been_filled: whether all K rows are real. Both are saved in the state; upstream's lacks them, and of such a
            state the real rows are those that are not all 0.
    """

    embedding_memory: Tensor
    label_memory: Tensor

    def __init__(
        self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner: Any = None, **options: Any
    ) -> None:
        super().__init__()
        if options:
            raise TypeError(f"CrossBatchMemory: got {sorted(options)[0]}, need loss, sizes and a miner")
        for name, value in (("embedding_size", embedding_size), ("memory_size", memory_size)):
            checks.check_int(name, value)
            if value < 1:
                raise ValueError(f"{name}: got {value}, need >= 1")
        self.loss, self.miner, self.embedding_size, self.memory_size = loss, miner, embedding_size, memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        """As new: empty."""
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.int64))
        self.queue_idx, self.has_been_filled = 0, False

    def forward(
        self,
        embeddings: Tensor,  # (N, D)
        labels: Tensor,  # (N,), integers
        indices_tuple: Indices | None = None,
        enqueue_mask: Tensor | None = None,  # (N,) bool
    ) -> Tensor:
        """The loss of the batch with the memory, which it enters first.

        Args:
            embeddings: without a mask at most K.
            labels: as of the loss.
            indices_tuple: a choice of pairs within the batch. Goes to upstream's code.
            enqueue_mask: rows that only enter the memory; the others are only compared with it.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value needed.
            NotImplementedError: for what only upstream can honour, where it is not installed.
        """
        if indices_tuple is not None and enqueue_mask is not None:
            raise ValueError("enqueue_mask: got one with indices_tuple, need one of the two")
        reason = self._why_not(indices_tuple)
        if reason is not None:
            return self._run_upstream(reason, embeddings, labels, indices_tuple, enqueue_mask)
        checks.check_tensor("embeddings", embeddings, ("N", "D"))
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings: got width D = {embeddings.shape[1]}, need {self.embedding_size}")
        ids = class_ids("labels", labels, embeddings)
        first = self.queue_idx
        if enqueue_mask is None:
            if len(embeddings) > self.memory_size:
                raise ValueError(f"embeddings: got N = {len(embeddings)}, need <= memory_size = {self.memory_size}")
            self.add_to_memory(embeddings, ids)
            rows = Rows(embeddings, ids, *self._filled(), first)
            if first + len(embeddings) > self.memory_size:  # the batch lies around the end: turn the ring
                k, other = (x.roll(-first, 0) for x in self._filled())
                rows = Rows(embeddings, ids, k, other, 0)
        else:
            mask = enqueue_mask.to(embeddings.device)
            self.add_to_memory(embeddings[mask], ids[mask])
            rows = Rows(embeddings[~mask], ids[~mask], *self._filled(), None)
        if not len(rows.q) or not len(rows.other_ids):
            return 0 * widened(embeddings).sum()
        found: Tensor = self.loss.of(rows)  # type: ignore[operator]
        return found

    def _why_not(self, indices_tuple: Indices | None) -> str | None:
        if not isinstance(self.loss, PairLoss):
            return f"loss={type(self.loss).__module__}.{type(self.loss).__name__}"
        return self.loss.reason or ("miner" if self.miner else "indices_tuple" if indices_tuple is not None else None)

    def _filled(self) -> tuple[Tensor, Tensor]:
        end = self.memory_size if self.has_been_filled else self.queue_idx
        k, ids = self.embedding_memory[:end], self.label_memory[:end].clone()
        # The next batch may enter before this one's backward: what is compared is a copy, of unit rows or as it is.
        return k if getattr(self.loss, "normalize", False) else k.clone(), ids

    @torch.no_grad()
    def add_to_memory(self, embeddings: Tensor, labels: Tensor) -> None:
        """Put rows in, over the oldest; of more than K the last K stay."""
        n, kept = len(embeddings), min(len(embeddings), self.memory_size)
        slots = (self.queue_idx + torch.arange(n - kept, n, device=self.embedding_memory.device)) % self.memory_size
        self.embedding_memory.index_copy_(0, slots, embeddings[n - kept :].to(self.embedding_memory.dtype))
        self.label_memory.index_copy_(0, slots, labels[n - kept :])
        self.has_been_filled |= self.queue_idx + n >= self.memory_size
        self.queue_idx = (self.queue_idx + n) % self.memory_size

    def _run_upstream(self, reason: str, *arguments: Any) -> Tensor:
        """Upstream's class for one call, on this memory."""
        theirs = upstream("CrossBatchMemory", reason)(self.loss, self.embedding_size, self.memory_size, self.miner)
        shared = ("embedding_memory", "label_memory", "queue_idx", "has_been_filled")
        for name in shared:
            setattr(theirs, name, getattr(self, name))
        loss: Tensor = theirs(*arguments)
        for name in shared:
            setattr(self, name, getattr(theirs, name))
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        """What upstream does not save."""
        return {"queue_idx": self.queue_idx, "has_been_filled": self.has_been_filled}

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Of a state of upstream's, which has none, by the rows that are not all 0."""
        if state is None:
            real = int((self.embedding_memory != 0).any(dim=1).sum())
            state = {"queue_idx": real % self.memory_size, "has_been_filled": real == self.memory_size}
        self.queue_idx, self.has_been_filled = int(state["queue_idx"]), bool(state["has_been_filled"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SelfSupervisedLoss(nn.Module):
    """A loss of two views: row i of each is the other's positive.

    Args:
        loss: one of this module, or one of upstream's.
        symmetric: both views are rows, each among both; otherwise the first are rows and the second columns.
    """

    def __init__(self, loss: nn.Module, symmetric: bool = True) -> None:
        super().__init__()
        self.loss, self.symmetric = loss, symmetric

    def forward(
        self,
        embeddings: Tensor,  # (N, D)
        ref_emb: Tensor,  # (N, D)
    ) -> Tensor:
        """The loss, 0-d."""
        check_rows("embeddings", embeddings, "ref_emb", ref_emb, same_n=True)
        labels = torch.arange(len(embeddings), device=embeddings.device)
        if self.symmetric:
            found: Tensor = self.loss(torch.cat((embeddings, ref_emb)), labels.repeat(2))
        else:
            found = self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone())
        return found


class DistributedLossWrapper(nn.Module):
    """A loss of the rows of all W processes, each of which computes it whole.

    Upstream multiplies the loss by W, so that DDP's mean of the processes' gradients is the whole batch's. With
    `efficient` a process compares its own rows with all, as constants: under DDP about W times the gradient, in another
    direction.

    Args:
        loss: one of this module, or one of upstream's.
        efficient: see above.
        ddp_compat: "upstream" reports W times the loss and obeys `efficient`; "exact" reports the loss itself, and its
            gradient is the whole batch's.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    def __init__(self, loss: nn.Module, efficient: bool = False, *, ddp_compat: str = "upstream") -> None:
        super().__init__()
        if efficient and type(loss).__name__ == "CrossBatchMemory":
            raise ValueError("efficient: got True with a CrossBatchMemory, need False")
        self.loss, self.efficient, self.ddp_compat = loss, efficient, check_ddp_compat(ddp_compat)

    def forward(
        self,
        embeddings: Tensor,  # (N, D), as many on every process
        labels: Tensor | None = None,  # (N,), integers
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,  # (M, D)
        ref_labels: Tensor | None = None,  # (M,), integers
        enqueue_mask: Tensor | None = None,  # (N,) bool, of a CrossBatchMemory
    ) -> Tensor:
        """The loss, 0-d. Rows of `indices_tuple` count this process's first, then the others' by rank.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value needed.
            NotImplementedError: for what only upstream can honour, where it is not installed.
        """
        size, exact = world_size(), self.ddp_compat == "exact"
        if size > 1 and exact:
            embeddings = gradient_times(embeddings, size)
            ref_emb = None if ref_emb is None else gradient_times(ref_emb, size)
        rows, ids, columns, column_ids = map(_of_all, (embeddings, labels, ref_emb, ref_labels))
        if type(self.loss).__name__ == "CrossBatchMemory":
            if ref_emb is not None or ref_labels is not None:
                raise ValueError("ref_emb: got one with a CrossBatchMemory, need None")
            found: Tensor = self.loss(rows, ids, indices_tuple, _of_all(enqueue_mask))
        elif self.efficient and size > 1 and not exact:
            chosen = (rows, ids) if ref_emb is None else (columns, column_ids)
            found = self._against_constants(embeddings, labels, indices_tuple, *chosen, ref_emb is not None)
        else:
            found = self.loss(rows, ids, indices_tuple, columns, column_ids)
        return found if exact else found * size

    def _against_constants(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        columns: Tensor | None,
        column_ids: Tensor | None,
        references: bool,
    ) -> Tensor:
        """This process's rows with all, of which its own stand first; row i with column i is no pair."""
        plain = isinstance(self.loss, PairLoss) and self.loss.reason is None and not references
        if plain and indices_tuple is None and labels is not None and columns is not None and column_ids is not None:
            ids, all_ids = class_ids("labels", labels, embeddings), class_ids("labels", column_ids, columns)
            return self.loss.of(Rows(embeddings, ids, columns, all_ids, 0))  # type: ignore[operator]
        if indices_tuple is None:
            pairs = upstream("get_indices_tuple", "efficient=True of this kind", "utils.distributed")
            indices_tuple = pairs(labels, column_ids)
        found: Tensor = self.loss(embeddings, labels, indices_tuple, columns, column_ids)
        return found


def _of_all(x: Tensor | None) -> Tensor | None:
    """This process's rows first, with their gradient, then those of the others by rank, without."""
    if x is None or world_size() == 1:
        return x
    parts = gathered(x.view(torch.uint8) if x.dtype == torch.bool else x).to(x.dtype).chunk(world_size())
    return torch.cat([x, *(part for i, part in enumerate(parts) if i != rank())])
