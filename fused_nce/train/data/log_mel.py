"""Log-mel spectra, the features of a recording that need no training."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW_S, HOP_S = 0.025, 0.010
FLOOR = 1e-5  # of the power of samples of mean square 1: the logarithm of silence


def filters(rate: int, size: int, bands: int) -> Tensor:  # (bands, size // 2 + 1)
    """Triangles of height 1, their corners equally far apart in mel = 2595·log10(1 + f / 700), from 0 to rate / 2."""
    top = 2595 * torch.log10(torch.tensor(1 + rate / 2 / 700, dtype=torch.float64))
    corners = 700 * (10 ** (torch.linspace(0, float(top), bands + 2, dtype=torch.float64) / 2595) - 1)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    f = torch.arange(size // 2 + 1, dtype=torch.float64) * rate / size
    return torch.minimum((f - low) / (middle - low), (high - f) / (high - middle)).clamp(min=0).float()


def log_mel(
    wave: Tensor,  # (samples,) float32
    rate: int,
    bands: int = 40,
) -> Tensor:  # (frames, bands)
    """Log power in each band, in windows of 25 ms (Hann) every 10 ms; zeros stand beyond both ends.

    Args:
        wave: a recording.
        rate: samples a second.
        bands: of the mel scale.
    """
    size, hop = round(WINDOW_S * rate), round(HOP_S * rate)
    points = 1 << (size - 1).bit_length()
    window = torch.hann_window(size)
    spectrum = torch.stft(
        wave, points, hop, size, window, center=True, pad_mode="constant", return_complex=True
    )  # (points / 2 + 1, frames)
    power = spectrum.abs().square() / window.square().sum()
    return (filters(rate, points, bands) @ power).clamp(min=FLOOR).log().T
