"""Tevatron's loss of in-batch negatives: 0.1.0's, and that of the second version (tevatron.retriever).

Nothing of upstream is imported: the models, which hold the loss, keep their class and gain `InBatch` before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fused_nce.compat import grouped
from fused_nce.compat.base import Adapter, standing_in
from fused_nce.compat.processes import world_size
from fused_nce.core import checks
from fused_nce.losses.info_nce import info_nce


class SimpleContrastiveLoss:
    """Cross entropy of the dot products of (N, D) queries and (M, D) passages, without a temperature.

    Args:
        n_target: passages a query, of which the first is its positive; None for M / N.
    """

    def __init__(self, n_target: int | None = 1) -> None:
        self.target_per_qry = None if n_target is None else checks.checked_int("n_target", n_target)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """`loss_of`."""
        return self.loss_of(*args, **options)

    def loss_of(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss in nats, 0-d; (N,) under reduction "none". `target`: (N,) int64, the passage of each query.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value needed.
        """
        if target is None:
            target = torch.arange(x.shape[0], device=x.device) * self._size(x, y)
        return info_nce(x, y, target, temperature=1.0, reduction=reduction).nce

    def _size(self, x: Tensor, y: Tensor) -> int:
        size = grouped.group_size(x, y)
        if self.target_per_qry not in (None, size):
            raise ValueError(f"y: got {y.shape[0]} passages, need {self.target_per_qry} for each of {x.shape[0]}")
        return size


class DistributedContrastiveLoss(SimpleContrastiveLoss):
    """The same among the rows of all processes, which have as many each; its mean alone.

    Args:
        n_target: as above. (0, upstream's default, serves no call upstream.)
        scale_loss: W times the whole batch's loss, for W processes whose gradients DDP averages.
    """

    def __init__(self, n_target: int | None = 0, scale_loss: bool = True) -> None:
        super().__init__(n_target)
        self.word_size, self.scale_loss = world_size(), scale_loss

    def loss_of(self, x: Tensor, y: Tensor, target: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """The loss in nats, 0-d.

        Raises:
            NotImplementedError: for targets of one's own, or another reduction.
            TypeError, ValueError: naming the argument, the value seen and the value needed.
        """
        if target is not None:
            raise NotImplementedError("target: got one among processes, need None")
        if reduction != "mean":
            raise NotImplementedError(f"reduction: got {reduction!r} among processes, need 'mean'")
        return grouped.in_batch(x, y, 1.0, self._size(x, y), everywhere=True) * (world_size() if self.scale_loss else 1)


class InBatch(Adapter):
    """What a `DenseModel` trains with. In training its output has no `scores`, which nobody reads there."""

    UPSTREAM = "tevatron"
    HOOKS = ("compute_similarity", "compute_loss", "dist_gather_tensor", "_dist_gather_tensor")

    def forward(self, query: Any = None, passage: Any = None) -> Any:
        """The embeddings of both, and in training their loss."""
        if not self.training or not query or not passage:
            return super().forward(query=query, passage=passage)
        out = super().forward(query=query)
        out["p_reps"] = super().forward(passage=passage)["p_reps"]
        out["loss"] = self.loss_of(out["q_reps"], out["p_reps"])
        return out

    def loss_of(self, q: Tensor, p: Tensor) -> Tensor:
        """Of the embeddings of queries and passages."""
        model: Any = self
        if hasattr(self, "train_args"):  # 0.1.0
            temperature, size = 1.0, model.data_args.train_n_passages
            everywhere = model.train_args.negatives_x_device
        else:
            temperature, size, everywhere = model.temperature, grouped.group_size(q, p), model.is_ddp
        loss = grouped.in_batch(q, p, temperature, size, everywhere=everywhere)
        return loss * world_size() if everywhere else loss


# ---- in place of finished ones ------------------------------------------------------------------------------------


def replaced(theirs: Any) -> Any:
    """A model of upstream's with the same encoders, or a loss with the same settings, in ours' place."""
    if not hasattr(theirs, "encode_query"):
        words = {"scale_loss": theirs.scale_loss} if hasattr(theirs, "scale_loss") else {}
        return globals()[type(theirs).__name__](getattr(theirs, "target_per_qry", None), **words)
    return standing_in(theirs, InBatch)


def embedded(theirs: Any, ours: Any) -> tuple[Any, str, Callable[..., Any]]:
    """(who holds the method that takes embeddings, its name, upstream's of the same arguments)."""
    if not hasattr(theirs, "encode_query"):
        return ours, "loss_of", theirs
    return ours, "loss_of", lambda q, p: _loss_of(theirs, q, p)


def _loss_of(theirs: Any, q: Tensor, p: Tensor) -> Tensor:
    """Upstream's loss where its encoders give these."""
    bare = copy.copy(theirs)
    bare.encode_query = lambda x: (None, q) if hasattr(theirs, "train_args") else q
    bare.encode_passage = lambda x: (None, p) if hasattr(theirs, "train_args") else p
    bare.training = True  # not its encoders
    return cast(Tensor, bare(query={"": q}, passage={"": p}).loss)
