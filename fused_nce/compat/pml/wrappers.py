"""Losses around losses: with a memory of past batches, of two views, and the one of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.compat.base import tensor
from fused_nce.compat.pml.base import INSTALLED, Indices, PairLoss, Rows, Upstreams, upstreams
from fused_nce.compat.processes import check_ddp_compat, gradient_times, rank
from fused_nce.core import checks
from fused_nce.core.group import gathered, world_size
from fused_nce.losses.common import check_rows, widened


class CrossBatchMemory(Upstreams, upstreams("CrossBatchMemory")):  # type: ignore[misc]
    """A loss of a batch with the rows of past batches, its own included; a row and its own copy are no pair.

    The memory follows the batches to their device, and has the widest of their dtypes.

    Args:
        loss: one of this module, or one of upstream's.
        embedding_size: D.
        memory_size: K rows.
        miner: upstream's, whose choice goes to upstream's code.
        options: upstream's `collect_stats`.

    Attributes:
        embedding_memory: (K, D), as they came.
        label_memory: (K,).
        curr_batch_idx: slots of the last batch.
        queue_idx: where the next row goes.
        has_been_filled: whether all K rows are real. Both are saved in the state's metadata; where a state has none, as
            upstream's, its real rows are those up to the last that is not all 0.
    """

    HOOKS = ("create_indices_tuple",)
    CARRIED = ("queue_idx", "has_been_filled")
    SHOWN = ("embedding_size", "memory_size")
    embedding_memory: Tensor
    label_memory: Tensor
    loss: nn.Module
    embedding_size: int
    memory_size: int
    queue_idx: int

    def __init__(
        self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner: Any = None, **options: Any
    ) -> None:
        known = ("loss", "embedding_size", "memory_size", "miner", "collect_stats")
        checks.check_names("CrossBatchMemory", options, known)
        embedding_size = checks.checked_int("embedding_size", embedding_size, at_least=1)
        memory_size = checks.checked_int("memory_size", memory_size, at_least=1)
        words = {"loss": loss, "embedding_size": embedding_size, "memory_size": memory_size, "miner": miner}
        super().__init__(**words, **options)
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
        reason = self.reason or ("indices_tuple" if indices_tuple is not None else None)
        if reason is not None:
            return self.upstream(reason, embeddings, labels, indices_tuple, enqueue_mask)
        checks.check_tensor("embeddings", embeddings, ("N", "D"))
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(f"embeddings: got width D = {embeddings.shape[1]}, need {self.embedding_size}")
        if tensor("labels", labels).shape != embeddings.shape[:1]:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, need (N,) = {tuple(embeddings.shape[:1])}")
        labels = labels.to(embeddings.device)
        first = self.queue_idx
        if enqueue_mask is None:
            if len(embeddings) > self.memory_size:
                raise ValueError(f"embeddings: got N = {len(embeddings)}, need <= memory_size = {self.memory_size}")
            self.add_to_memory(embeddings, labels, len(embeddings))
            k, other = self._filled(embeddings)
            if first + len(embeddings) > self.memory_size:  # the batch lies around the end: turn the ring
                k, other, first = k.roll(-first, 0), other.roll(-first), 0  # fault: pml-memory-turns
            rows = Rows.of_labels(embeddings, labels, k, other, first)
        else:
            mask = enqueue_mask.to(embeddings.device)
            self.add_to_memory(embeddings[mask], labels[mask], int(mask.sum()))
            rows = Rows.of_labels(embeddings[~mask], labels[~mask], *self._filled(embeddings), None)
        if not len(rows.q) or not len(rows.other_ids):
            return 0 * widened(embeddings).sum()
        found: Tensor = self.loss.of(rows)  # type: ignore[operator]
        return found

    @property
    def reason(self) -> str | None:
        """What the kernels cannot honour; None for nothing."""
        if self.overridden is not None:
            return f"{self.overridden} of its own"
        if not isinstance(self.loss, PairLoss):
            return f"loss={type(self.loss).__module__}.{type(self.loss).__name__}"
        return self.loss.reason or ("miner" if self.miner else None)

    def _filled(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The real rows and their labels. They are copies, for the next batch may enter before this one's backward."""
        end = self.memory_size if self.has_been_filled else self.queue_idx
        k = self.embedding_memory[:end]
        k = k if getattr(self.loss, "normalize", False) else k.to(like.dtype, copy=True)
        return k, self.label_memory[:end].clone()

    @torch.no_grad()
    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Put rows in, over the oldest; of more than K the last K stay."""
        empty = not (self.queue_idx or self.has_been_filled)
        for name, new in (("embedding_memory", embeddings), ("label_memory", labels)):
            old = getattr(self, name)
            dtype = new.dtype if empty else torch.promote_types(old.dtype, new.dtype)  # fault: pml-memory-dtype
            setattr(self, name, old.to(new.device, dtype))
        slots = (self.queue_idx + torch.arange(batch_size, device=labels.device)) % self.memory_size
        kept = slots[-self.memory_size :]
        self.embedding_memory.index_copy_(0, kept, embeddings[batch_size - len(kept) :].to(self.embedding_memory.dtype))
        self.label_memory.index_copy_(0, kept, labels[batch_size - len(kept) :].to(self.label_memory.dtype))
        self.curr_batch_idx = slots
        self.has_been_filled |= self.queue_idx + batch_size >= self.memory_size
        self.queue_idx = (self.queue_idx + batch_size) % self.memory_size

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        formerly = state_dict.pop(f"{prefix}_extra_state", None)  # of this package's older states
        local_metadata = {**(formerly or {}), **local_metadata}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if "queue_idx" not in local_metadata:
            real = (self.embedding_memory != 0).any(dim=1).nonzero()
            end = int(real[-1]) + 1 if len(real) else 0
            self.queue_idx, self.has_been_filled = end % self.memory_size, end == self.memory_size


MEMORIES = (CrossBatchMemory, upstreams("CrossBatchMemory")) if INSTALLED else (CrossBatchMemory,)


def _why_not(loss: nn.Module) -> str | None:
    if isinstance(loss, Upstreams):
        return loss.reason
    return f"loss={type(loss).__module__}.{type(loss).__name__}"


class SelfSupervisedLoss(Upstreams, upstreams("SelfSupervisedLoss")):  # type: ignore[misc]
    """A loss of two views: row i of each is the other's positive.

    Args:
        loss: one of this module, or one of upstream's.
        symmetric: both views are rows, each among both; otherwise the first are rows and the second columns.
    """

    SHOWN = ("symmetric",)
    loss: nn.Module

    def __init__(self, loss: nn.Module, symmetric: bool = True) -> None:
        super().__init__(loss=loss, symmetric=symmetric)

    @property
    def reason(self) -> str | None:
        """What the kernels cannot honour; None for nothing."""
        return _why_not(self.loss)

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


class DistributedLossWrapper(Upstreams, upstreams("DistributedLossWrapper", "utils.distributed")):  # type: ignore[misc]
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

    SHOWN = ("efficient", "ddp_compat")
    loss: nn.Module
    efficient: bool

    def __init__(self, loss: nn.Module, efficient: bool = False, *, ddp_compat: str = "upstream") -> None:
        if efficient and isinstance(loss, MEMORIES):
            raise ValueError("efficient: got True with a CrossBatchMemory, need False")
        super().__init__(loss=loss, efficient=efficient)
        self.ddp_compat = check_ddp_compat(ddp_compat)

    @property
    def reason(self) -> str | None:
        """What the kernels cannot honour; None for nothing."""
        return _why_not(self.loss)

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
            embeddings = gradient_times(embeddings, size)  # fault: processes-pml-wrapper
            ref_emb = None if ref_emb is None else gradient_times(ref_emb, size)
        rows, ids, columns, column_ids = map(_of_all, (embeddings, labels, ref_emb, ref_labels))
        if isinstance(self.loss, MEMORIES):
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
            return self.loss.of(Rows.of_labels(embeddings, labels, columns, column_ids, 0))  # type: ignore[operator]
        if indices_tuple is None:
            if not INSTALLED:
                raise NotImplementedError(
                    "efficient: got True with what is not fused, need pytorch-metric-learning installed"
                )
            indices_tuple = upstreams("get_indices_tuple", "utils.distributed")(labels, column_ids)
        found: Tensor = self.loss(embeddings, labels, indices_tuple, columns, column_ids)
        return found


def _of_all(x: Tensor | None) -> Tensor | None:
    """This process's rows first, with their gradient, then those of the others by rank, without."""
    if x is None or world_size() == 1:
        return x
    parts = gathered(x.view(torch.uint8) if x.dtype == torch.bool else x).to(x.dtype).chunk(world_size())
    return torch.cat([x, *(part for i, part in enumerate(parts) if i != rank())])  # fault: processes-pml-rows
