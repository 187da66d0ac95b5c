"""Moves of a whole batch, one draw an image. The definitions are torchvision's; tests compare image by image."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from fused_nce.train.settings import AugmentConfig


def flip(
    x: Tensor,  # (B, C, H, W)
    p: float,
) -> Tensor:
    """Mirror each image with probability p, as `RandomHorizontalFlip` does one."""
    on = torch.rand(len(x)) < p
    return torch.where(on[:, None, None, None], x.flip(-1), x)


def translate(
    x: Tensor,  # (B, C, H, W)
    shifts: Tensor,  # (B, 2) int64: rows and columns by which the content moves down and right
) -> Tensor:
    """Whole pixels; what enters is the reflection of the image, without its edge."""
    height, width = x.shape[-2:]
    rows = _reflect(torch.arange(height) - shifts[:, :1], height)
    columns = _reflect(torch.arange(width) - shifts[:, 1:], width)
    image = torch.arange(len(x))[:, None, None, None]
    channel = torch.arange(x.shape[1])[None, :, None, None]
    return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)


def affine(
    x: Tensor,  # (B, C, S, S) float, square
    degrees: Tensor,  # (B,)
    shift: Tensor,  # (B, 2) pixels, right and down
    zoom: Tensor,  # (B,)
    shear: Tensor,  # (B,) degrees, along x
) -> Tensor:
    """`F.affine` about the centre, bilinear, zeros outside: out(u) = in(M⁻¹ (u − shift)), M = rotation·shear·zoom."""
    angle, slant = torch.deg2rad(degrees), torch.tan(torch.deg2rad(shear))
    cos, sin = torch.cos(angle), torch.sin(angle)
    # M = zoom·[[cos, −cos·slant − sin], [sin, −sin·slant + cos]], of determinant zoom².
    inverse = torch.stack((cos - sin * slant, sin + cos * slant, -sin, cos), 1).reshape(-1, 2, 2)
    inverse = inverse / zoom[:, None, None]
    offset = -(inverse @ shift[:, :, None]) * (2 / x.shape[-1])  # affine_grid measures in half sides
    grid = F.affine_grid(torch.cat((inverse, offset), 2), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def crop(
    x: Tensor,  # (C, H, W) uint8
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:  # (C, size, size) uint8
    """One random resized crop, bicubic: torchvision's own, since each image has another shape of crop."""
    cut = v2.RandomResizedCrop(size, area, ratio, v2.InterpolationMode.BICUBIC, antialias=True)
    out: Tensor = cut(x)
    return out


def move(
    x: Tensor,  # (B, 3, S, S) uint8 for "crop", else float in [0, 1]
    config: AugmentConfig,
) -> Tensor:
    """The geometry of `config`, drawn for every image."""
    count, side = len(x), x.shape[-1]
    on = torch.rand(count) < config.geometry_p
    if config.geometry == "translate":
        limit = config.translate_px  # below the side: `limits.check_together`
        shifts = torch.randint(-limit, limit + 1, (count, 2))
        return translate(x, shifts * on[:, None])
    if config.geometry == "affine":
        spread = torch.empty(4, count).uniform_(-1, 1) * on
        low, high = config.zoom
        zoom = torch.where(on, torch.empty(count).uniform_(low, high), 1)
        # As RandomAffine: whole pixels, up to a fraction of the side.
        shift = (spread[1:3] * config.shift * side).round().T
        return affine(x, spread[0] * config.degrees, shift, zoom, spread[3] * config.shear_degrees)
    return x
