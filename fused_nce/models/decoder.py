"""From a vector to an image: what autoencoders and generators share, and the evaluation's decoder."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

CHANNELS = 128


def widths(side: int, channels: int) -> list[int]:
    """Channels at 4 × 4 px and after each doubling up to `side`: halved each time, to an eighth at the least.

    Raises:
        ValueError: for a side that is not 4 times a power of two, or channels that eight does not divide.
    """
    doublings = round(math.log2(side / 4))
    if 4 << doublings != side or channels % 8:
        raise ValueError(f"side: must be 4 times a power of two, channels of 8, got {side} and {channels}")
    return [max(channels >> i, channels // 8) for i in range(doublings + 1)]


class Decoder(nn.Module):
    """Features to images in [0, 1]: a linear layer to 4 × 4, then one transposed convolution for each doubling.

    Args:
        width: D of the features.
        side: of the images, 4 times a power of two.
        channels: of the 4 × 4 map; each layer halves them, to an eighth at the least. DIM's has 512.
    """

    def __init__(self, width: int, side: int, channels: int = CHANNELS) -> None:
        super().__init__()
        sizes = widths(side, channels)
        self.first = nn.Sequential(
            nn.Linear(width, channels * 16), nn.BatchNorm1d(channels * 16), nn.ReLU(), nn.Unflatten(1, (channels, 4, 4))
        )
        layers = list[nn.Module]()
        for c_in, c_out in pairwise(sizes):
            layers += [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.rest = nn.Sequential(*layers, nn.Conv2d(sizes[-1], 3, 3, 1, 1), nn.Tanh())

    def forward(
        self,
        features: Tensor,  # (B, D)
    ) -> Tensor:  # (B, 3, H, H)
        return (self.rest(self.first(features)) + 1) / 2
