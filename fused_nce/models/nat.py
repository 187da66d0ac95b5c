"""Noise as targets as an `nn.Module`: images and their numbers in, losses out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_nce.core import checks
from fused_nce.core.group import gathered
from fused_nce.losses import NCEOutput
from fused_nce.losses.common import widened
from fused_nce.models.base import Embedded, Pending
from fused_nce.models.coded import Coded


class Targets(nn.Module):
    """A point on the unit sphere for each of n images, drawn once; images only ever exchange theirs.

    Args:
        size: n.
        dim: D.
    """

    vectors: Tensor  # (n, D)
    seen: Tensor  # 0-d int64, images since the start

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        size = checks.checked_int("size", size, at_least=1)
        self.register_buffer("vectors", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def exchange(
        self,
        indices: Tensor,  # (B,) int64; with one twice, as where a damaged image has a substitute, nothing is exchanged
        order: Tensor,  # (B,) int64, a permutation: image i takes the target of image order[i]
    ) -> None:
        if len(indices.unique()) == len(indices):  # fault: targets-lost
            self.vectors.index_copy_(0, indices, self.vectors[indices[order]])  # fault: targets-exchanged-backwards
        self.seen += len(indices)


@torch.no_grad()
def assign(
    features: Tensor,  # (B, D)
    targets: Tensor,  # (B, D)
) -> Tensor:  # (B,) int64
    """The target of each feature, one each, such that the sum of the dot products is greatest: the Hungarian method."""
    from scipy.optimize import linear_sum_assignment

    gains = features.double() @ targets.double().T  # a pass without a finite loss is skipped, not refused here
    _, order = linear_sum_assignment(gains.nan_to_num().cpu().numpy(), maximize=True)
    return torch.as_tensor(order, device=features.device)


class NATLoss(nn.Module):
    """½‖f − t‖² of unit features and their targets, a mean over images: 1 − the cosine."""

    def forward(
        self,
        features: Tensor,  # (B, D) unit rows
        targets: Tensor,  # (B, D) unit rows: each image's own until now
        order: Tensor,  # (B,) int64: whose it takes
    ) -> NCEOutput:
        """`stats` has the share of images that take another's target."""
        loss = 0.5 * (features - targets[order]).square().sum(1).mean()
        moved = (order != torch.arange(len(order), device=order.device)).float().mean()
        return NCEOutput(loss, loss, torch.zeros_like(loss), {"moved": moved})


class NAT(Coded):
    """Noise as targets (Bojanowski, Joulin 2017, arXiv:1704.05310): each image learns to predict a point of its own.

    ```
    model = NAT(size=50_000, architecture="dcgan32")
    for images, indices in loader:                 # one view, and the images' numbers
        optimizer.zero_grad()
        model((images, indices)).loss.backward()
        optimizer.step()
        model.after_step()                         # the targets that were exchanged
    ```

    The points are drawn on the unit sphere; the images of a batch exchange theirs so that they are nearest in sum.

    Args:
        size: n, images of the training set.
        architecture: of the encoder, see `DIM`.
        width: multiplies the encoder's channels; 1 is DIM's.
        code: units of Y, and of the points.
        every: in the first of so many passes over the images targets are exchanged.
        loss: called with unit codes, the images' targets and whose they take; `NATLoss()` if left out.

    Shape:
        batch: (B, 3, H, H) images, and (B,) int64, their numbers, none twice.

    Raises:
        TypeError, ValueError: for a setting outside these.
    """

    memories = ("targets",)

    def __init__(
        self,
        *,
        size: int,
        architecture: str = "dcgan32",
        width: float = 1.0,
        code: int = 64,
        every: int = 1,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(architecture, code, width)
        self.every, self.targets = checks.checked_int("every", every, at_least=1), Targets(size, code)
        self.loss = NATLoss() if loss is None else loss
        self._pending: Pending[tuple[Tensor, Tensor]] = Pending()

    def embed(
        self,
        batch: Sequence[Tensor],  # images (B, 3, H, H), indices (B,) int64
    ) -> Embedded:
        """The taps; the loss is called with the unit codes, the images' targets and whose each takes.

        Raises:
            ValueError: if there are not images and as many indices, or a single image.
            RuntimeError: if `after_step` was never called.
        """
        if len(batch) != 2 or len(batch[0]) != len(batch[1]):
            raise ValueError(f"batch: must hold images and their indices, got lengths {[len(part) for part in batch]}")
        images, indices = self.images(batch[0]), batch[1]
        taps = self.encode(images)
        features, own = F.normalize(widened(taps["Y"]), dim=1), self.targets.vectors[indices]
        order = torch.arange(len(own), device=own.device)
        if int(self.targets.seen) // len(self.targets.vectors) % self.every == 0:
            order = assign(features, own)
        if self.training:
            self._pending.add((indices, order))
        return Embedded((taps,), (features, own, order))

    def after_step(self, *, skipped: bool = False) -> None:
        """The exchanges of all processes, each within its own batch."""
        pending = self._pending.take()
        for indices, order in () if skipped else pending:
            for some, whose in zip(gathered(indices).split(len(order)), gathered(order).split(len(order)), strict=True):
                self.targets.exchange(some, whose)
