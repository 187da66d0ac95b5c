"""DIM's optional extra tasks: predict a location's coordinates, and encode an image with a part hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_nce.models.dim_critics import PointwiseBlock


class AbsoluteCoordinates(nn.Module):
    """From a location's features and the code, its row and its column: two softmaxes of M classes each."""

    def __init__(self, channels: int, code: int, side: int) -> None:
        super().__init__()
        self.side, self.net = side, PointwiseBlock(channels + code, 2 * side)

    def forward(
        self,
        local: Tensor,  # (B, C, M, M)
        code: Tensor,  # (B, code)
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies of row and column, summed, a mean over locations and images, in nats; and the accuracy."""
        places = _places(self.side, local.device)
        return _classify(self.net(_beside(local, code)), places.expand(len(local), -1, -1))


class RelativeCoordinates(nn.Module):
    """From two locations' features and the code, the rows and columns between them: two softmaxes of 2M − 1 classes.

    Each location is paired with another drawn for its image, M² pairs an image and step instead of all M⁴.
    """

    def __init__(self, channels: int, code: int, side: int) -> None:
        super().__init__()
        self.side, self.net = side, PointwiseBlock(2 * channels + code, 2 * (2 * side - 1))

    def forward(
        self,
        local: Tensor,  # (B, C, M, M)
        code: Tensor,  # (B, code)
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropies of row and column distance, summed, a mean over pairs and images, in nats; the accuracy."""
        images, _, side, _ = local.shape
        partner = torch.rand(images, side * side, device=local.device).argsort(1)  # a permutation an image
        others = local.flatten(2).gather(2, partner[:, None].expand(-1, local.shape[1], -1)).view_as(local)
        places = _places(side, local.device)
        apart = places - places[partner] + side - 1  # (B, M·M, 2), in [0, 2M − 2]
        return _classify(self.net(_beside(torch.cat((local, others), 1), code)), apart)


def _places(side: int, device: torch.device) -> Tensor:  # (M·M, 2): row and column
    index = torch.arange(side * side, device=device)
    return torch.stack((index // side, index % side), 1)


def _beside(local: Tensor, code: Tensor) -> Tensor:  # (B, C, M, M), (B, code) -> (B, C + code, M, M)
    return torch.cat((local, code[:, :, None, None].expand(-1, -1, *local.shape[2:])), 1)


def _classify(
    logits: Tensor,  # (B, L, 2·classes)
    target: Tensor,  # (B, L, 2)
) -> tuple[Tensor, Tensor]:
    halves = logits.float().unflatten(2, (2, -1)).flatten(0, 2)  # (B·L·2, classes)
    truth = target.flatten()
    return 2 * F.cross_entropy(halves, truth), (halves.argmax(1) == truth).float().mean().detach()


def occlude(
    x: Tensor,  # (B, C, H, W)
    share: float,
) -> Tensor:
    """The images with a random square set to 0, the mean of normalised images.

    Args:
        x: (B, C, H, W).
        share: the square's side, of the image's. The paper does not say which it used.
    """
    images, _, height, width = x.shape
    hidden = (max(1, round(share * height)), max(1, round(share * width)))
    inside = []
    for size, length in zip((height, width), hidden, strict=True):
        start = torch.randint(size - length + 1, (images, 1), device=x.device)
        place = torch.arange(size, device=x.device)
        inside.append((place >= start) & (place < start + length))
    return x.masked_fill((inside[0][:, None, :, None] & inside[1][:, None, None, :]), 0)
