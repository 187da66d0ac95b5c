"""Moves of a whole batch, one draw an image. The definitions are torchvision's; tests compare image by image."""

import functools
import math

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


def crops(
    images: Tensor,  # (B, C, S, S) uint8
    size: int,
    count: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:  # (B, count, C, size, size) uint8
    """`crop`, `count` times of each image: the same draws and the same pixels, in two matrix products.

    A crop has one of S lengths along each axis, and so one of S sets of weights. They are torch's, whole multiples of
    2⁻¹⁵: where nothing shrinks, float32 holds their sums with bytes exactly.
    """
    batch, channels, side = images.shape[:3]
    top, left, height, width = torch.tensor(_cuts(batch * count, side, area, ratio)).T
    across, down = (_weights(side, size)[_place(side, *axis)] for axis in ((width, left), (height, top)))
    rows = images.permute(0, 2, 1, 3).float().reshape(batch, -1, side).repeat_interleave(count, 0)
    wide = _bytes(torch.bmm(rows, across.mT)).view(batch * count, side, -1)  # fault: crops-rounded-once
    out = _bytes(torch.bmm(down, wide)).to(torch.uint8).view(batch, count, size, channels, size)
    return out.transpose(2, 3).contiguous()


def _bytes(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def _cuts(
    many: int, side: int, area: tuple[float, float], ratio: tuple[float, float]
) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of crops of squares, drawn as `RandomResizedCrop` draws them."""
    low, high = torch.tensor(ratio).log().tolist()
    number, place, found = torch.empty(1), torch.empty(1, dtype=torch.int64), []
    for _ in range(many):
        for _ in range(10):
            pixels, shape = side**2 * number.uniform_(*area).item(), number.uniform_(low, high).exp_().item()
            width, height = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            if 0 < width <= side and 0 < height <= side:
                top, left = (int(place.random_(side - length + 1)) for length in (height, width))
                break
        else:  # the largest in the middle
            height, width = min(side, round(side / ratio[0])), min(side, round(side * ratio[1]))
            top, left = (side - height) // 2, (side - width) // 2
        found.append((top, left, height, width))
    return found


def _place(side: int, length: Tensor, start: Tensor) -> Tensor:
    """Of a part of an axis among all parts, (side + 1)²."""
    return length * (side + 1) + side - start


@functools.lru_cache(maxsize=4)
def _weights(side: int, size: int) -> Tensor:  # ((side + 1)², size, side)
    """Of the pixels of an axis, for each part of it that grows to `size`."""
    table = torch.zeros(side + 1, size, 2 * side)
    for length in range(1, side + 1):
        one = torch.eye(length, dtype=torch.float64)[None, None]
        exact = F.interpolate(one, (size, length), mode="bicubic", antialias=True)[0, 0]
        # As torch has them for bytes: of 16 bits, and as fine as the largest of an axis allows.
        peak = exact.max().item()
        bits = next((b for b in range(22) if int(0.5 + peak * 2 ** (b + 1)) >= 2**15), 22)
        table[length, :, side : side + length] = torch.trunc(exact * 2**bits + 0.5 * exact.sign()) / 2**bits
    return table.unfold(2, side, 1).transpose(1, 2).flatten(0, 1)


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
