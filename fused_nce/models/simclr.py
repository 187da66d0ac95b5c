"""SimCLR as an `nn.Module`: two views in, losses out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fused_nce.losses import NTXentLoss
from fused_nce.models.base import Embedded, split_views
from fused_nce.models.encoders.backbones import Init, Stem
from fused_nce.models.projected import TwoViews


class SimCLR(TwoViews):
    """SimCLR (arXiv 2002.05709); with `layers=3` the head of v2 (arXiv 2006.10029).

    ```
    model = SimCLR(backbone="resnet18", stem="cifar")
    for view1, view2 in loader:                    # two augmentations of the same images
        optimizer.zero_grad()
        model((view1, view2)).loss.backward()
        optimizer.step()
    ```

    Both views are one batch to the encoder, so that BatchNorm's statistics are those of all 2N.

    Args:
        backbone: `"tiny"`, a torchvision classifier's name or `"timm/NAME"`.
        stem: "imagenet" or "cifar", a ResNet's for 32 px.
        init: "kaiming" or "zero" (residual branches start at zero).
        dim: width of the projections.
        layers: of the head.
        hidden: width of its layers but the last; the features' if None.
        norm: BatchNorm in the head.
        loss: called with the projections of the two views; `NTXentLoss()` if left out.

    Shape:
        batch: (B, 2, 3, H, W), or two tensors (B, 3, H, W).

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
        norm: bool = True,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone_name=backbone, stem=stem, init=init, dim=dim, layers=layers, hidden=hidden, norm=norm)
        self.loss = NTXentLoss() if loss is None else loss

    def embed(
        self,
        batch: Tensor | Sequence[Tensor],  # (B, 2, 3, H, W), or two tensors (B, 3, H, W)
    ) -> Embedded:
        """The taps of both views; the loss is called with their `z`.

        Raises:
            ValueError: if there are not two views of one shape, or only one image.
        """
        split_views(batch)
        return self.finish(self.begin(batch))

    def finish(self, begun: tuple[dict[str, Tensor], ...], extras: Sequence[Tensor] = ()) -> Embedded:
        """The taps, and the loss's arguments among them."""
        return Embedded(begun, (begun[0]["z"], begun[1]["z"]))
