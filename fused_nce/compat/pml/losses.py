"""The losses on cosine similarities and dot products: NT-Xent and the supervised contrastive loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.compat.base import inverse, number
from fused_nce.compat.pml.base import PairLoss, Rows, block_scores, class_blocks, upstreams
from fused_nce.core.engine import tile_stats
from fused_nce.core.spec import Identity, Labels, Spec
from fused_nce.core.statistics import deficit, softplus
from fused_nce.core.tails import LogOut


class NTXentLoss(PairLoss, upstreams("NTXentLoss")):  # type: ignore[misc]
    """Each positive pair classified among its row's negatives; the row's other positives are left out.

    The positive pairs' scores are held, N·|P| numbers; no others.

    Args:
        temperature: of the softmax, > 0; a 0-d tensor may be learned.
        options: as in `PairLoss`; cosine or dot products.
    """

    SHOWN = ("temperature",)
    DISTANCES = ("CosineSimilarity", "DotProductSimilarity")
    REDUCER = "MeanReducer"

    temperature: float | Tensor

    def __init__(self, temperature: float = 0.07, **options: Any) -> None:
        super().__init__({"temperature": number("temperature", temperature, above=0)}, options)

    def of(self, rows: Rows) -> Tensor:
        """mean over the positive pairs of softplus(neg_lse − s); 0 without a negative in the whole batch."""
        rows = rows.normalized() if self.normalize else rows
        spec = Spec(Labels(), Identity(), ("neg_lse",), drop_self=rows.itself is not None)
        scale = inverse(self.temperature, rows.q)
        lse = tile_stats(rows.q, rows.k, spec, scale=scale, **rows.where)["neg_lse"]
        losses = [lse[:0]]  # no pair at all leaves a 0 that still has its gradient
        for block in class_blocks(rows):
            s, pairs = block_scores(rows, block)
            losses.append(softplus(deficit(lse[block[0]][:, :, None], s * scale))[pairs])
        return self.reduced(torch.cat(losses))


class SupConLoss(PairLoss, upstreams("SupConLoss")):  # type: ignore[misc]
    """The supervised contrastive loss; a row without a positive, whose loss is 0, is no part of the mean.

    Args:
        temperature: of the softmax, > 0; a 0-d tensor may be learned.
        options: as in `PairLoss`; cosine or dot products.
    """

    SHOWN = ("temperature",)
    DISTANCES = NTXentLoss.DISTANCES
    REDUCER = "AvgNonZeroReducer"

    temperature: float | Tensor

    def __init__(self, temperature: float = 0.1, **options: Any) -> None:
        super().__init__({"temperature": number("temperature", temperature, above=0)}, options)

    def of(self, rows: Rows) -> Tensor:
        """The rows' losses, reduced; 0 without a negative in the whole batch."""
        rows = rows.normalized() if self.normalize else rows
        spec = Spec(Labels(), Identity(), LogOut.READS, drop_self=rows.itself is not None)
        scale = inverse(self.temperature, rows.q)
        found = tile_stats(rows.q, rows.k, spec, scale=scale, **rows.where)
        statistics = torch.stack([found[name] for name in spec.stats])
        losses = LogOut().elements(spec, found["pos"], statistics, None).squeeze(1)
        loss, no_negative = self.reduced(losses), (found["neg_lse"] == float("-inf")).all()
        return torch.where(no_negative, 0 * loss, loss)
