"""The building blocks of AMDIM's encoders: stem, pooling-residual blocks, RKHS head.

Source: Bachman et al., "Learning representations by maximizing mutual information across views",
arXiv 1906.00910, section 4 and appendix. Nothing is padded except the stem of the 128 px encoder, so that the
statistics of a feature do not depend on its place in the map.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_nce.models.encoders.convolution import Conv2d, served
from fused_nce.models.encoders.pointwise import WIDEST, Pointwise

Init = Literal["amdim", "kaiming"]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module
HEAD_SHORTCUT_NOISE = 0.01  # half-width of the uniform noise around the identity


def kaiming_(weight: Tensor) -> None:
    """PyTorch's default for a convolution, written out so that a change of that default changes nothing here."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def init_last_(weight: Tensor, init: Init) -> None:
    """The last convolution of a branch: zero (the block starts as its shortcut) or Kaiming like the others."""
    if init == "amdim":
        nn.init.zeros_(weight)  # fault: branches-blocks-not
    else:
        kaiming_(weight)


def maybe_norm(channels: int, use_bn: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if use_bn else nn.Identity()


class PatchConv2d(Conv2d):
    """A convolution without padding, as one matrix product where its patches do not overlap and channels are innermost.

    1×1, 2×2 in steps of 2, or as wide as the map: oneDNN's gradients of these, in bf16, take up to 10 times as long.
    """

    def __init__(self, c_in: int, c_out: int, width: int = 1, stride: int = 1, *, bias: bool = False) -> None:
        super().__init__(c_in, c_out, width, stride, bias=bias)

    def forward(
        self,
        x: Tensor,  # (B, c_in, H, W)
    ) -> Tensor:  # (B, c_out, H', W')
        width, stride, (height, across) = self.kernel_size[0], self.stride[0], x.shape[2:]
        apart = stride == width <= min(height, across) or width == height == across
        if not apart or x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        x, weight = x.permute(0, 2, 3, 1), self.weight.permute(0, 2, 3, 1).flatten(1)
        if width > 1:
            rows, columns = height // width, across // width
            x = x[:, : rows * width, : columns * width].unflatten(2, (columns, width)).unflatten(1, (rows, width))
            x = x.transpose(2, 3).flatten(3)  # fault: patch-pixels-transposed
        return F.linear(x, weight, self.bias).permute(0, 3, 1, 2)


def means(x: Tensor, width: int, stride: int) -> Tensor:
    """`F.avg_pool2d`; on a CPU windows of two steps are means of a step's, half the time for the gradient."""
    if x.device.type == "cpu" and width == 2 * stride:
        x, width, stride = F.avg_pool2d(x, stride, stride), 2, 1  # fault: means-of-means
    return F.avg_pool2d(x, width, stride)


class Stem(nn.Sequential):
    """Convolution with bias, then ReLU; `padding` reflects."""

    def __init__(self, c_in: int, c_out: int, width: int, stride: int = 1, padding: int = 0) -> None:
        conv = nn.Conv2d(c_in, c_out, width, stride, padding, padding_mode="reflect" if padding else "zeros")
        super().__init__(conv, nn.ReLU(inplace=True))


class ResNxN(nn.Module):
    """`conv w×w → [BN] → ReLU → conv 1×1` beside average pooling, with no activation after the sum.

    Channels that the input does not have are zero in the shortcut. With `init="amdim"` the branch starts at zero:
    the whole network is average pooling at first.
    """

    def __init__(
        self, c_in: int, c_out: int, width: int, stride: int, *, use_bn: bool = False, init: Init = "amdim"
    ) -> None:
        super().__init__()
        if c_out < c_in:
            raise ValueError(f"c_out: a block cannot have fewer channels than its input, got {c_out} for {c_in}")
        self.width, self.stride, self.extra = width, stride, c_out - c_in
        self.conv1 = PatchConv2d(c_in, c_out, width, stride)
        self.norm = maybe_norm(c_out, use_bn)
        self.conv2 = PatchConv2d(c_out, c_out)
        kaiming_(self.conv1.weight)
        init_last_(self.conv2.weight, init)

    def forward(
        self,
        x: Tensor,  # (B, c_in, H, W)
    ) -> Tensor:  # (B, c_out, H', W')
        if self._pointwise(x):
            out: Tensor = Pointwise.apply(x, self.conv1.weight, self.conv2.weight)
            return out
        branch = self.conv2(F.relu(self.norm(self.conv1(x))))
        shortcut = means(x, self.width, self.stride) if self.width > 1 or self.stride > 1 else x
        if self.extra:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, self.extra))
        return branch + shortcut  # fault: activation-after-residual

    def _pointwise(self, x: Tensor) -> bool:
        parts = self.conv1, self.norm, self.conv2
        return (
            self.width == self.stride == 1
            and x.shape[1] == self.conv1.out_channels <= WIDEST
            and x.shape[1] % 2 == 0
            and x.dtype == torch.bfloat16
            and isinstance(self.norm, nn.Identity)
            and type(self.conv1) is type(self.conv2) is PatchConv2d
            and not any(getattr(part, hooks) for part in parts for hooks in HOOKS)
            and served(x, self.conv1.weight)
        )


class ResBlock(nn.Sequential):
    """One `ResNxN` that changes the size, then `depth − 1` of width 1 that do not."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        width: int,
        stride: int,
        depth: int,
        *,
        use_bn: bool = False,
        init: Init = "amdim",
    ) -> None:
        rest = (ResNxN(c_out, c_out, 1, 1, use_bn=use_bn, init=init) for _ in range(depth - 1))
        super().__init__(ResNxN(c_in, c_out, width, stride, use_bn=use_bn, init=init), *rest)


class RKHSHead(nn.Module):
    """Embeds every location of a map into the space where the scores are dot products.

    A two-layer 1×1 branch (last layer as `init` says) plus a 1×1 shortcut that starts near the identity, then
    BatchNorm, always.
    """

    def __init__(self, c_in: int, c_out: int, *, use_bn: bool = False, init: Init = "amdim") -> None:
        super().__init__()
        self.conv1 = PatchConv2d(c_in, c_out)
        self.norm = maybe_norm(c_out, use_bn)
        self.conv2 = PatchConv2d(c_out, c_out)
        self.shortcut = PatchConv2d(c_in, c_out, bias=True)
        self.out_norm = nn.BatchNorm2d(c_out)
        kaiming_(self.conv1.weight)
        init_last_(self.conv2.weight, init)
        with torch.no_grad():
            weight = self.shortcut.weight.uniform_(-HEAD_SHORTCUT_NOISE, HEAD_SHORTCUT_NOISE)
            weight[:, :, 0, 0].fill_diagonal_(1.0)

    def forward(
        self,
        x: Tensor,  # (B, c_in, H, W)
    ) -> Tensor:  # (B, c_out, H, W)
        out: Tensor = self.out_norm(self.before_norm(x))
        return out

    def before_norm(
        self,
        x: Tensor,  # (B, c_in, H, W)
    ) -> Tensor:  # (B, c_out, H, W)
        """The output before its BatchNorm: it depends on one row only."""
        return self.conv2(F.relu(self.norm(self.conv1(x)))) + self.shortcut(x)
