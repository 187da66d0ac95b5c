"""Supervised contrastive learning as an `nn.Module`: two views and labels in, losses out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fused_nce.losses import SupConLoss
from fused_nce.models.base import Embedded, split_views
from fused_nce.models.encoders.backbones import Init, Stem
from fused_nce.models.projected import TwoViews


class SupCon(TwoViews):
    """SupCon (arXiv 2004.11362): every view of every image of a class is a positive of the others.

    ```
    model = SupCon(backbone="resnet50", stem="cifar")
    for view1, view2, labels in loader:
        optimizer.zero_grad()
        model((view1, view2, labels)).loss.backward()
        optimizer.step()
    ```

    Args:
        backbone: `"tiny"`, a torchvision classifier's name or `"timm/NAME"`.
        stem: "imagenet" or "cifar", a ResNet's for 32 px.
        init: "kaiming" or "zero" (residual branches start at zero).
        dim: width of the projections.
        layers: of the head.
        hidden: width of its layers but the last; the features' if None.
        norm: BatchNorm in the head.
        loss: called with the projections `(2B, dim)` and labels `(2B,)`; `SupConLoss()` if left out.

    Shape:
        batch: two tensors (B, 3, H, W), and (B,) int64 labels.

    Raises:
        ValueError: for a backbone that is none, or a size below 1.
    """

    def __init__(
        self,
        *,
        backbone: str = "resnet50",
        stem: Stem = "imagenet",
        init: Init = "kaiming",
        dim: int = 128,
        layers: int = 2,
        hidden: int | None = None,
        norm: bool = False,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone_name=backbone, stem=stem, init=init, dim=dim, layers=layers, hidden=hidden, norm=norm)
        self.loss = SupConLoss() if loss is None else loss

    def embed(
        self,
        batch: Sequence[Tensor],  # two views (B, 3, H, W), labels (B,) int64
    ) -> Embedded:
        """The taps of both views; the loss is called with their `z`, one view after the other, and the labels.

        Raises:
            ValueError: if there are not two views of one shape and labels, or only one image.
        """
        if len(batch) != 3:
            raise ValueError(f"batch: must hold 2 views and labels, got {len(batch)} parts")
        split_views(batch[:2])
        return self.finish(self.begin(batch), batch[2:])

    def finish(self, begun: tuple[dict[str, Tensor], ...], extras: Sequence[Tensor] = ()) -> Embedded:
        """The taps, and the loss's arguments: one view's rows after the other's."""
        # fault: labels-beside-wrong
        return Embedded(begun, (torch.cat([taps["z"] for taps in begun]), extras[0].repeat(2)))
