"""The residual block of 1×1 convolutions that is one node: the plain block's values, and the plain block elsewhere."""

import pytest
import torch
from torch.autograd import forward_ad

from fused_nce.core.replay import checkpointed
from fused_nce.models.encoders import convolution
from fused_nce.models.encoders.blocks import ResNxN
from fused_nce.models.encoders.pointwise import Pointwise

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(
    not convolution.has_kernel(), reason="needs the C++ kernels, on a CPU that multiplies bfloat16"
)


def block(channels, **settings):
    return ResNxN(channels, channels, 1, 1, init="kaiming", **settings).to(memory_format=LAST)


def maps(count, channels, height, width):
    return torch.randn(count, channels, height, width).bfloat16().to(memory_format=LAST)


def autocast(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def ours(out):
    return "Pointwise" in type(out.grad_fn).__name__


def error(found, true):
    return float((found.detach().double() - true.detach()).norm() / true.detach().norm())


def test_values_gradients_and_gradients_of_them_are_the_plain_blocks():
    """Fewer pixels than a piece has, odd numbers of them, and more than one piece; and odd widths of registers."""
    for count, channels, height, width in ((1, 64, 1, 3), (2, 40, 5, 5), (7, 128, 6, 9), (3, 6, 13, 11)):
        layer, x = block(channels), maps(count, channels, height, width)
        towards, results = maps(count, channels, height, width), []
        for exact, layout in ((True, LAST), (False, LAST), (False, torch.contiguous_format)):
            model = block(channels).double() if exact else layer
            model.load_state_dict(layer.state_dict())
            inside = (x.double() if exact else x.clone()).requires_grad_()
            given = inside.contiguous(memory_format=layout)
            out = model(given) if exact else autocast(model, given)
            assert ours(out) == (not exact and layout is LAST)
            leaves = (inside, *model.parameters())
            once = torch.autograd.grad(out, leaves, towards.to(out.dtype), retain_graph=True)
            slopes = torch.autograd.grad(out, leaves, towards.to(out.dtype), create_graph=True)
            twice = torch.autograd.grad(torch.stack([s.double().square().sum() for s in slopes]).sum(), leaves)
            results.append((out, *once, *slopes, *twice))
        for true, found, plain in zip(*results, strict=True):
            assert error(found, true) <= 1.2 * error(plain, true) + 1e-3


def test_numbers_that_are_none_stay():
    layer, x = block(8), maps(2, 8, 3, 3)
    for bad in (torch.nan, -torch.nan, torch.inf):
        x[1, 2, 0, 1] = bad
        out = autocast(layer, x.requires_grad_())
        out.backward(torch.ones_like(out))
        assert not out[1, :, 0, 1].isfinite().any()
        assert not layer.conv1.weight.grad.isfinite().all()
        x, layer.conv1.weight.grad = x.detach(), None


def test_frozen_weights_and_checkpoints():
    layer, x = block(32), maps(3, 32, 4, 4).requires_grad_()

    def gradients():
        return torch.autograd.grad(autocast(layer, x).float().square().sum(), (x, layer.conv1.weight))

    whole = gradients()
    layer.conv2.requires_grad_(False)
    torch.testing.assert_close(gradients(), whole, atol=0, rtol=0)
    checkpointed(layer)
    torch.testing.assert_close(gradients(), whole, atol=0, rtol=0)


def test_elsewhere_the_block_is_plain(monkeypatch):
    """Under transforms, tangents and compilers; with hooks or norms; in other precisions; and without a gradient."""
    layer, hooked, normed, wide = block(8).bfloat16(), block(8).bfloat16(), block(8, use_bn=True), block(144)
    hooked.conv2.register_forward_hook(lambda module, inputs, out: 2 * out)
    x = maps(3, 8, 4, 4)
    assert ours(layer(x))
    monkeypatch.setattr(Pointwise, "apply", lambda *args: pytest.fail("one node"))

    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent

    slope = torch.func.grad(lambda x: layer(x).float().square().sum())
    for way in (slope, tangent, torch.compile(layer, backend="eager"), hooked, torch.no_grad()(layer)):
        torch.testing.assert_close(way(x), way(x.contiguous()), atol=0.1, rtol=0.1)
    assert not torch.equal(hooked(x), torch.no_grad()(layer)(x))
    seen, watched, other = [], block(8).bfloat16(), block(8).bfloat16()
    watched.conv1.register_full_backward_hook(lambda *given: seen.append(given))
    watched(x.requires_grad_()).sum().backward()
    assert len(seen) == 1
    other.conv2 = torch.nn.Sequential(other.conv2)
    assert not ours(other(x))
    x = x.detach()
    for other, given in ((layer.float(), x.float()), (normed, x), (wide, maps(2, 144, 3, 3))):
        assert not ours(autocast(other, given))


def test_without_onednn_the_gradients_are_torchs():
    layer, x = block(8).bfloat16(), maps(3, 8, 4, 4).requires_grad_()
    out = layer(x)
    assert ours(out)
    whole = torch.autograd.grad(out.float().sum(), (x, *layer.parameters()), retain_graph=True)
    with torch.backends.mkldnn.flags(enabled=False):
        found = torch.autograd.grad(out.float().sum(), (x, *layer.parameters()))
    torch.testing.assert_close(found, whole, atol=0.1, rtol=0.1)


def test_the_kernel_names_what_it_cannot_read():
    x, w = torch.zeros(4, 6).bfloat16(), torch.zeros(6, 6).bfloat16()
    calls = torch.ops.fused_nce
    for arguments, message in (
        ((x.float(), w, w), r"^x is Float \[4, 6\], needed: contiguous bfloat16 \[4, 6\], of an even width$"),
        ((x[:, :5].contiguous(), w[:5, :5], w), r"^x is BFloat16 \[4, 5\], needed"),
        ((x, w[:4], w), r"^w1 is BFloat16 \[4, 6\], needed: contiguous bfloat16 \[6, 6\]"),
        ((x, w, w.T[:, :4]), r"^w2 is BFloat16 \[6, 4\], needed"),
        ((x[None], w, w), r"^x is \[1, 4, 6\], needed: two dimensions$"),
    ):
        with pytest.raises(ValueError, match=message):
            calls.cpu_pointwise(*arguments)
    with pytest.raises(ValueError, match=r"^dy is BFloat16 \[2, 6\], needed: contiguous bfloat16 \[4, 6\]"):
        calls.cpu_pointwise_grads(x[:2], x, w, w)
    assert calls.cpu_pointwise(x[:0], w, w).shape == (0, 6)
    assert not calls.cpu_pointwise_grads(x[:0], x[:0], w, w)[1].any()
