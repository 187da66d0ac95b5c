"""The encoders: published sizes, geometry, initialisation, refusals."""

import pytest
import torch
import torch.nn.functional as F

from fused_nce.models.encoders.amdim import AMDIMEncoder
from fused_nce.models.encoders.blocks import PatchConv2d, ResNxN, RKHSHead, means
from tests.refusals import unlike

# Parameters without heads, in millions; 194 and 626 are the published sizes of AMDIM small and large. The published
# counts include the BatchNorms inside the blocks, which amdim-public allocates even where it does not use them.
PUBLISHED = [
    (128, 192, 1536, 8, 194.4),
    (128, 256, 2048, 10, 401.1),
    (128, 320, 2560, 10, 626.6),
    (64, 192, 1536, 8, 194.0),
    (64, 128, 1024, 3, 51.5),
    (32, 320, 1280, 10, 153.9),
    (32, 128, 1024, 3, 15.8),
]


@pytest.mark.parametrize(("image_size", "ndf", "n_rkhs", "n_depth", "millions"), PUBLISHED)
def test_parameter_counts(image_size, ndf, n_rkhs, n_depth, millions):
    with torch.device("meta"):
        encoder = AMDIMEncoder(image_size=image_size, ndf=ndf, n_rkhs=n_rkhs, n_depth=n_depth, use_bn=True)
    trunk = sum(p.numel() for part in (encoder.to7, encoder.to5, encoder.to1) for p in part.parameters())
    assert trunk / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("image_size", [32, 64, 128])
def test_tap_shapes(image_size):
    encoder = AMDIMEncoder(image_size=image_size, ndf=4, n_rkhs=40, n_depth=2)
    taps = encoder(torch.randn(2, 3, image_size, image_size))
    width = 16 if image_size == 32 else 32
    shapes = {name: tuple(tap.shape[1:]) for name, tap in taps.items()}
    assert shapes == {"f1": (40, 1, 1), "f5": (40, 5, 5), "f7": (40, 7, 7), "h5": (width, 5, 5), "h7": (width, 7, 7)}


@pytest.mark.parametrize(
    ("image_size", "tap", "field"),
    [(32, "h7", 8), (32, "h5", 16), (32, "f1", 32), (64, "h7", 16), (64, "h5", 32), (64, "f1", 64), (128, "h7", 35)],
)
def test_receptive_field(image_size, tap, field):
    """The input pixels that one location depends on, by its gradient."""
    encoder = AMDIMEncoder(image_size=image_size, ndf=4, n_rkhs=32, n_depth=1, init="kaiming").eval()
    x = torch.randn(1, 3, image_size, image_size, requires_grad=True)
    out = encoder(x)[tap]
    centre = out.shape[-1] // 2
    out[0, :, centre, centre].square().sum().backward()
    assert x.grad is not None
    touched = (x.grad[0].abs().sum(0) > 0).any(0).nonzero()
    assert int(touched.max() - touched.min()) + 1 == field


def test_a_block_is_pooling_at_first_and_not_with_kaiming():
    x = torch.randn(2, 4, 14, 14)
    pooled = F.avg_pool2d(x, 2, 2)
    out = ResNxN(4, 6, 2, 2)(x)
    assert torch.equal(out[:, :4], pooled)
    assert torch.equal(out[:, 4:], torch.zeros_like(out[:, 4:]))
    assert not torch.equal(ResNxN(4, 6, 2, 2, init="kaiming")(x)[:, :4], pooled)


def test_head_starts_near_the_identity_then_normalises():
    head = RKHSHead(6, 8)
    weight = head.shortcut.weight[:, :, 0, 0]
    assert torch.equal(weight.diagonal(), torch.ones(6))
    off = weight[~torch.eye(8, 6, dtype=torch.bool)]
    assert 0.005 < float(off.detach().abs().max()) <= 0.01
    out = head(3 + 2 * torch.randn(64, 6, 5, 5))
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(8), atol=1e-5)


def test_patches_are_a_convolution_in_both_layouts():
    """Value and gradients: single pixels, patches that meet, with a rest at the edge, the whole map, and overlaps."""
    for width, stride, height, across in (
        (1, 1, 4, 4),
        (2, 2, 6, 4),
        (2, 2, 5, 7),
        (3, 1, 3, 3),
        (3, 2, 7, 5),
        (3, 1, 3, 4),
    ):
        for bias in (False, True):
            layer = PatchConv2d(5, 7, width, stride, bias=bias).to(memory_format=torch.channels_last)
            x = torch.randn(3, 5, height, across, requires_grad=True)
            expected = F.conv2d(x, layer.weight, layer.bias, stride)
            leaves, towards = (x, *layer.parameters()), torch.randn_like(expected)
            gradients = torch.autograd.grad(expected, leaves, towards)
            for layout in (torch.contiguous_format, torch.channels_last):
                out = layer(x.to(memory_format=layout))
                torch.testing.assert_close(out, expected)
                for ours, theirs in zip(torch.autograd.grad(out, leaves, towards), gradients, strict=True):
                    torch.testing.assert_close(ours, theirs)
            assert out.is_contiguous(memory_format=torch.channels_last)


def test_use_bn_adds_batch_norm_inside_the_blocks():
    def norms(use_bn):
        encoder = AMDIMEncoder(image_size=32, ndf=4, n_rkhs=16, n_depth=2, use_bn=use_bn)
        return sum(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.modules())

    # Always: three outputs. Inside: 1 + 4 blocks of 2 + 1 layers, two heads, and the trunk's 7x7 map.
    assert norms(False) == 3
    assert norms(True) == 3 + 10 + 2 + 1


ERRORS = [
    (lambda: AMDIMEncoder(image_size=48), ValueError, r"^image_size: must be one of \(32, 64, 128\), got 48$"),
    (lambda: AMDIMEncoder(ndf=16, n_rkhs=63), ValueError, r"^n_rkhs: must be .* trunk's width 64 \(ndf 16\), got 63$"),
    (lambda: AMDIMEncoder(ndf=0), ValueError, "^ndf: got 0, need >= 1$"),
    (lambda: AMDIMEncoder(n_depth=0), ValueError, "^n_depth: got 0, need >= 1$"),
    (lambda: AMDIMEncoder(init="zeros"), ValueError, "^init: must be 'amdim' or 'kaiming', got 'zeros'$"),  # type: ignore[arg-type]
]


def test_refusals():
    assert unlike(ERRORS) == []


def test_means_are_torchs_pooling():
    for width, stride, height, across in ((4, 2, 10, 8), (4, 2, 9, 11), (2, 1, 5, 4), (2, 2, 5, 6), (3, 1, 5, 4)):
        x = torch.randn(2, 3, height, across, requires_grad=True)
        out, expected = means(x, width, stride), F.avg_pool2d(x, width, stride)
        torch.testing.assert_close(out, expected)
        towards = torch.randn_like(expected)
        torch.testing.assert_close(*(torch.autograd.grad(y, x, towards)[0] for y in (out, expected)))
