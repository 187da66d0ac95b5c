"""SupContrast's `SupConLoss` (github.com/HobbitLong/SupContrast, losses.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce.compat.base import Adapter, class_ids, inverse, number, scalar, tensor
from fused_nce.core import checks
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.spec import Identity, Labels, Spec
from fused_nce.core.tails import LogOut
from fused_nce.losses.common import fixed_mean, widened
from fused_nce.losses.sup_con import SPEC

SMALLEST_SUM = 1e-6  # of a mask's row; upstream does not divide by less


class SupConLoss(Adapter):
    """The supervised contrastive loss of V views of B images; without labels, SimCLR's.

    Args:
        temperature: of the softmax, > 0.
        contrast_mode: "all" classifies every view, "one" the first; both among all views.
        base_temperature: the loss is multiplied by temperature / base_temperature.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    SHOWN = ("temperature", "contrast_mode", "base_temperature")

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        number("temperature", temperature, above=0)
        number("base_temperature", base_temperature, above=0)
        checks.check_choice("contrast_mode", contrast_mode, ("all", "one"))
        self.temperature, self.contrast_mode, self.base_temperature = temperature, contrast_mode, base_temperature

    def forward(
        self,
        features: Tensor,  # (B, V, ...), unit rows
        labels: Tensor | None = None,  # (B,)
        mask: Tensor | None = None,  # (B, B)
    ) -> Tensor:
        """The loss, 0-d: the mean over all rows, of which one without a positive counts as 0.

        A mask may be of any dtype, weighted and one-sided: row i of it has the weights of image i's positives. It costs
        one GEMM more than labels.
        """
        if not isinstance(features, Tensor) or features.dim() < 3:
            seen = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features: got {seen}, need (B, V, ...)")
        batch, views = features.shape[:2]
        columns = features.flatten(2).transpose(0, 1).flatten(0, 1)  # view by view, so that row i is column i
        scale, tail = inverse(self.temperature, features), LogOut()
        factor = scalar(self.temperature, features) / scalar(self.base_temperature, features)
        if mask is not None:
            if labels is not None:
                raise ValueError("mask: got one with labels, need one of the two")
            if tensor("mask", mask).shape != (batch, batch):
                raise ValueError(f"mask: got shape {tuple(mask.shape)}, need (B, B) = {(batch, batch)}")
            rows = columns if self.contrast_mode == "all" else columns[:batch]
            return factor * _weighted(rows, columns, mask, scale)
        classes = _classes(labels, batch, features.device)
        every = classes.repeat(views)
        if self.contrast_mode == "all":
            loss = tile_loss(columns, None, SPEC, tail, scale=scale, row_ids=every).loss
        else:
            loss = tile_loss(columns[:batch], columns, SPEC, tail, scale=scale, row_ids=classes, column_ids=every).loss
        return factor * loss


def _classes(labels: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """(B,) int64, equal for images that are each other's positives."""
    if labels is None:
        return torch.arange(batch, device=device)
    labels = tensor("labels", labels).reshape(-1)
    if labels.shape[0] != batch:
        raise ValueError(f"labels: got {labels.shape[0]}, need one an image, {batch}")
    return class_ids("labels", labels.to(device))


def _weighted(
    rows: Tensor,  # (N, D), the first N of the columns
    columns: Tensor,  # (V·B, D), view by view
    mask: Tensor,  # (B, B) weights of the positives, in any pattern
    scale: float | Tensor,
) -> Tensor:
    """mean_i Σ_j w_ij (lse_i − s_ij), w the mask's rows divided by their sums, itself left out.

    The scores of weighted positives are linear in the columns: w·s_i is scale·⟨q_i, (w k)_i⟩, so that a (B, B) mask
    meets (B, D) sums over views, and only the sum over all others is a statistic of scores.
    """
    views, images = len(columns) // len(mask), torch.arange(len(rows), device=rows.device) % len(mask)
    spec = Spec(Labels(), Identity(), ("neg_lse",), drop_self=True)
    every = torch.arange(len(columns), device=rows.device)  # each a class of its own: all but itself are negatives
    lse = tile_stats(rows, columns, spec, scale=scale, row_ids=every[: len(rows)], column_ids=every)["neg_lse"]
    with checks.uncast(rows):
        q, k = widened(rows), widened(columns)
        weights = mask.to(q.device, q.dtype)
        itself = weights.diagonal()[images, None]
        total = views * weights.sum(dim=1)[images, None] - itself
        divisor = torch.where(total < SMALLEST_SUM, 1.0, total)
        # fault: supcontrast-mask-row
        center = ((weights @ k.unflatten(0, (views, -1)).sum(dim=0))[images] - itself * q) / divisor
        share = (total / divisor).squeeze(1)
        return fixed_mean(torch.where(share == 0, 0.0, share * lse) - scale * (q * center).sum(dim=1))
