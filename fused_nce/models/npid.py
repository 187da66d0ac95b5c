"""NPID as an `nn.Module`: images and their numbers in, losses out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_nce.core import checks
from fused_nce.core.group import gathered
from fused_nce.losses import NPIDSoftmaxLoss
from fused_nce.losses.common import widened
from fused_nce.models.base import Embedded, Pending
from fused_nce.models.encoders.backbones import Init, Stem
from fused_nce.models.projected import Projected


class MemoryBank(nn.Module):
    """A vector for each of n images, `v ← normalise(m·v + (1 − m)·f)`.

    Until an image was seen its vector is random, of norm 1 in the mean (uniform within ±√(3/D), as lemniscate's).

    Args:
        size: n.
        dim: D.
        momentum: m.
    """

    vectors: Tensor  # (n, D)

    def __init__(self, size: int, dim: int, momentum: float = 0.5) -> None:
        super().__init__()
        size = checks.checked_int("size", size, at_least=1)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.register_buffer("vectors", torch.empty(size, dim).uniform_(-1, 1).mul_(math.sqrt(3 / dim)))

    @torch.no_grad()
    def update(
        self,
        features: Tensor,  # (B, D) unit rows
        indices: Tensor,  # (B,) int64
    ) -> None:
        known = widened(self.vectors[indices])
        mixed = torch.lerp(features.to(known.dtype), known, self.momentum)  # fault: bank-momentum-wrong
        unit = functional.normalize(mixed, dim=1)  # fault: bank-off-sphere
        self.vectors.index_copy_(0, indices, unit.to(self.vectors.dtype))


class NPID(Projected):
    """Non-parametric instance discrimination (arXiv 1805.01978): every image a class, its weights a memory of it.

    ```
    model = NPID(size=50_000, backbone="resnet18", stem="cifar")
    for images, indices in loader:                 # one view, and the images' numbers
        optimizer.zero_grad()
        model((images, indices)).loss.backward()
        optimizer.step()
        model.after_step()                         # the bank
    ```

    Args:
        size: n, images of the training set.
        backbone: `"tiny"`, a torchvision classifier's name or `"timm/NAME"`.
        stem: "imagenet" or "cifar", a ResNet's for 32 px.
        init: "kaiming" or "zero" (residual branches start at zero).
        dim: width of the vectors.
        layers: of the head.
        hidden: width of its layers but the last; the features' if None.
        momentum: of the bank.
        loss: called with `(features, bank, indices)`; `NPIDSoftmaxLoss()` if left out, `NPIDNCELoss()` for the paper's.

    Shape:
        batch: (B, 3, H, W) images, and (B,) int64, their numbers.

    Raises:
        ValueError: for a backbone that is none, or a number out of its range.
    """

    memories = ("bank",)

    def __init__(
        self,
        *,
        size: int,
        backbone: str = "resnet50",
        stem: Stem = "imagenet",
        init: Init = "kaiming",
        dim: int = 128,
        layers: int = 1,
        hidden: int | None = None,
        momentum: float = 0.5,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(
            backbone_name=backbone, stem=stem, init=init, dim=dim, layers=layers, hidden=hidden, norm=False
        )
        self.bank = MemoryBank(size, dim, momentum)
        self.loss = NPIDSoftmaxLoss() if loss is None else loss
        self._pending: Pending[tuple[Tensor, Tensor]] = Pending()

    def embed(
        self,
        batch: Sequence[Tensor],  # images (B, 3, H, W), indices (B,) int64
    ) -> Embedded:
        """The taps of the images; the loss is called with their unit `z`, the bank and the indices.

        Raises:
            ValueError: if there are not images and as many indices.
            RuntimeError: if `after_step` was never called.
        """
        if len(batch) != 2 or len(batch[0]) != len(batch[1]):
            raise ValueError(f"batch: must hold images and their indices, got lengths {[len(part) for part in batch]}")
        images, indices = batch
        taps = self.encode(images)
        features = functional.normalize(widened(taps["z"]), dim=1)
        if self.training:
            self._pending.add((features.detach(), indices))
        return Embedded((taps,), (features, self.bank.vectors, indices))

    def after_step(self, *, skipped: bool = False) -> None:
        """The features of all processes into the bank."""
        pending = self._pending.take()
        for features, indices in () if skipped else pending:
            self.bank.update(gathered(features), gathered(indices))
