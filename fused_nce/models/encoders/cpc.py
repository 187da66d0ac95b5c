"""CPC's encoders and contexts (van den Oord, Li, Vinyals 2018, arXiv:1807.03748), for audio and for images.

Everything is a grid: an encoder makes z (B, D, R, W), R rows in the order of prediction. Audio has a column (W = 1)
whose rows are frames of 10 ms; an image is cut into 7×7 patches, and predicted from top to bottom. A context makes
c (B, C, R, W) of which row r has seen rows 0 to r of z and no later one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_nce.core import checks
from fused_nce.models.encoders.patches import grid_side, to_grid, to_patches


class AudioEncoder(nn.Module):
    """Strided convolutions over a waveform, each with ReLU and no norm.

    The paper's five have 512 channels and take 160 samples a frame: 10 ms at 16 kHz. The paddings bring a window of
    20480 samples to 128 frames exactly.

    Args:
        channels: of every layer, and of z.
        kernels: of the layers.
        strides: of the layers.
        paddings: of the layers.
    """

    def __init__(
        self,
        channels: int = 512,
        kernels: Sequence[int] = (10, 8, 4, 4, 4),
        strides: Sequence[int] = (5, 4, 2, 2, 2),
        paddings: Sequence[int] = (2, 2, 2, 2, 1),
    ) -> None:
        super().__init__()
        if not len(kernels) == len(strides) == len(paddings) > 0:
            raise ValueError(
                f"strides: kernels, strides and paddings must be of one length, got {len(kernels)}, {len(strides)} and "
                f"{len(paddings)}"
            )
        layers = list[nn.Module]()
        c_in = 1
        for kernel, stride, padding in zip(kernels, strides, paddings, strict=True):
            layers += [nn.Conv1d(c_in, channels, kernel, stride, padding), nn.ReLU(inplace=True)]
            c_in = channels
        self.layers, self.channels = nn.Sequential(*layers), channels
        self.settings = tuple(zip(kernels, strides, paddings, strict=True))

    def frames(self, samples: int) -> int:
        """How many frames a window gives; 0 or less if it is too short for one."""
        for kernel, stride, padding in self.settings:
            samples = (samples + 2 * padding - kernel) // stride + 1
        return samples

    def forward(
        self,
        x: Tensor,  # (B, samples) or (B, 1, samples)
    ) -> Tensor:  # (B, channels, frames, 1)
        found: Tensor = self.layers(x if x.dim() == 3 else x.unsqueeze(1))
        return found.unsqueeze(3)


class PreActivation(nn.Module):
    """A residual bottleneck of ResNet v2 without norm: ReLU before each of 1×1, 3×3 (strided) and 1×1."""

    def __init__(self, c_in: int, inner: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * inner
        self.conv1 = nn.Conv2d(c_in, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1)
        self.conv3 = nn.Conv2d(inner, c_out, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride) if c_in != c_out or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, 4·inner, H', W')
        active = F.relu(x)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        found: Tensor = self.conv3(F.relu(self.conv2(F.relu(self.conv1(active))))) + shortcut
        return found


class PatchEncoder(nn.Module):
    """A residual network on overlapping patches of the image, a vector each: z of a grid, 7×7 for a quarter.

    No BatchNorm: it would tell a patch about the others, its targets among them.

    Args:
        image_size: px.
        patch_size: px, of which a half overlaps the next patch.
        image_channels: 1 for grayscale.
        width: channels of the first layer; z has 16 times as many (1024 at 64).
        stages: residual blocks of each of three stages; the paper's 3, 4, 23 (ResNet-101), or 3, 4, 6 (ResNet-50).
        stem: "small" (5×5) for patches of 8 or 16 px, "large" (7×7 in steps of 2, max pooling) for 64 px.
        jitter: px by which each patch is cropped at a random place and padded back, in training; 4 in the paper.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch_size: int = 16,
        image_channels: int = 3,
        width: int = 64,
        stages: Sequence[int] = (3, 4, 6),
        stem: str = "small",
        jitter: int = 0,
    ) -> None:
        super().__init__()
        self.side = grid_side(image_size, patch_size)
        if stem not in ("small", "large"):
            raise ValueError(f"stem: must be 'small' or 'large', got {stem!r}")
        if len(stages) != 3 or min(stages) < 1:
            raise ValueError(f"stages: must be three numbers of at least 1, got {tuple(stages)}")
        if not 0 <= jitter < patch_size:
            raise ValueError(f"jitter: must be in [0, {patch_size} px), got {jitter}")
        self.image_size, self.patch_size, self.image_channels = image_size, patch_size, image_channels
        self.jitter = jitter
        large = [nn.Conv2d(image_channels, width, 7, 2, 3), nn.MaxPool2d(3, 2, 1)]
        self.stem = nn.Sequential(*large) if stem == "large" else nn.Conv2d(image_channels, width, 5, 1, 2)
        blocks = list[nn.Module]()
        c_in = width
        for stage, count in enumerate(stages):
            inner = width << stage
            for i in range(count):
                blocks.append(PreActivation(c_in, inner, 2 if stage and i == 0 else 1))
                c_in = 4 * inner
        self.blocks, self.channels = nn.Sequential(*blocks), c_in

    def forward(
        self,
        x: Tensor,  # (B, image_channels, H, H)
    ) -> Tensor:  # (B, channels, side, side)
        patches = to_patches(x, self.patch_size)
        if self.training and self.jitter:
            patches = shake(patches, self.jitter)
        vectors = F.relu(self.blocks(self.stem(patches))).mean((2, 3))
        return to_grid(vectors, self.side)


def shake(
    patches: Tensor,  # (P, C, S, S)
    px: int,
) -> Tensor:
    """A crop of S − px at a random place in each patch, put back in the middle of zeros."""
    count, size = len(patches), patches.shape[-1]
    kept = size - px
    start = torch.randint(px + 1, (2, count, 1), device=patches.device)
    rows, columns = start + torch.arange(kept, device=patches.device)  # (P, kept) each
    chosen = patches[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None]]  # (P, kept, kept, C)
    left = px // 2
    return F.pad(chosen.permute(0, 3, 1, 2), (left, px - left) * 2)


class GRUContext(nn.Module):
    """A GRU down the rows, each column on its own: over time, or from the top of an image to its bottom."""

    def __init__(self, channels: int, hidden: int = 256) -> None:
        super().__init__()
        self.gru, self.channels = nn.GRU(channels, hidden, batch_first=True), hidden

    def forward(
        self,
        z: Tensor,  # (B, D, R, W)
    ) -> Tensor:  # (B, hidden, R, W)
        columns = z.permute(0, 3, 2, 1).flatten(0, 1)  # (B·W, R, D)
        c: Tensor = self.gru(columns)[0]
        return c.unflatten(0, (z.shape[0], -1)).permute(0, 3, 2, 1)  # `len` would fix the batch of an exported graph


class PixelCNN(nn.Module):
    """Gated convolutions, 3×3 over the row itself and the one above: row r of c has seen rows 0 to r, all columns.

    Args:
        channels: of z.
        hidden: of c.
        layers: each reaches a row further up.
    """

    def __init__(self, channels: int, hidden: int = 256, layers: int = 4) -> None:
        super().__init__()
        checks.checked_int("layers", layers, at_least=1)
        self.first = nn.Conv2d(channels, hidden, 1)
        # 2×3 and padding above alone: the row below is no weight at zero, it is not there.
        self.gates = nn.ModuleList(nn.Conv2d(hidden, 2 * hidden, (2, 3)) for _ in range(layers))
        self.outs = nn.ModuleList(nn.Conv2d(hidden, hidden, 1) for _ in range(layers))
        self.channels = hidden

    def forward(
        self,
        z: Tensor,  # (B, D, R, W)
    ) -> Tensor:  # (B, hidden, R, W)
        c: Tensor = self.first(z)
        for gate, out in zip(self.gates, self.outs, strict=True):
            value, share = gate(F.pad(c, (1, 1, 1, 0))).chunk(2, 1)
            c = c + out(value.tanh() * share.sigmoid())
        return c


class NoContext(nn.Module):
    """c = z, as Greedy InfoMax predicts (Löwe et al. 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, z: Tensor) -> Tensor:  # (B, D, R, W) -> the same
        return z
