"""Convolutions whose weights' gradient is our kernel's: the plain one's values, and the plain one where it must be."""

import contextlib
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fused_nce.models.encoders import convolution
from fused_nce.models.encoders.blocks import ResNxN
from fused_nce.models.encoders.convolution import Conv2d

needs_kernel = pytest.mark.skipif(
    not convolution.has_kernel(), reason="needs the C++ kernels, on a CPU that multiplies bfloat16"
)
LAST = torch.channels_last


def maps(*shape):
    return torch.randn(*shape).bfloat16().to(memory_format=LAST)


def error(found, true):
    return float((found.detach().double() - true.detach()).norm() / true.detach().norm())


@needs_kernel
def test_the_kernels_sums_are_float32s():
    """All kinds of windows, sides that no window ends at, odd channels, single images, none, and several groups."""
    # window, step, padding, height, width; the last with more images than a group has
    sizes = ((1, 1, 0, 4, 4), (2, 1, 0, 5, 3), (3, 1, 1, 4, 6), (3, 2, 1, 7, 8), (4, 2, 0, 10, 9), (3, 3, 2, 8, 7))
    channels, many = ((3, 5), (32, 48), (40, 17)), (((3, 1, 1, 6, 6), 300, (64, 64)),)
    for (width, stride, padding, height, across), count, (c_in, c_out) in (*product(sizes, (1, 2, 5), channels), *many):
        x = maps(count, c_in, height, across)
        weight = torch.zeros(c_out, c_in, width, width, dtype=torch.float64, requires_grad=True)
        out = F.conv2d(x.double(), weight, None, stride, padding)
        dy = maps(*out.shape)
        (true,) = torch.autograd.grad(out, weight, dy.double())
        assert error(torch.ops.fused_nce.cpu_kernel_gradient(dy, x, width, stride, padding), true) < 1e-6
    assert not torch.ops.fused_nce.cpu_kernel_gradient(dy[:0], x[:0], 3, 1, 1).any()


@needs_kernel
def test_the_kernel_names_what_it_cannot_read():
    x = maps(2, 4, 6, 6)
    for dy, theirs, message in (
        (x.float(), x, r"^dy is Float \[2, 4, 6, 6\], needed: four-dimensional bfloat16, channels last$"),
        (x, x.contiguous(), r"^x is BFloat16 \[2, 4, 6, 6\], needed"),
        (x, x[:1], r"^dy is \[2, 4, 6, 6\], needed: the result's shape of a convolution of \[1, 4, 6, 6\]$"),
        (x[:, :, 1:], x, r"^dy is .*needed"),
    ):
        with pytest.raises(ValueError, match=message):
            torch.ops.fused_nce.cpu_kernel_gradient(dy.contiguous(memory_format=LAST), theirs, 3, 1, 1)
    with pytest.raises(ValueError, match="needed: the result's shape"):  # a window larger than the map
        torch.ops.fused_nce.cpu_kernel_gradient(maps(2, 4, 0, 0), maps(2, 4, 2, 2), 3, 1, 0)


@needs_kernel
def test_gradients_and_gradients_of_them_are_the_plain_ones():
    for width, stride, padding in ((3, 1, 1), (3, 2, 1), (4, 2, 0)):
        layer = Conv2d(32, 40, width, stride, padding, bias=False).to(memory_format=LAST)
        x, found = maps(3, 32, 10, 10), []
        for kind in (torch.float64, torch.bfloat16, torch.float32):  # the truth, ours, and a layout that is not
            weight = layer.weight.detach().to(kind if kind == torch.float64 else torch.float32).requires_grad_()
            inside = x.to(torch.float64 if kind == torch.float64 else torch.bfloat16).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind != torch.float64):
                given = inside.contiguous() if kind == torch.float32 else inside
                out = torch.func.functional_call(layer, {"weight": weight}, (given,))
            assert ("_Convolution" in type(out.grad_fn).__name__) == (kind == torch.bfloat16)
            towards = torch.linspace(-1, 2, out.numel()).view_as(out).bfloat16().to(out.dtype)
            slopes = torch.autograd.grad(out, (inside, weight), towards, create_graph=True)
            twice = torch.autograd.grad(slopes[0].double().square().sum() + slopes[1].double().sum(), (inside, weight))
            found.append((out, *slopes, *twice))
        for true, ours, plain in zip(*found, strict=True):
            assert error(ours, true) <= 1.2 * error(plain, true) + 1e-6
        once = torch.autograd.grad(
            layer_out := _autocast(layer, x.requires_grad_()), layer.weight, towards.view_as(layer_out)
        )
        assert error(once[0], found[0][2]) < 1e-6  # float32 sums, not rounded


def _autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


@needs_kernel
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_elsewhere_it_is_plain(monkeypatch):
    """Under transforms, tangents, compilers and modes; with a bias, dilation or groups; and without a gradient."""
    monkeypatch.setattr(convolution._Convolution, "apply", lambda *args: pytest.fail("ours"))
    x = maps(2, 32, 6, 6)

    def layer(**settings):
        return Conv2d(32, 32, 3, **({"bias": False} | settings)).bfloat16().to(memory_format=LAST)

    plain = layer()

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(plain(forward_ad.make_dual(x, x))).tangent

    def counted(x):
        with FlopCounterMode(display=False) as counter:
            plain(x)
        return torch.tensor(counter.get_total_flops())

    class Other(torch.Tensor): ...

    ways = (
        torch.func.grad(lambda x: plain(x).float().square().sum()),
        tangent,
        torch.compile(plain, backend="eager"),
        counted,
        torch.jit.trace(plain, x),
        lambda x: plain(x.as_subclass(Other)),
    )
    frozen = layer().requires_grad_(False)
    wide = layer().double()
    for kind in (torch.float64, torch.bfloat16):  # float64 on either side, which autocast leaves alone
        with torch.autocast("cpu", torch.bfloat16), contextlib.suppress(RuntimeError):  # of dtypes that differ
            assert wide(x.to(kind)).dtype == torch.float64
    others = (layer(bias=True), layer(dilation=2), layer(groups=2), layer(padding=1, padding_mode="reflect"), frozen)
    for way in ways + others:
        torch.testing.assert_close(way(x), way(x.contiguous()), atol=0.05, rtol=0.05)
    with torch.no_grad():
        plain(x)
    with pytest.raises(pytest.fail.Exception, match="ours"):
        plain(x)
    monkeypatch.setattr(convolution, "has_kernel", lambda: False)
    plain(x)


@needs_kernel
def test_without_onednn_the_gradients_are_torchs():
    layer = Conv2d(32, 40, 3, bias=False).to(memory_format=LAST)
    x, found = maps(2, 32, 6, 6).requires_grad_(), []
    for there, back in ((True, True), (True, False), (False, False)):
        with torch.backends.mkldnn.flags(enabled=there):
            out = _autocast(layer, x)
        assert ("_Convolution" in type(out.grad_fn).__name__) == there
        with torch.backends.mkldnn.flags(enabled=back):
            found.append(torch.autograd.grad(out.float().square().sum(), (x, layer.weight)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=0.05, rtol=0.05)


@needs_kernel
def test_a_traced_backward_has_the_same_bits():
    """Compiled autograd, in one graph of each size and in one of symbolic sizes, after a forward that is eager."""
    calls, w = torch.ops.fused_nce, torch.randn(6, 6).bfloat16()
    opcheck(calls.cpu_kernel_gradient, (maps(2, 5, 4, 4), maps(2, 3, 4, 4), 3, 1, 1))
    opcheck(calls.cpu_pointwise, (w[:5], w, w))
    opcheck(calls.cpu_pointwise_grads, (w[:5], w[:5], w, w))
    for layer in (Conv2d(32, 40, 3, 2, 1, bias=False), ResNxN(32, 32, 1, 1, init="kaiming")):
        layer.bfloat16().to(memory_format=LAST)
        for dynamic, height in product((False, True), (6, 9)):
            x, found = maps(3, 32, height, 7), []
            compiler = torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
            for around in (contextlib.nullcontext(), compiled_autograd._enable(compiler, dynamic=dynamic)):
                layer.zero_grad()
                inside = x.clone().requires_grad_()
                out = layer(inside).float().square().sum()
                with around:
                    out.backward()
                found.append((inside.grad, *(weight.grad for weight in layer.parameters())))
            torch.testing.assert_close(*found, atol=0, rtol=0)
