"""AMDIM's encoder for 32, 64 and 128 px images, with taps at the maps of 7×7, 5×5 and 1×1 locations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.models.encoders.blocks import Init, ResBlock, ResNxN, RKHSHead, Stem, maybe_norm

IMAGE_SIZES = (32, 64, 128)


def trunk_width(image_size: int, ndf: int) -> int:
    """Channels of the trunk's widest map; the embeddings must be at least as wide."""
    return (4 if image_size == 32 else 8) * ndf


class AMDIMEncoder(nn.Module):
    """Image to `{tap: map}`.

    `h7` and `h5` are the maps of the trunk, `f7` and `f5` the same after their RKHS heads; `f1` is the top of the
    trunk, a BatchNorm of `n_rkhs` channels, and has no head.

    Args:
        image_size: 32, 64 or 128 px. Receptive fields of f7, f5, f1: 8, 16, 32 px; 16, 32, 64 px; 35, 67, 131 px.
        ndf: channels of the first stage. The widest trunk map has `4·ndf` (32 px) or `8·ndf` channels.
        n_rkhs: width of the embeddings, at least the trunk's width.
        n_depth: layers of each residual block.
        use_bn: BatchNorm inside the blocks too (the three outputs have one always).
        init: `"amdim"` zeroes the last layer of each branch, `"kaiming"` draws it like the others.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        ndf: int = 128,
        n_rkhs: int = 1024,
        n_depth: int = 3,
        use_bn: bool = False,
        init: Init = "amdim",
    ) -> None:
        super().__init__()
        width = trunk_width(image_size, ndf)
        _check(image_size, ndf, n_rkhs, n_depth, init, width)

        def block(c_in: int, c_out: int, w: int, s: int) -> ResBlock:
            return ResBlock(c_in, c_out, w, s, n_depth, use_bn=use_bn, init=init)

        norm7 = maybe_norm(width, use_bn)
        if image_size == 32:
            first = [Stem(3, ndf, 3), ResNxN(ndf, ndf, 1, 1, use_bn=use_bn, init=init)]
            self.to7 = nn.Sequential(*first, block(ndf, 2 * ndf, 4, 2), block(2 * ndf, 4 * ndf, 2, 2), norm7)
        else:
            first = [Stem(3, ndf, 3)] if image_size == 64 else [Stem(3, ndf, 5, 2, 2), Stem(ndf, ndf, 3)]
            middle = [block(ndf, 2 * ndf, 4, 2), block(2 * ndf, 4 * ndf, 4, 2), block(4 * ndf, 8 * ndf, 2, 2)]
            self.to7 = nn.Sequential(*first, *middle, norm7)
        self.to5 = block(width, width, 3, 1)
        top = ResNxN(width, n_rkhs, 3, 1, use_bn=use_bn, init=init)
        self.to1 = nn.Sequential(block(width, width, 3, 1), top, nn.BatchNorm2d(n_rkhs))
        self.head5 = RKHSHead(width, n_rkhs, use_bn=use_bn, init=init)
        self.head7 = RKHSHead(width, n_rkhs, use_bn=use_bn, init=init)
        self.image_size, self.use_bn = image_size, use_bn

    def forward(
        self,
        x: Tensor | Sequence[Tensor],  # (B, 3, H, H) images, H = image_size, or several views of them
    ) -> Any:  # f1 (B, D, 1, 1), f5 (B, D, 5, 5), f7 (B, D, 7, 7), h5 (B, C, 5, 5), h7 (B, C, 7, 7), or a list of such
        if isinstance(x, Tensor):
            return self.normalise(self.before_norms(x))
        return [self.normalise(taps) for taps in self.before_norms_of(x)]

    def before_norms(
        self,
        x: Tensor,  # (B, 3, H, H) images
    ) -> dict[str, Tensor]:  # of the same names and shapes
        """The maps before the three output BatchNorms. Without `use_bn` they depend on one image only."""
        h7 = self.to7(x)
        h5 = self.to5(h7)
        f5, f7 = self.head5.before_norm(h5), self.head7.before_norm(h7)
        return {"f1": self.to1[:-1](h5), "f5": f5, "f7": f7, "h5": h5, "h7": h7}

    def before_norms_of(self, views: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """`before_norms` of each of the views, (B, 3, H, H): of all in one batch, unless a norm would see that."""
        if self.use_bn:
            return [self.before_norms(view) for view in views]
        parts = {name: tap.chunk(len(views)) for name, tap in self.before_norms(torch.cat(tuple(views))).items()}
        return [{name: part[view] for name, part in parts.items()} for view in range(len(views))]

    def normalise(self, taps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Applies the output BatchNorms to what `before_norms` returned; other taps are returned as they are."""
        norms = {"f1": self.to1[-1], "f5": self.head5.out_norm, "f7": self.head7.out_norm}
        return {name: norms[name](tap) if name in norms else tap for name, tap in taps.items()}


def _check(image_size: int, ndf: int, n_rkhs: int, n_depth: int, init: str, width: int) -> None:
    if image_size not in IMAGE_SIZES:
        raise ValueError(f"image_size: must be one of {IMAGE_SIZES}, got {image_size}")
    for name, value in (("ndf", ndf), ("n_rkhs", n_rkhs), ("n_depth", n_depth)):
        checks.checked_int(name, value, at_least=1)
    if n_rkhs < width:
        raise ValueError(f"n_rkhs: must be at least the trunk's width {width} (ndf {ndf}), got {n_rkhs}")
    if init not in ("amdim", "kaiming"):
        raise ValueError(f"init: must be 'amdim' or 'kaiming', got {init!r}")
