"""DIM's critics: how a local map and a global vector become scores, by dot product or by concatenation.

A critic returns what its loss is called with. An encode-and-dot critic returns two embeddings, for `DIMLoss`, which
never holds the scores. A concatenating critic has a network of its own behind every pair: there is nothing to fuse, it
runs in plain torch, holds (1 + K)·B·L·512 activations, and so compares each global vector with K other images only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_nce.core.statistics import softplus
from fused_nce.losses import DIMLoss, NCEOutput
from fused_nce.losses.common import widened
from fused_nce.models.encoders.blocks import HEAD_SHORTCUT_NOISE, PatchConv2d
from fused_nce.models.encoders.dim import DIMEncoder

CONCAT_UNITS = 512


class PointwiseBlock(nn.Module):
    """`1×1 → BN → ReLU → 1×1` beside a 1×1 shortcut that starts near the identity, then LayerNorm over the channels.

    BatchNorm and LayerNorm are what keeps raw dot products finite: at 2048 channels their deviation is √2048 ≈ 45, and
    DIM scales by nothing.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = PatchConv2d(c_in, c_out)
        self.norm = nn.BatchNorm2d(c_out)
        self.conv2 = PatchConv2d(c_out, c_out, bias=True)
        self.shortcut = PatchConv2d(c_in, c_out, bias=True)
        self.out_norm = nn.LayerNorm(c_out)
        if c_out >= c_in:
            with torch.no_grad():
                weight = self.shortcut.weight.uniform_(-HEAD_SHORTCUT_NOISE, HEAD_SHORTCUT_NOISE)
                weight[:, :, 0, 0].fill_diagonal_(1.0)

    def forward(
        self,
        x: Tensor,  # (B, c_in, H, W)
    ) -> Tensor:  # (B, H·W, c_out)
        found = self.conv2(F.relu(self.norm(self.conv1(x)))) + self.shortcut(x)
        normed: Tensor = self.out_norm(found.flatten(2).transpose(1, 2))
        return normed


class LocalDot(nn.Module):
    """Encode-and-dot of every location with every global vector: two `PointwiseBlock`s of `units` channels."""

    def __init__(self, encoder: DIMEncoder, global_channels: int, units: int) -> None:
        super().__init__()
        self.local, self.globals = PointwiseBlock(encoder.channels, units), PointwiseBlock(global_channels, units)

    def forward(
        self,
        local: Tensor,  # (B, C, M, M)
        globals_: Tensor,  # (B, C', G, G), G = 1 for one vector
    ) -> tuple[Tensor, Tensor]:  # (B, M·M, units), (B, G·G, units)
        return self.local(local), self.globals(globals_)


class GlobalDot(nn.Module):
    """Encode-and-dot of whole maps: a second top brings the local map to `units`, a layer the code."""

    def __init__(self, encoder: DIMEncoder, units: int) -> None:
        super().__init__()
        self.map, self.code = encoder.make_top(units), nn.Linear(encoder.code, units)

    def forward(
        self,
        local: Tensor,  # (B, C, M, M)
        code: Tensor,  # (B, code)
    ) -> tuple[Tensor, Tensor]:  # (B, 1, units) twice
        return self.map(local)[2].unsqueeze(1), self.code(code).unsqueeze(1)


class Concat(nn.Module):
    """Concat-and-convolve: `1×1 512 → ReLU → 1×1 512 → ReLU → 1×1 1` on the code tiled beside each location.

    The first layer is linear, so it is taken of location and code apart and added, once a pair. The code of image i
    meets the locations of image i and of the next K images, in the order of the batch.

    Args:
        channels: of the locations.
        code: units of the code.
        negatives: K; None for all other images of the batch.
    """

    def __init__(self, channels: int, code: int, negatives: int | None) -> None:
        super().__init__()
        self.location, self.code = nn.Linear(channels, CONCAT_UNITS), nn.Linear(code, CONCAT_UNITS, bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(), nn.Linear(CONCAT_UNITS, CONCAT_UNITS), nn.ReLU(), nn.Linear(CONCAT_UNITS, 1)
        )
        self.negatives = negatives

    def score(
        self,
        locations: Tensor,  # (B, L, channels)
        code: Tensor,  # (B, code)
    ) -> Tensor:  # (1 + K, B, L)
        images = len(code)
        count = images - 1 if self.negatives is None else min(self.negatives, images - 1)
        from_location, from_code = self.location(locations), self.code(code)[:, None]
        scores = [self.rest(from_location.roll(-shift, 0) + from_code).squeeze(-1) for shift in range(count + 1)]
        return torch.stack(scores)


class LocalConcat(Concat):
    """`Concat` over the M×M locations of the local map."""

    def __init__(self, encoder: DIMEncoder, negatives: int | None) -> None:
        super().__init__(encoder.channels, encoder.code, negatives)

    def forward(
        self,
        local: Tensor,  # (B, C, M, M)
        code: Tensor,  # (B, code, 1, 1)
    ) -> tuple[Tensor]:  # (1 + K, B, M·M)
        return (self.score(local.flatten(2).transpose(1, 2), code.flatten(1)),)


class GlobalConcat(Concat):
    """The paper's critic of DIM(G): `Concat` of the whole local map, flattened, with the code."""

    def __init__(self, encoder: DIMEncoder, negatives: int | None) -> None:
        super().__init__(encoder.channels * encoder.side**2, encoder.code, negatives)

    def forward(
        self,
        local: Tensor,  # (B, C, M, M)
        code: Tensor,  # (B, code)
    ) -> tuple[Tensor]:  # (1 + K, B, 1)
        return (self.score(local.flatten(1).unsqueeze(1), code),)


class PairLoss(nn.Module):
    """`DIMLoss` on given scores instead of embeddings, with K images as negatives; `estimator`, `anchor` as there."""

    def __init__(self, estimator: str = "jsd", *, anchor: str = "global") -> None:
        super().__init__()
        DIMLoss(estimator, anchor=anchor)  # its checks
        self.estimator, self.anchor = estimator, anchor

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"estimator={self.estimator!r}, anchor={self.anchor!r}"

    def forward(
        self,
        scores: Tensor,  # (1 + K, B, L): [r, i, l] of code i with location l of image i + r
    ) -> NCEOutput:
        """The negative of a bound on the information, in nats; the positives are `scores[0]`.

        Raises:
            ValueError: without negatives.
        """
        if len(scores) < 2:
            raise ValueError("scores: got K = 0 negatives, need at least 2 images and critic_negatives >= 1")
        joint, product = widened(scores[0]), widened(scores[1:])
        if self.estimator == "jsd":
            loss = softplus(-joint).mean() + softplus(product).mean()
        elif self.estimator == "dv":
            loss = product.logsumexp((0, 1, 2)) - math.log(product.numel()) - joint.mean()
        else:
            by_code = product.logsumexp((0, 2))[:, None]  # (B, 1)
            # The location's own view: its image is i + r, so row r is shifted to stand where that image stands.
            shifted = torch.stack([row.roll(shift, 0) for shift, row in enumerate(product, 1)])
            by_location = shifted.logsumexp(0)  # (B, L)
            terms = {
                anchor: (torch.logaddexp(others, joint) - joint).mean()
                for anchor, others in (("global", by_code), ("local", by_location))
            }
            loss = (terms["global"] + terms["local"]) / 2 if self.anchor == "both" else terms[self.anchor]
        return NCEOutput(loss, loss, torch.zeros_like(loss), {"pos_mean": joint.mean().detach()})
