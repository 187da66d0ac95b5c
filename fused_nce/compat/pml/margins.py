"""The losses of a margin: pairs and triplets, on Euclidean distances or on similarities, no list of either."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_nce.compat.base import number
from fused_nce.compat.pml.base import PairLoss, Rows, block_pairs, block_scores, class_blocks, upstreams
from fused_nce.core.engine import tile_stats
from fused_nce.core.spec import Bias, Dist, Identity, Labels, Spec, Transform
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.common import widened

SIMILARITIES = ("CosineSimilarity", "DotProductSimilarity")


class _MarginLoss(PairLoss):
    """Of distances, upstream's default, or of similarities, which are the nearer the larger."""

    DISTANCES = ("LpDistance", *SIMILARITIES)
    REDUCER = "AvgNonZeroReducer"

    def unfused(self) -> str | None:
        """Margins that are tensors: they may be learned."""
        learned = [name for name in self.SHOWN if isinstance(getattr(self, name), Tensor)]
        return f"a tensor {learned[0]}" if learned else None

    @property
    def similar(self) -> bool:
        """Of similarities."""
        return self.distance is not None and type(self.distance).__name__ in SIMILARITIES

    def averaged(self, total: Tensor, active: Tensor, every: Tensor) -> Tensor:
        """A sum's mean over all its terms, or, under AvgNonZero, over those above 0; of none, 0."""
        return total / (active if self.reduction == "AvgNonZeroReducer" else every).clamp(min=1)


class _Form(NamedTuple):
    """How a loss reads distances or similarities: t, in which its hinge is at 1, and back to its own unit."""

    transform: Transform
    scale: float
    bias: float | None
    unit: float


class ContrastiveLoss(_MarginLoss, upstreams("ContrastiveLoss")):  # type: ignore[misc]
    """Positive pairs within one margin, negative ones beyond another: the means of the two hinges, added.

    The positive pairs' distances are held, N·|P| numbers; no others.

    Args:
        pos_margin: max(0, d − pos_margin), or max(0, pos_margin − s) of similarities.
        neg_margin: max(0, neg_margin − d), or max(0, s − neg_margin).
        options: as in `PairLoss`; Euclidean distances, cosine or dot products.
    """

    SHOWN = ("pos_margin", "neg_margin")
    LOSSES = ("pos_loss", "neg_loss")
    pos_margin: float
    neg_margin: float

    def __init__(self, pos_margin: float = 0, neg_margin: float = 1, **options: Any) -> None:
        words = {"pos_margin": pos_margin, "neg_margin": neg_margin}
        super().__init__({name: number(name, value) for name, value in words.items()}, options)

    def of(self, rows: Rows) -> Tensor:
        """The two means; of no pairs, 0."""
        rows = rows.normalized() if self.normalize else rows
        positives = self._positives(rows)
        within = self.neg_margin > 0  # that no distance is within leaves its hinge 0
        if self.similar:  # max(0, 1 + t), t = s − neg_margin − 1
            form = _Form(Bias(), 1.0, -1.0 - self.neg_margin, 1.0)
        else:  # t = −d / neg_margin
            form = _Form(Dist(), self.neg_margin**-2.0 if within else 1.0, None, self.neg_margin if within else 0.0)
        names = ("neg_hinge", "neg_active", "pos_count")
        spec = Spec(Labels(), form.transform, names, drop_self=rows.itself is not None)
        found = tile_stats(rows.q, rows.k, spec, scale=form.scale, bias=form.bias, **rows.where)
        hinges, active, own = (fixed_sum(found[name]) for name in names)
        columns = len(rows.other_ids) - (rows.itself is not None)
        negatives = len(rows.q) * columns - own
        return self.reduced(positives) + self.averaged(form.unit * hinges, active, negatives)

    def _positives(self, rows: Rows) -> Tensor:
        """The hinges of all positive pairs, one after the other; of distances by the differences themselves."""
        losses = [0 * widened(rows.q).sum(dim=1)[:0]]
        for block in class_blocks(rows):
            if self.similar:
                s, pairs = block_scores(rows, block)
                losses.append((self.pos_margin - s[pairs]).clamp(min=0))
            else:
                q, k, pairs = block_pairs(rows, block)
                d = torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
                losses.append((d[pairs] - self.pos_margin).clamp(min=0))
        return torch.cat(losses)


class TripletMarginLoss(_MarginLoss, upstreams("TripletMarginLoss")):  # type: ignore[misc]
    """max(0, margin + d(a,p) − d(a,n)) of all triplets, or max(0, margin − s(a,p) + s(a,n)) of similarities.

    Rows of scores are sorted, O(N·M log M); upstream lists the triplets, of which there are O(N³).

    Args:
        margin: > 0 is fused; upstream's code runs another.
        swap, smooth_loss, triplets_per_anchor: other settings than the defaults go to upstream's code.
        options: as in `PairLoss`; Euclidean distances, cosine or dot products.
    """

    SHOWN = ("margin",)
    margin: float

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: int | str = "all",
        **options: Any,
    ) -> None:
        words = {
            "margin": number("margin", margin),
            "swap": swap,
            "smooth_loss": smooth_loss,
            "triplets_per_anchor": triplets_per_anchor,
        }
        super().__init__(words, options)

    def unfused(self) -> str | None:
        fused = {"swap": False, "smooth_loss": False, "triplets_per_anchor": "all"}
        for name, value in fused.items():
            if getattr(self, name) != value:
                return f"{name}={getattr(self, name)!r}"
        reason = super().unfused()
        return f"margin={self.margin}" if reason is None and self.margin <= 0 else reason

    def of(self, rows: Rows) -> Tensor:
        """The mean over all triplets, or over those above 0; 0 without one."""
        rows = rows.normalized() if self.normalize else rows
        spec = Spec(
            Labels(),
            Identity() if self.similar else Dist(),
            ("triplets_all", "active_all", "pos_count"),
            drop_self=rows.itself is not None,
        )
        scale = 1 / self.margin if self.similar else self.margin**-2.0
        # Rows that are sorted whole would leave 16-bit ones no room to be widened in tile by tile.
        q, k = widened(rows.q), None if rows.k is None else widened(rows.k)
        found = tile_stats(q, k, spec, scale=scale, **rows.where)
        total, active = (fixed_sum(found[name]) for name in ("triplets_all", "active_all"))
        own, columns = found["pos_count"], len(rows.other_ids) - (rows.itself is not None)
        return self.averaged(self.margin * total, active, fixed_sum(own * (columns - own)))
