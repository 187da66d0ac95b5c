"""FlagEmbedding's in-batch loss (FlagEmbedding.finetune.embedder, 1.4): encoder-only, decoder-only and ICL models.

Nothing of upstream is imported: a model, which holds the loss, keeps its class and gains `InBatch` before it. The M3
model adds sparse and late interaction scores to the dense ones, which are no dot product of two rows: it stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fused_nce.compat import grouped
from fused_nce.compat.base import Adapter, standing_in
from fused_nce.losses.common import row_dots

Scored = tuple[Tensor | None, Tensor]
KINDS = ("kl_div", "m3_kd_loss")


class InBatch(Adapter):
    """The three losses that a model chooses among; each returns (scores or None, loss). Nobody reads the scores."""

    temperature: Any
    kd_loss_type: Any
    UPSTREAM = "FlagEmbedding"
    HOOKS = (
        *("compute_score", "compute_loss", "_compute_similarity", "compute_local_score", "get_local_score"),
        *("distill_loss", "_dist_gather_tensor"),
    )

    def _compute_in_batch_neg_loss(
        self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None = None
    ) -> Scored:
        return None, self.loss_of(q_reps, p_reps, teacher_targets, False)

    def _compute_cross_device_neg_loss(
        self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None = None
    ) -> Scored:
        return None, self.loss_of(q_reps, p_reps, teacher_targets, True)

    def _compute_no_in_batch_neg_loss(
        self, q_reps: Tensor, p_reps: Tensor, teacher_targets: Tensor | None = None
    ) -> Scored:
        """Of each query's own passages: (N, G) scores, where upstream makes all N·N·G first."""
        own = row_dots(q_reps, p_reps.view(q_reps.shape[0], grouped.group_size(q_reps, p_reps), -1)) / self.temperature
        first = own.logsumexp(dim=1) - own[:, 0]
        if teacher_targets is None:
            return own, first.mean()
        loss = self._distilled(own, None, teacher_targets).mean()
        return own, loss + first.mean() if self.kd_loss_type == "kl_div" else loss

    def loss_of(self, q: Tensor, p: Tensor, teacher: Tensor | None, everywhere: bool) -> Tensor:
        """Of (N, D) queries and (N·G, D) passages, the teacher's probabilities (N, G) of each query's own.

        Raises:
            ValueError: for a `kd_loss_type` that upstream has not.
        """
        if teacher is None:
            return grouped.in_batch(q, p, self.temperature, grouped.group_size(q, p), everywhere=everywhere)
        whole = grouped.of_all if everywhere else lambda x: x
        own, others = grouped.scores(q, p, self.temperature, everywhere=everywhere)
        distilled = self._distilled(own, others, teacher).mean()
        if self.kd_loss_type == "m3_kd_loss":
            return whole(distilled)
        return distilled + whole(grouped.one_of(own, others).mean())

    def _distilled(self, own: Tensor, others: Tensor | None, teacher: Tensor) -> Tensor:
        """(N,): the teacher's cross entropy, or each passage's own loss, weighted by its teacher's probability."""
        if self.kd_loss_type == "kl_div":
            return -(own.log_softmax(dim=1) * teacher).sum(dim=1)
        if self.kd_loss_type != "m3_kd_loss" or others is None:
            raise ValueError(f"kd_loss_type: got {self.kd_loss_type!r}, need one of {KINDS} with negatives")
        parts = [grouped.one_of(own, others, i) for i in range(own.shape[1])]
        return (teacher * torch.stack(parts, dim=1)).sum(dim=1)


def replaced(theirs: Any) -> Any:
    """A model of upstream's as its twin here, with the same encoder and settings."""
    return standing_in(theirs, InBatch)


def embedded(theirs: Any, ours: Any) -> tuple[Any, str, Callable[..., Any]]:
    """(who holds the twin's method that takes embeddings, its name, upstream's of the same arguments)."""
    names = ("_compute_in_batch_neg_loss", "_compute_cross_device_neg_loss")
    return ours, "loss_of", lambda q, p, t, everywhere: cast(Tensor, getattr(theirs, names[everywhere])(q, p, t)[1])
