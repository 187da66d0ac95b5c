"""The contrastive loss of pairs (Hadsell, Chopra, LeCun 2006, CVPR): similar ones together, others a margin apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import tile_loss
from fused_nce.core.spec import Dist, Labels, Spec
from fused_nce.core.tails import Pairs
from fused_nce.losses import registry
from fused_nce.losses.common import dense_distances, output
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, register

SPEC = Spec(Labels(), Dist(), Pairs.READS, drop_self=True)


def pair_contrastive(
    features: Tensor,  # (N, D)
    labels: Tensor,  # (N,) int64
    *,
    margin: float = 1.0,
    backend: str | None = None,
) -> NCEOutput:
    """Mean over all pairs of ½d² for one label and ½max(0, margin − d)² for two, d = ‖x − x'‖, no pair ever listed.

    d comes from dot products: below about 1e-3 of the features' norm (float32) it is rounding noise. Two rows at
    distance 0 exactly, which have no direction, get no gradient from each other.

    Args:
        features: (N, D), as they are, of any norm; float64, 32, 16 or bfloat16.
        labels: (N,) int64, on the features' device; any values.
        margin: > 0, a distance.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput; `stats["positives"]` and `stats["negatives"]` are the two parts of the loss. One row has no pair, and
        costs 0.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        pair_contrastive(torch.randn(8, 16), torch.arange(8) % 3).loss
        ```
    """
    checks.check_tensor("features", features, ("N", "D"))
    checks.check_ids("labels", labels, features.shape[0], "N", features.device)
    checks.check_number("margin", margin := checks.plain(margin), above=0)
    # In margins, t = −d / margin. Every pair stands in two rows, as does its share of N·(N − 1).
    parts = tile_loss(
        features,
        None,
        SPEC,
        Pairs(weight=margin**2),
        scale=1 / margin**2,
        row_ids=labels,
        backend=backend,
    )
    others = max(features.shape[0] - 1, 1)
    halves = {name: x * (margin**2 / 2 / others) for name, x in parts.report.items()}
    stats = {"positives": halves["pos_square"], "negatives": halves["neg_hinge_square"]}
    return output(parts.loss / others, stats)


class PairContrastiveLoss(LossModule):
    """The contrastive loss of all pairs of a batch (`pair_contrastive`), its settings kept.

    Args:
        margin: > 0, the distance beyond which a pair of two classes costs nothing.
        backend: as in `pair_contrastive`.

    Shape:
        features: (N, D).
        labels: (N,) int64.

    Example:
        ```
        PairContrastiveLoss()(torch.randn(8, 16), torch.arange(8) % 3).loss
        ```
    """

    def __init__(self, margin: float = 1.0, *, backend: str | None = None) -> None:
        super().__init__(margin=margin, backend=backend)
        checks.check_number("margin", margin, above=0)

    def forward(self, features: Tensor, labels: Tensor) -> NCEOutput:
        """`pair_contrastive` of the batch."""
        return pair_contrastive(features, labels, **self.kept())


def oracle(features: Tensor, labels: Tensor, *, margin: float = 1.0) -> Tensor:
    """The loss, dense, of the pairs i < j."""
    square = dense_distances(dense_scores(features, features, 1.0))
    i, j = torch.triu_indices(len(features), len(features), 1)
    square, same = square[i, j], (labels[:, None] == labels)[i, j]
    apart = (margin - square.sqrt()).clamp(min=0).square()
    return torch.where(same, square, apart).mean() / 2


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "features": registry.features(seed, size.n, size.d),
        "labels": registry.ids(seed, size.n, 1 + size.n // 2),
        "margin": 2.5,
    }


register(
    Entry(
        pair_contrastive,
        PairContrastiveLoss,
        "mean_pairs ½d² if y = y', else ½max(0, m − d)²",
        "Hadsell et al. 2006, CVPR",
        _draw,
        oracle,
        kinked=True,
    )
)
