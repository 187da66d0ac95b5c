"""A residual block of 1×1 convolutions without norms as one node of the graph, on a CPU that multiplies bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_nce.core.ops import LIBRARY
from fused_nce.models.encoders.convolution import plain_gradients, still_multiplies

WIDEST = 128  # channels: with more, the products take so long that what lies between them hardly counts


LIBRARY.define("cpu_pointwise(Tensor x, Tensor w1, Tensor w2) -> Tensor")
LIBRARY.define("cpu_pointwise_grads(Tensor dy, Tensor x, Tensor w1, Tensor w2) -> (Tensor dx, Tensor dw1, Tensor dw2)")
torch.library.register_fake("fused_nce::cpu_pointwise", lambda x, *weights: torch.empty_like(x), lib=LIBRARY)


@torch.library.register_fake("fused_nce::cpu_pointwise_grads", lib=LIBRARY)
def _(dy: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(torch.empty_like(weight, dtype=torch.float32) for weight in weights)


def plain(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`x + conv(relu(conv(x, first)), second)`."""
    return F.conv2d(F.relu(F.conv2d(x, first)), second) + x


class Pointwise(torch.autograd.Function):
    """`plain` of bfloat16 maps, channels last: 128 pixels at a time stay in a core's cache from first to last.

    Its hidden maps are found once more in the backward. The weights' gradients are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, C, H, W)
        first: Tensor,  # (C, C, 1, 1)
        second: Tensor,  # (C, C, 1, 1)
    ) -> Tensor:  # (B, C, H, W)
        ctx.save_for_backward(x, first, second)
        return _maps(torch.ops.fused_nce.cpu_pointwise(_rows(x), *_matrices(x, first, second)), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient is to be differentiated  # fault: pointwise-once
        if again or not still_multiplies():
            return tuple(plain_gradients(plain, ctx.saved_tensors, ctx.needs_input_grad, dy, again))
        up = _rows(dy.contiguous(memory_format=torch.channels_last))
        dx, d1, d2 = torch.ops.fused_nce.cpu_pointwise_grads(up, _rows(x), *_matrices(x, first, second))
        return _maps(dx, x), d1.view_as(first), d2.view_as(second)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    count, channels, height, width = like.shape
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def _matrices(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [weight.to(x.dtype).flatten(1).contiguous() for weight in weights]
