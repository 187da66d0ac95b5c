"""Colour changes with one factor an image, for a whole batch at once.

The definitions are torchvision's (`transforms.v2.functional.adjust_*`, on floats in [0, 1]), whose batch calls take one
factor for all images; a test compares them image by image. On one core 256 views of 32 px take 4 ms here and
258 ms through torchvision one by one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = (0.2989, 0.587, 0.114)  # torchvision's luma
FROM_RED = torch.tensor([0.0, -2.0, -4.0])[:, None, None]  # n − 5 of `hue`
TINY = 1e-12  # in the place of no chroma at all, whose hue is 0


def luma(
    x: Tensor,  # (B, 3, H, W) in [0, 1]
) -> Tensor:  # (B, 1, H, W)
    r, g, b = x.unbind(1)
    return (GRAY[0] * r).add_(g, alpha=GRAY[1]).add_(b, alpha=GRAY[2]).unsqueeze(1)


def brightness(
    x: Tensor,  # (B, 3, H, W) in [0, 1]
    factor: Tensor,  # (B,)
) -> Tensor:
    return (x * _column(factor)).clamp_(0, 1)


def contrast(
    x: Tensor,  # (B, 3, H, W) in [0, 1]
    factor: Tensor,  # (B,)
) -> Tensor:
    return _blend(x, luma(x).mean((1, 2, 3), keepdim=True), factor)


def saturation(
    x: Tensor,  # (B, 3, H, W) in [0, 1]
    factor: Tensor,  # (B,)
) -> Tensor:
    return _blend(x, luma(x), factor)


def hue(
    x: Tensor,  # (B, 3, H, W) in [0, 1]
    shift: Tensor,  # (B,) in turns, [-0.5, 0.5]
) -> Tensor:
    """Turns the hue at constant value and saturation.

    With h in sixths of a turn, v the largest channel and c = v − min: channel n is
    `v − c·clamp(min(k, 4 − k), 0, 1)`, k = (n + h) mod 6, n = 5, 3, 1 for red, green, blue. On a circle of 6 that is
    `v − c·clamp(2 − |k − 2|, 0, 1)`, and for 0 ≤ h < 6 the distance |k − 2| is `||n + h − 5| − 3|`.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    # The first of the channels that are the largest; as numbers, since torch.where on such truths is 10 times as slow.
    red = (value == r).float()
    green = (value == g).float().mul_(1 - red)  # fault: hue-two-largest
    blue = 1 - red - green
    sixth = (red * (g - b)).addcmul_(green, b - r).addcmul_(blue, r - g).div_(chroma.clamp(min=TINY))
    sixth.add_(green, alpha=2).add_(blue, alpha=4).add_(shift[:, None, None], alpha=6)
    sixth.sub_(torch.floor(sixth / 6), alpha=6)
    out = sixth[:, None] + FROM_RED
    out.abs_().sub_(3).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma[:, None])
    return torch.sub(value[:, None], out, out=out)


ADJUST = (brightness, contrast, saturation, hue)


def jitter(
    x: Tensor,  # (B, 3, H, W) in [0, 1], changed in place
    strength: tuple[float, float, float, float],
    p: float,
) -> Tensor:
    """torchvision's `RandomApply([ColorJitter(*strength)], p)`, drawn for each image: whether, how much, what order."""
    count = len(x)
    on = torch.rand(count) < p
    order = torch.rand(count, 4).argsort(1)
    factors = [_draw(count, s, low) for s, low in zip(strength, (1.0, 1.0, 1.0, 0.0), strict=True)]
    for position in range(4):
        for op, adjust in enumerate(ADJUST):
            if strength[op] == 0:
                continue
            chosen = (on & (order[:, position] == op)).nonzero().squeeze(1)
            if len(chosen):
                x.index_copy_(0, chosen, adjust(x.index_select(0, chosen), factors[op][chosen]))
    return x


def grayscale(
    x: Tensor,  # (B, 3, H, W) in [0, 1], changed in place
    p: float,
) -> Tensor:
    """torchvision's `RandomGrayscale(p)`, drawn for every image."""
    chosen = (torch.rand(len(x)) < p).nonzero().squeeze(1)  # fault: one-draw-grayscale
    if len(chosen):
        x[chosen] = luma(x[chosen]).expand(-1, 3, -1, -1)
    return x


def blur(
    x: Tensor,  # (B, 3, H, W)
    sigma: tuple[float, float],
    p: float,
) -> Tensor:
    """torchvision's `RandomApply([GaussianBlur(kernel, sigma)], p)`, drawn for every image.

    The kernel spans a tenth of the side, as SimCLR's: an odd width, 3 px at the least.
    """
    on, width = torch.rand(len(x)) < p, torch.empty(len(x)).uniform_(*sigma)
    chosen = on.nonzero().squeeze(1)
    if len(chosen):
        x[chosen] = gaussian(x[chosen], width[chosen], max(3, x.shape[-1] // 10 | 1))
    return x


def gaussian(
    x: Tensor,  # (B, C, H, W)
    sigma: Tensor,  # (B,) px
    taps: int,
) -> Tensor:
    """Rows, then columns, with a Gaussian of its own for each image; the edges reflect."""
    count, channels, height = x.shape[:3]
    place = torch.arange(taps) - taps // 2
    kernel = torch.exp(-0.5 * (place / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (B·C, 1, taps)
    out = F.pad(x, (taps // 2,) * 4, mode="reflect").reshape(1, count * channels, height + taps - 1, -1)
    out = F.conv2d(out, kernel[:, :, None], groups=count * channels)
    return F.conv2d(out, kernel[:, :, :, None], groups=count * channels).reshape(x.shape)


def _draw(count: int, strength: float, centre: float) -> Tensor:
    """Uniform in centre ± strength; a factor (centre 1) not below 0."""
    low = max(0.0, centre - strength) if centre else -strength
    return torch.empty(count).uniform_(low, centre + strength)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x - other).mul_(_column(factor)).add_(other).clamp_(0, 1)


def _column(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]
