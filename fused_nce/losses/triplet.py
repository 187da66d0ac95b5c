"""The triplet loss (Schroff, Kalenichenko, Philbin 2015, arXiv:1503.03832): each positive nearer than each negative.

max(0, margin + d(a,p) − d(a,n)) of anchors a, positives p of a's label, negatives n of others. Which triplets count:
"hard", of each anchor its farthest positive and nearest negative (Hermans, Beyer, Leibe 2017, arXiv:1703.07737);
"semihard", of each anchor and positive the nearest of the negatives beyond the positive; "all" of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import tile_loss
from fused_nce.core.spec import Dist, Identity, Labels, Spec, SqDist
from fused_nce.core.tails import AllTriplets, Hardest, SemihardTriplets, Tail, fixed_sum
from fused_nce.losses import registry
from fused_nce.losses.common import dense_distances, normalized, output, widened
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, register

TAILS: dict[str, type[Tail]] = {"hard": Hardest, "semihard": SemihardTriplets, "all": AllTriplets}
FORMS = ("distance", "similarity")


def triplet_margin(
    features: Tensor,  # (N, D)
    labels: Tensor,  # (N,) int64
    *,
    margin: float = 0.2,
    mining: str = "hard",
    form: str = "distance",
    normalize: bool = True,
    squared: bool = True,
    backend: str | None = None,
) -> NCEOutput:
    """Mean over the mined triplets of max(0, margin + d(a,p) − d(a,n)), every row an anchor, no triplet ever listed.

    "hard" costs three score GEMMs and merges over tiles as any loss does; the other two sort each row of N scores,
    O(N² log N) instead of a batch's O(N³) triplets, and need a workspace of one row at the least.

    Distances come from dot products: below about 1e-3 of the features' norm (float32) they are rounding noise. A pair
    at distance 0 exactly, which has no direction, gets no gradient from a plain distance. Equally hard pairs share it.

    Args:
        features: (N, D), float64, 32, 16 or bfloat16.
        labels: (N,) int64, on the features' device; any values.
        margin: > 0, in the distance's unit or the similarity's.
        mining: "hard", "semihard" or "all".
        form: "distance", or "similarity" for max(0, margin − ⟨a,p⟩ + ⟨a,n⟩).
        normalize: scale every row to unit norm first; False for rows that are, or shall stay as they are.
        squared: d is ‖x − x'‖², as in FaceNet; False for ‖x − x'‖. Of the form "distance" alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput. The mean is over all N anchors for "hard", over all (anchor, positive) for "semihard", over all
        triplets for "all"; what lacks a positive or a (farther) negative counts as 0, and where there is nothing at
        all the loss is 0. `stats["active"]` is the share of them with a loss above 0, so that loss / active is the mean
        over those alone; of "hard", `stats["violated"]` the share of anchors with a negative nearer than a positive.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        triplet_margin(torch.randn(8, 16), torch.arange(8) % 3).loss
        ```
    """
    checks.check_tensor("features", features, ("N", "D"))
    checks.check_ids("labels", labels, features.shape[0], "N", features.device)
    _check_settings(margin := checks.plain(margin), mining, form, squared)
    z = normalized(features) if normalize else features
    # Rows that are sorted whole would leave a 16-bit batch no room to be widened in tile by tile.
    z = z if mining == "hard" else widened(z)
    # In margins: t = −d / margin or ⟨a,b⟩ / margin, and the hinge is at 1.
    transform = Identity() if form == "similarity" else SqDist() if squared else Dist()
    scale = 1 / margin if isinstance(transform, (Identity, SqDist)) else 1 / margin**2
    tail = TAILS[mining](weight=margin)
    spec = Spec(Labels(), transform, tail.READS, drop_self=True)
    parts = tile_loss(z, None, spec, tail, scale=scale, row_ids=labels, backend=backend)
    if mining == "hard":
        return output(parts.loss, parts.report)
    n, positives = features.shape[0], parts.rows["pos_count"]
    count = positives if mining == "semihard" else positives * (n - 1 - positives)
    rows_per_triplet = n / fixed_sum(count).clamp(min=1)
    return output(parts.loss * rows_per_triplet, {"active": parts.report[f"active_{mining}"] * rows_per_triplet})


def _check_settings(margin: float, mining: str, form: str, squared: bool) -> None:
    checks.check_number("margin", margin, above=0)
    checks.check_choice("mining", mining, tuple(TAILS))
    checks.check_choice("form", form, FORMS)
    checks.check_choice("squared", squared, (True, False))
    if form == "similarity" and not squared:
        raise ValueError("squared: got False with form='similarity', need the default")


class TripletMarginLoss(LossModule):
    """The triplet loss with mining in the batch (`triplet_margin`), its settings kept.

    Args:
        margin: by which a negative must be farther than a positive.
        mining: "hard", "semihard" or "all".
        form: "distance" or "similarity".
        normalize: scale every row to unit norm first.
        squared: squared Euclidean distances.
        backend: as in `triplet_margin`.

    Shape:
        features: (N, D).
        labels: (N,) int64.

    Example:
        ```
        TripletMarginLoss()(torch.randn(8, 16), torch.arange(8) % 3).loss
        ```
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        mining: str = "hard",
        form: str = "distance",
        normalize: bool = True,
        squared: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(margin=margin, mining=mining, form=form, normalize=normalize, squared=squared, backend=backend)
        _check_settings(margin, mining, form, squared)

    def forward(self, features: Tensor, labels: Tensor) -> NCEOutput:
        """`triplet_margin` of the batch."""
        return triplet_margin(features, labels, **self.kept())


def oracle(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    mining: str = "hard",
    form: str = "distance",
    normalize: bool = True,
    squared: bool = True,
) -> Tensor:
    """The loss, dense, triplet by triplet."""
    z = nn.functional.normalize(features, dim=1) if normalize else features
    s = dense_scores(z, z, 1.0)
    d = -s if form == "similarity" else dense_distances(s) if squared else dense_distances(s).sqrt()
    total, count = 0 * s.sum(), 0
    for a in range(len(z)):
        own = (labels == labels[a]) & (torch.arange(len(z)) != a)
        positives, negatives = d[a][own], d[a][labels != labels[a]]
        count += {"hard": 1, "semihard": len(positives), "all": len(positives) * len(negatives)}[mining]
        if mining == "hard" and len(positives) and len(negatives):
            positives, negatives = positives.amax()[None], negatives.amin()[None]
        for p in positives.unbind():
            beyond = negatives[negatives > p] if mining == "semihard" else negatives
            if len(beyond):
                chosen = beyond.amin() if mining == "semihard" else beyond
                total = total + torch.relu(margin + p - chosen).sum()
    return total / max(count, 1)


def _entry(**options: Any) -> Entry:
    def draw(seed: int, size: Size) -> dict[str, Any]:
        return {
            "features": registry.features(seed, size.n, size.d, unit=True),
            "labels": registry.ids(seed, size.n, 1 + size.n // 2),
            "normalize": False,
            **options,
        }

    distances = "⟨a,p⟩ + ⟨a,n⟩" if options.get("form") == "similarity" else "d(a,n) + d(a,p)"
    return Entry(
        triplet_margin,
        TripletMarginLoss,
        f"mean_{options['mining']} max(0, m − {distances})",
        "Schroff et al. 2015, arXiv:1503.03832",
        draw,
        oracle,
        kinked=True,
    )


for _mining in TAILS:
    register(_entry(mining=_mining, margin=0.7), "" if _mining == "hard" else _mining)
register(_entry(mining="hard", margin=0.4, squared=False), "plain distance")
register(_entry(mining="all", margin=0.5, form="similarity"), "all, similarity")
