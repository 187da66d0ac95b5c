"""How much of an image its features keep: a decoder is trained on them, and its images are compared (MS-SSIM)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_nce.models.decoder import CHANNELS, Decoder, widths
from fused_nce.train.seeded import seeded

WINDOW, SIGMA, C1, C2 = 11, 1.5, 0.01**2, 0.03**2  # Wang et al. 2004, of images in [0, 1]
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the scales, finest first (Wang et al. 2003)
UPDATES, BATCH, RATE = 1500, 64, 1e-3  # all encoders get the same decoder, of a quarter of DIM's channels


def train_decoder(
    features: Tensor,  # (n, D), standardised
    images: Tensor,  # (n, 3, H, H) uint8
    *,
    seed: int,
    updates: int = UPDATES,
) -> Decoder:
    """Trains it by squared error with Adam and a cosine schedule, and sets eval mode."""
    with seeded(seed), torch.enable_grad():
        decoder = Decoder(features.shape[1], images.shape[-1])
        optimizer = torch.optim.Adam(decoder.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            rows = torch.randint(len(features), (BATCH,))
            optimizer.zero_grad()
            F.mse_loss(decoder(features[rows]), images[rows].float() / 255).backward()
            optimizer.step()
            schedule.step()
    return decoder.eval()


def similarity(
    features: Tensor,  # (m, D)
    images: Tensor,  # (m, 3, H, H) uint8
    decoder: Decoder,
) -> tuple[float, float, int]:
    """Mean MS-SSIM and mean SSIM of the decoder's images beside the true ones, and the scales of the first."""
    count, found = scales(images.shape[-1]), []
    with torch.inference_mode():
        for some, true in zip(features.split(256), images.split(256), strict=True):
            made, real = decoder(some), true.float() / 255
            found.append(torch.stack((ms_ssim(made, real, count), ms_ssim(made, real, 1))))
    both = torch.cat(found, 1).double().mean(1)
    return float(both[0]), float(both[1]), count


def check_side(side: int) -> None:
    """Refuses images of a side that the decoder does not make, or that the window does not fit into.

    Raises:
        ValueError: naming the protocol.
    """
    scales(side)
    try:
        widths(side, CHANNELS)
    except ValueError as error:
        raise ValueError(f"protocols: ms-ssim needs images of 16, 32, 64, 128 … px, got {side}") from error


def scales(side: int) -> int:
    """How many of the five scales the window fits into: 2 at 32 px, 3 at 64 px.

    Raises:
        ValueError: for an image smaller than the window.
    """
    if side < WINDOW:
        raise ValueError(f"protocols: ms-ssim needs images of {WINDOW} px or more, got {side}")
    return min(len(SCALES), int(math.log2(side / WINDOW)) + 1)


def ms_ssim(
    a: Tensor,  # (B, C, H, W) in [0, 1]
    b: Tensor,  # (B, C, H, W)
    count: int,
) -> Tensor:  # (B,)
    """Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003), of the finest `count` scales; 1 is SSIM.

    The weights of the scales left out go to the others in proportion. Contrast and structure below 0 count as 0.
    """
    weights = torch.tensor(SCALES[:count]) / sum(SCALES[:count])
    result = torch.ones(len(a))
    for i, weight in enumerate(weights.tolist()):
        luminance, structure = _terms(a, b)
        last = i == count - 1
        value = (luminance * structure if last else structure).mean((1, 2, 3))
        result = result * (value if count == 1 else value.clamp(min=0) ** weight)
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result


def _terms(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, at every place of the window."""
    place = torch.arange(WINDOW, dtype=a.dtype) - WINDOW // 2
    line = (-(place**2) / (2 * SIGMA**2)).exp()
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        c = x.shape[1]
        x = F.conv2d(x, line.view(1, 1, -1, 1).expand(c, -1, -1, -1), groups=c)
        return F.conv2d(x, line.view(1, 1, 1, -1).expand(c, -1, -1, -1), groups=c)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return luminance, (2 * both + C2) / (var_a + var_b + C2)
