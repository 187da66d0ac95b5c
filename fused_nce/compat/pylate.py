"""PyLate's contrastive losses of late interaction (pylate.losses, 1.6), their token scores in tiles.

A score is Σ_s max_t ⟨q_s, d_t⟩ over a query's tokens s and a document's t: a sum of maxima of dot products, not a dot
product of two rows, so no kernel here has it. What grows with the square of the batch is the (queries, documents, s, t)
tensor of upstream's plain torch; the (queries, documents) scores are few beside it. Here queries come a few at a time,
and each such tile is made again in the backward: twice the dot products forward, and one tile's memory, not all.
On a GPU with one of PyLate's own kernels (flash-maxsim, late-interaction-kernels) there is nothing to gain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pylate import losses as theirs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_nce.core.workspace import limit_bytes

HELD = 4
"""Tensors of a tile at once: its scores, those that the mask leaves, and the gradients of both."""


class Tiles:
    """A score metric that is given as many queries at a time as a workspace holds, one at least.

    Args:
        metric: of queries (Q, s, D) and documents (B, N, t, D), with their masks; (Q, B·N), each row of its own query.
    """

    def __init__(self, metric: Callable[..., Tensor]) -> None:
        self.metric = metric

    def __call__(
        self,
        queries_embeddings: Tensor,  # (Q, s, D)
        documents_embeddings: Tensor,  # (B, N, t, D)
        queries_mask: Tensor | None = None,  # (Q, s)
        documents_mask: Tensor | None = None,  # (B, N, t)
        **options: Any,
    ) -> Tensor:
        """(Q, B·N)."""
        return self.scores(queries_embeddings, documents_embeddings, queries_mask, documents_mask, **options)

    def scores(self, q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, **options: Any) -> Tensor:
        """The same."""
        rows = max(1, limit_bytes(q.device.type) // (HELD * q.element_size() * q.shape[1] * d.shape[0] * d.shape[2]))
        if rows >= q.shape[0]:
            return self.metric(q, d, queries_mask=q_mask, documents_mask=d_mask, **options)

        def tile(q: Tensor, d: Tensor, q_mask: Tensor | None) -> Tensor:
            return self.metric(q, d, queries_mask=q_mask, documents_mask=d_mask, **options)

        masks = [None] * q.shape[0] if q_mask is None else q_mask.split(rows)
        parts = [
            checkpoint(tile, part, d, mask, use_reentrant=False, preserve_rng_state=False)
            for part, mask in zip(q.split(rows), masks, strict=False)
        ]
        return torch.cat(parts)


class _Tiled:
    """Of a loss whose `score_metric` is in tiles."""

    score_metric: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.score_metric = Tiles(self.score_metric)


class Contrastive(_Tiled, theirs.Contrastive):
    """Cross entropy of queries among all documents; upstream's words."""


class CachedContrastive(_Tiled, theirs.CachedContrastive):
    """The same with cached gradients, which are upstream's: the batch size times those of `Contrastive`."""


def replaced(loss: Any) -> Any:
    """A loss of upstream's as its twin here, with the same model and settings."""
    ours = copy.copy(loss)
    ours.__class__ = globals()[type(loss).__name__]
    ours._modules = dict(loss._modules)
    ours.score_metric = Tiles(loss.score_metric)
    return ours


def embedded(loss: Any, ours: Any) -> tuple[Any, str, Callable[..., Any]]:
    """(who holds the twin's method that takes embeddings, its name, upstream's of the same arguments)."""

    def scores(q: Tensor, d: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, **options: Any) -> Any:
        return loss.score_metric(q, d, queries_mask=q_mask, documents_mask=d_mask, **options)

    return ours.score_metric, "scores", scores
