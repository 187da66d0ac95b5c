"""What MoCo, SimCLR, SupCon and NPID share: an encoder by name and a projection head on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.models.base import Model, check_images, views_of
from fused_nce.models.encoders.backbones import Init, Stem, backbone


def projection(width: int, hidden: int | None, dim: int, layers: int, *, norm: bool) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        width: of the features.
        hidden: width between the layers; the features' if None.
        dim: of the projections.
        layers: at least 1, which is a plain linear map.
        norm: BatchNorm before each ReLU, and no bias in the last layer (SimCLR); else neither (MoCo v2).
    """
    hidden = width if hidden is None else hidden
    for name, size in (("layers", layers), ("dim", dim), ("hidden", hidden)):
        checks.checked_int(name, size, at_least=1)
    sizes = [width, *[hidden] * (layers - 1), dim]
    parts: list[nn.Module] = []
    for i, (c_in, c_out) in enumerate(pairwise(sizes), 1):
        parts.append(nn.Linear(c_in, c_out, bias=not norm or i < layers))
        if i < layers:
            parts += [nn.BatchNorm1d(c_out)] if norm else []
            parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


class Projected(Model):
    """An encoder and its head.

    Args:
        backbone_name: see `encoders.backbones.backbone`.
        stem: its first layers.
        init: of its residual branches.
        dim: of the projections.
        layers: of the head.
        hidden: its width between the layers; the features' if None.
        norm: BatchNorm in it.
    """

    head_taps = ("z",)

    def __init__(
        self, *, backbone_name: str, stem: Stem, init: Init, dim: int, layers: int, hidden: int | None, norm: bool
    ) -> None:
        super().__init__()
        self.encoder, self.width = backbone(backbone_name, stem=stem, init=init)
        self.head = projection(self.width, hidden, dim, layers, norm=norm)
        self.dim = dim

    def encode(
        self,
        x: Tensor,  # (B, 3, H, W) normalised images
    ) -> dict[str, Tensor]:
        """Features of a batch of images.

        Returns:
            `h (B, width)`, the encoder's, and `z (B, dim)`, the head's, which the loss scales to unit norm.

        Raises:
            TypeError, ValueError: for images of integers, or of another shape.
        """
        check_images(x)
        h = self.encoder(x)
        return {"h": h, "z": self.head(h)}


class TwoViews(Projected):
    """One that encodes both views of every image as one batch: its negatives are that batch."""

    def begin(
        self,
        batch: Tensor | Sequence[Tensor],  # (B, 2, 3, H, W), or two tensors (B, 3, H, W) and the extras
    ) -> tuple[dict[str, Tensor], ...]:  # the taps of each view
        """All but the loss; the encoder's BatchNorms see what they are given, both views of it."""
        views = views_of(batch if isinstance(batch, Tensor) else batch[:2])
        return halves(self.encode(torch.cat(views)))  # fault: simclr-views-normalised


def halves(taps: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """The taps of two views that were encoded as one batch, one after the other."""
    pairs = {name: tap.chunk(2) for name, tap in taps.items()}
    return tuple({name: pair[view] for name, pair in pairs.items()} for view in (0, 1))
