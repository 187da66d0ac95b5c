"""SupContrast's `SupConLoss` (github.com/HobbitLong/SupContrast, losses.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import tile_loss
from fused_nce.core.tails import LogOut
from fused_nce.losses.sup_con import SPEC


class SupConLoss(nn.Module):
    """The supervised contrastive loss of V views of B images; without labels, SimCLR's.

    Args:
        temperature: of the softmax, > 0.
        contrast_mode: "all" classifies every view, "one" the first; both among all views.
        base_temperature: the loss is multiplied by temperature / base_temperature.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
        NotImplementedError: for a mask that does not divide the images into classes.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        checks.check_number("temperature", temperature, above=0)
        checks.check_number("base_temperature", base_temperature, above=0)
        checks.check_choice("contrast_mode", contrast_mode, ("all", "one"))
        self.temperature, self.contrast_mode, self.base_temperature = temperature, contrast_mode, base_temperature

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        kept = ("temperature", "contrast_mode", "base_temperature")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in kept)

    def forward(
        self,
        features: Tensor,  # (B, V, ...), unit rows
        labels: Tensor | None = None,  # (B,), integers
        mask: Tensor | None = None,  # (B, B)
    ) -> Tensor:
        """The loss, 0-d: the mean over all rows, of which one without a positive counts as 0."""
        if not isinstance(features, Tensor) or features.dim() < 3:
            seen = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"features: got {seen}, need (B, V, ...)")
        batch, views = features.shape[:2]
        classes = _classes(labels, mask, batch, features.device)
        columns = features.flatten(2).transpose(0, 1).flatten(0, 1)  # view by view, so that row i is column i
        every = classes.repeat(views)
        scale, tail = 1 / self.temperature, LogOut()
        if self.contrast_mode == "all":
            loss = tile_loss(columns, None, SPEC, tail, scale=scale, row_ids=every).loss
        else:
            loss = tile_loss(columns[:batch], columns, SPEC, tail, scale=scale, row_ids=classes, column_ids=every).loss
        return self.temperature / self.base_temperature * loss


def _classes(labels: Tensor | None, mask: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """(B,) int64, equal for images that are each other's positives."""
    if labels is not None and mask is not None:
        raise ValueError("mask: got one with labels, need one of the two")
    if mask is not None:
        return _classes_of_mask(mask, batch).to(device)
    if labels is None:
        return torch.arange(batch, device=device)
    labels = labels.reshape(-1)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels: got {labels.dtype}, need integers")
    if labels.shape[0] != batch:
        raise ValueError(f"labels: got {labels.shape[0]}, need one an image, {batch}")
    return labels.to(device, torch.int64)


def _classes_of_mask(mask: Tensor, batch: int) -> Tensor:
    """The first image of each image's class. Read on the host."""
    if mask.shape != (batch, batch):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, need (B, B) = {(batch, batch)}")
    classes = (mask != 0).long().argmax(dim=1)
    if not bool((mask == (classes[:, None] == classes).to(mask.dtype)).all()):
        raise NotImplementedError("mask: got weights, or positives that are not classes, need (B, B) of equal labels")
    return classes
