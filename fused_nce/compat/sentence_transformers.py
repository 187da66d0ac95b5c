"""sentence-transformers' losses of in-batch negatives (sentence_transformers.sentence_transformer.losses, 6.2).

Each class is upstream's with its sum over score matrices replaced: models, trainers, prompts and configuration see the
class that they know, and settings may be changed on it as before. What has no twin is refused when it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.util import batch_to_device, cos_sim, dot_score
from torch import Tensor, nn

from fused_nce.core.group import Group
from fused_nce.losses import blocks, candidates
from fused_nce.losses.candidates import Batch, Rules
from fused_nce.losses.info_nce import info_nce

DIRECTIONS = {"query_to_doc": "q2k", "doc_to_query": "k2q", "query_to_query": "q2q", "doc_to_doc": "k2k"}
SIMILARITIES = {cos_sim: True, dot_score: False}  # whether rows are normalised


def _everyone(gathered: bool) -> Group:
    """All processes where upstream would gather from them."""
    return "world" if gathered and dist.is_available() and dist.is_initialized() else None


def ranking(loss: Any, embeddings: Sequence[Tensor]) -> Tensor:
    """The mean loss of columns of embeddings, (N, D) each: queries, documents, hard negatives; by the loss's settings.

    Raises:
        NotImplementedError: for another similarity than `cos_sim` and `dot_score`.
        ValueError: for fewer than two columns.
    """
    if len(embeddings) < 2:
        raise ValueError(f"embeddings: got {len(embeddings)} columns, need at least 2")
    if loss.similarity_fct not in SIMILARITIES:
        raise NotImplementedError(f"similarity_fct: got {loss.similarity_fct}, need cos_sim or dot_score")
    unit, group = SIMILARITIES[loss.similarity_fct], _everyone(loss.gather_across_devices)
    q, k, *rest = embeddings
    alpha = loss.hardness_strength if loss.hardness_mode is not None else 0.0
    directions = tuple(name for name in candidates.DIRECTIONS if name in {DIRECTIONS[x] for x in loss.directions})
    h = torch.stack(rest, dim=1) if rest else None
    hardness = alpha if loss.hardness_mode != "hard_negatives" else 0.0
    own_hardness = alpha if rest and loss.hardness_mode != "in_batch_negatives" else 0.0
    if directions == ("q2k",) and (h is None or hardness == own_hardness):
        return info_nce(
            q,
            k,
            temperature=1 / loss.scale,
            normalize=unit,
            hard_negatives=h,
            share_hard_negatives=bool(rest),
            hardness=hardness,
            group=group,
        ).loss
    rules = Rules(
        directions=directions,
        joint=loss.partition_mode == "joint",
        shared=("q2k", "k2k") if rest else (),
        hardness=hardness,
        own_hardness=own_hardness,
    )
    x = candidates.checked(Batch(q, k, None, h), rules)
    return blocks.contrast(candidates.unit_rows(x) if unit else x, float(loss.scale), rules, group=group).loss


def guided(loss: Any, embeddings: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
    """The same of GISTEmbed: anchors, positives, negatives, and the guide's embeddings of them.

    A row is its own candidate, as upstream has it, unless the guide takes it out: it stays where the positive is its
    equal or the margin is negative.
    """
    q, k, *rest = embeddings
    h = torch.stack(list(rest), dim=1) if rest else None
    guide = (*guides[:2], torch.stack(list(guides[2:]), dim=1)) if rest else tuple(guides[:2])
    rules = Rules(
        directions=("q2k",) + ("q2q",) * loss.contrast_anchors + ("k2k",) * loss.contrast_positives,
        joint=True,
        shared=("q2k",) if rest else (),
        filter_own=bool(rest),
        guide_margin=loss.margin,
        relative=loss.margin_strategy == "relative",
        local=("q2q",),
        itself=True,
    )
    x = candidates.unit_rows(candidates.checked(Batch(q, k, None, h, guide=guide), rules))
    return blocks.contrast(x, 1 / loss.temperature, rules, group=_everyone(loss.gather_across_devices)).loss


# ---- classes ----------------------------------------------------------------------------------------------------


class _Ranking:
    """The score matrices of `MultipleNegativesRankingLoss`, tile by tile."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """(N, D) each; 0-d."""
        return ranking(self, embeddings)


class _Cached:
    """Of a loss that has all embeddings at once, and their gradients before it returns."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Of the embeddings' parts; `with_backward` leaves the gradients in them, and the loss has no graph."""
        return _ended(ranking(self, [torch.cat(parts) for parts in reps]), with_backward)


def _ended(loss: Tensor, with_backward: bool) -> Tensor:
    if not with_backward:
        return loss
    loss.backward()
    return loss.detach()


class MultipleNegativesRankingLoss(_Ranking, theirs.MultipleNegativesRankingLoss):
    """InfoNCE of queries among documents; all of upstream's settings."""


class MultipleNegativesSymmetricRankingLoss(_Ranking, theirs.MultipleNegativesSymmetricRankingLoss):
    """Of both directions."""


class CachedMultipleNegativesRankingLoss(_Cached, theirs.CachedMultipleNegativesRankingLoss):
    """The same with cached gradients: `mini_batch_size` is the encoder's alone, the loss takes the batch at once."""


class CachedMultipleNegativesSymmetricRankingLoss(_Cached, theirs.CachedMultipleNegativesSymmetricRankingLoss):
    """Of both directions."""


class GISTEmbedLoss(theirs.GISTEmbedLoss):
    """InfoNCE in which a guide finds false negatives."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Of tokenized columns: anchors, positives and, with three, negatives."""
        columns = list(sentence_features)
        if len(columns) not in (2, 3):
            raise ValueError(f"sentence_features: got {len(columns)} columns, need 2 or 3")
        seen = [dict(x) for x in columns]  # the guide writes into its own
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                seen = [batch_to_device(self.guide.preprocess(self._texts(x)), self.guide.device) for x in columns]
            guides = embed_columns(self.guide, seen)
        return self.loss_of(embeddings, guides)

    def loss_of(self, embeddings: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
        """Of the columns' embeddings and the guide's."""
        return guided(self, embeddings, guides)

    def _texts(self, x: dict[str, Any]) -> list[str]:
        """What the tokens stand for."""
        ids = x["input_ids"]
        if "cu_seq_lens_q" in x:  # one sequence that all texts are packed into
            ids = ids[0].tensor_split(x["cu_seq_lens_q"][1:-1].cpu())
        return cast(list[str], self.tokenizer.batch_decode([row.tolist() for row in ids], skip_special_tokens=True))


class CachedGISTEmbedLoss(theirs.CachedGISTEmbedLoss):
    """The same with cached gradients."""

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Of the embeddings' parts and the guide's."""
        embeddings, guides = ([torch.cat(parts) for parts in x] for x in (reps, reps_guided))
        return _ended(guided(self, embeddings, guides), with_backward)


# ---- in place of a finished loss --------------------------------------------------------------------------------


def replaced(loss: Any) -> Any:
    """A loss of upstream's as its twin here, with the same model, guide and settings.

    Raises:
        NotImplementedError: for settings that it has no twin of.
    """
    ours = copy.copy(loss)
    ours.__class__ = globals()[type(loss).__name__]
    ours._modules = dict(loss._modules)
    if getattr(loss, "similarity_fct", cos_sim) not in SIMILARITIES and hasattr(loss, "directions"):
        raise NotImplementedError(f"similarity_fct: got {loss.similarity_fct}, need cos_sim or dot_score")
    # `MatryoshkaLoss` has put itself around the method of a cached loss: around the twin's now.
    around = ours.__dict__.pop("calculate_loss", None)
    if around is not None:
        ours.calculate_loss = copy.copy(around)
        ours.calculate_loss.fn = type(ours).calculate_loss.__get__(ours)
    return ours


def embedded(loss: Any, ours: Any) -> tuple[Any, str, Callable[..., Any]]:
    """(who holds the twin's method that takes embeddings, its name, upstream's of the same arguments)."""
    if isinstance(loss, theirs.GISTEmbedLoss):
        return ours, "loss_of", lambda embeddings, guides: _gist_of(loss, embeddings, guides)
    if not hasattr(loss, "calculate_loss"):
        return ours, "compute_loss_from_embeddings", loss.compute_loss_from_embeddings
    around = vars(loss).get("calculate_loss")
    if around is not None:
        return ours.calculate_loss, "fn", around.fn
    return ours, "calculate_loss", loss.calculate_loss


def _gist_of(loss: Any, embeddings: Sequence[Tensor], guides: Sequence[Tensor]) -> Tensor:
    """Upstream's loss where model and guide give these, which each finds in the features."""
    bare = copy.copy(loss)
    bare.must_retokenize = False
    bare._modules = dict(loss._modules)
    bare.model, bare.guide = _Given("own"), _Given("guide")
    columns = [{"own": x, "guide": y} for x, y in zip(embeddings, guides, strict=True)]
    return cast(Tensor, bare(columns, None))


class _Given(nn.Module):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """The embeddings in the features."""
        return {"sentence_embedding": features[self.key]}
