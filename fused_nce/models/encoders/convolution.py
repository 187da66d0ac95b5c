"""Convolutions whose weights get their gradient from our own kernel, where that is the faster one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fused_nce import _extension
from fused_nce.core.ops import LIBRARY

FEWEST_CHANNELS = 32  # with fewer, packing costs more than it saves


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`; on a CPU that multiplies bfloat16, the weight's gradient is summed in float32 by a kernel of ours.

    oneDNN's takes 1.1 to 3 times as long there, and rounds to bfloat16. All else, and all that looks into a graph
    (transforms, modes, compilers), has `nn.Conv2d`'s own operations.
    """

    def forward(
        self,
        x: Tensor,  # (B, c_in, H, W)
    ) -> Tensor:  # (B, c_out, H', W')
        if not self._ours(x):
            return super().forward(x)
        out: Tensor = _Convolution.apply(x.bfloat16(), self.weight, self.stride, self.padding)
        return out

    def _ours(self, x: Tensor) -> bool:
        return (
            self.bias is None
            and self.in_channels >= FEWEST_CHANNELS
            and self.kernel_size[0] == self.kernel_size[1] > 1
            and (self.dilation, self.groups, self.padding_mode) == ((1, 1), 1, "zeros")
            and self.stride[0] == self.stride[1]
            and self.padding[0] == self.padding[1]
            and served(x, self.weight)
        )


def served(x: Tensor, weight: Tensor) -> bool:
    """Whether our kernels may differentiate by a weight: bfloat16 on a CPU, and nobody looks into the graph."""
    autocast = torch.is_autocast_enabled("cpu")
    products = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
    return (
        x.device.type == "cpu"
        and {type(x), type(weight)} <= {Tensor, nn.Parameter}  # no subclass  # fault: convolution-subclass
        and products == torch.bfloat16
        and (autocast or x.dtype == torch.bfloat16)
        and torch.float64 not in (x.dtype, weight.dtype)  # which autocast leaves alone
        and weight.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and multiplies()
    )


def multiplies() -> bool:
    """Whether the C++ kernels may now multiply bfloat16: `torch.backends.mkldnn.flags(enabled=False)` forbids it."""
    return bool(torch._C._get_mkldnn_enabled()) and has_kernel()


def still_multiplies() -> bool:
    """In a backward whose forward did. Under compiled autograd, which cannot ask, the kernels themselves do."""
    return torch.compiler.is_compiling() or multiplies()


@functools.cache
def has_kernel() -> bool:
    """Whether the C++ kernels are here, and this CPU multiplies bfloat16. Asked while oneDNN is on."""
    module = _extension.status()[0]
    return module is not None and bool(module.build_info()["bf16_hardware"])


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], dy: Tensor, again: bool
) -> list[Tensor | None]:
    """Of a function of a map and weights by torch's own operations; `again`: themselves with a graph."""
    with torch.enable_grad():
        x, *weights = inputs
        out = function(x, *(weight.to(x.dtype) for weight in weights))
        wanted = [t for t, need in zip(inputs, needed, strict=False) if need]
        found = iter(torch.autograd.grad(out, wanted, dy, create_graph=again))
    return [next(found) if need else None for _, need in zip(inputs, needed, strict=False)]


LIBRARY.define("cpu_kernel_gradient(Tensor dy, Tensor x, int kernel, int stride, int padding) -> Tensor")


@torch.library.register_fake("fused_nce::cpu_kernel_gradient", lib=LIBRARY)
def _(dy: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    sums = x.new_empty((kernel, kernel, dy.shape[1], x.shape[1]), dtype=torch.float32)
    return sums.permute(2, 3, 0, 1)  # fault: kernel-gradient-fake


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight.to(x.dtype), None, stride, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        again = torch.is_grad_enabled()  # the gradient is to be differentiated  # fault: convolution-once
        if again or not still_multiplies():
            plain = functools.partial(F.conv2d, stride=stride, padding=padding)
            return *plain_gradients(plain, (x, weight), ctx.needs_input_grad, dy, again), None, None
        dy, dx = dy.contiguous(memory_format=torch.channels_last), None
        if ctx.needs_input_grad[0]:
            sides = stride, padding, (1, 1), False, (0, 0), 1
            dx, *_ = torch.ops.aten.convolution_backward(dy, x, weight.to(x.dtype), None, *sides, (True, False, False))
        around = padding[0]  # fault: convolution-padding-lost
        dw = torch.ops.fused_nce.cpu_kernel_gradient(dy, x, weight.shape[-1], stride[0], around)
        return dx, dw, None, None
