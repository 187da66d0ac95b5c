"""Frozen features: eval-mode BatchNorm, pooling, order, and refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fused_nce.models import AMDIM
from fused_nce.train.evaluation import features


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def encode(self, x):
        y = self.norm(self.conv(x))
        return {"map": y, "top": self.drop(y.mean((2, 3)))}


def scale(images):
    return images.float() / 255


@pytest.fixture
def images():
    return torch.randint(256, (11, 3, 9, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tiny()


def test_batches_do_not_matter(model, images):
    model.train()
    before = model.norm.running_mean.clone()
    whole = features.extract(model, images, scale, ["top"], batch_size=11)["top"]
    single = features.extract(model, images, scale, ["top"], batch_size=1)["top"]
    torch.testing.assert_close(whole, single)
    assert torch.equal(model.norm.running_mean, before)  # nothing learned from the images
    assert whole.shape == (11, 4)
    assert not whole.requires_grad


def test_maps_are_averaged_over_a_grid(model, images):
    found = features.extract(model, images, scale, ["map"])["map"]
    with torch.no_grad():
        full = model.eval().encode(scale(images))["map"]  # (11, 4, 7, 7)
    corner = full[:, :, :4, :4].mean((2, 3))  # rows 0..3 of 7 are the first of two adaptive windows
    assert found.shape == (11, 16)
    torch.testing.assert_close(found.view(11, 4, 2, 2)[:, :, 0, 0], corner)


def test_vectors_stay_as_they_are():
    x = torch.randn(2, 5)
    assert torch.equal(features.as_vectors(x), x)
    assert torch.equal(features.as_vectors(x[:, :, None, None]), x)
    assert features.as_vectors(x.bfloat16()).dtype == torch.float32


def test_the_encoder_has_the_default_taps():
    model = AMDIM(ndf=8, n_rkhs=32, n_depth=1)
    found = features.extract(model, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), scale, ["f1", "f7"])
    assert {tap: tuple(values.shape) for tap, values in found.items()} == {"f1": (2, 32), "f7": (2, 128)}


def test_unknown_tap_is_named(model, images):
    with pytest.raises(ValueError, match="taps: must be one of map, top, got 'f9'"):
        features.extract(model, images, scale, ["f9"])


def test_no_image_is_refused(model, images):
    with pytest.raises(ValueError, match="images: 0 found"):
        features.extract(model, images[:0], scale, ["top"])


def test_a_feature_that_is_not_finite_is_refused(model, images):
    with torch.no_grad():
        model.conv.weight[0] = torch.nan
    with pytest.raises(ValueError, match="features top: 11 of 11 images are not finite"):
        features.extract(model, images, scale, ["top"])


def test_calibration_centres_the_features(model, images):
    with torch.no_grad():
        model.conv.bias += 50.0  # the common mean that spoils cosines
    features.calibrate_batch_norm(model, images, scale, batch_size=11)
    with torch.no_grad():
        out = model.encode(scale(images))["map"]
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.var((0, 2, 3)), torch.ones(4), atol=2e-2, rtol=0)
    assert model.norm.momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_calibration_sees_every_class_of_a_folder(model, monkeypatch):
    """Of images that stand class by class, the statistics are those of all classes, in every batch."""
    monkeypatch.setattr(features, "CALIBRATION_IMAGES", 18)
    images = torch.cat([torch.full((20, 3, 9, 9), level, dtype=torch.uint8) for level in (0, 100, 200)])
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(model, "encode", lambda x: seen.append(x[:, 0, 0, 0] * 255))
    features.calibrate_batch_norm(model, images, lambda x: x.float() / 255, batch_size=8)
    assert [len(batch) for batch in seen] == [6, 6, 6]  # not 8, 8, 2, which would count alike
    assert all(batch.tolist() == [0, 0, 100, 100, 200, 200] for batch in seen)


def test_raw_pixels_drop_equal_channels(images):
    gray = images[:, :1].expand(-1, 3, -1, -1)
    (found,) = features.raw_pixels(gray)
    assert found.shape == (11, 81)
    torch.testing.assert_close(found[0], images[0, 0].flatten() / 255)
    # One width for both splits, whichever has the colour.
    for splits in ((images, gray), (gray, images)):
        assert [found.shape for found in features.raw_pixels(*splits)] == [(11, 243)] * 2


def test_raw_pixels_are_compared_a_part_at_a_time():
    class Compared(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.eq.Tensor:
                self.most = max(self.most, found.numel())
            return found

    with Compared() as seen:
        features.raw_pixels(torch.zeros(600, 3, 8, 8, dtype=torch.uint8))
    assert 0 < seen.most <= 256 * 3 * 64


def test_raw_pixels_of_large_images_are_means():
    small = torch.randint(0, 256, (300, 3, 32, 16), dtype=torch.uint8)
    (found,) = features.raw_pixels(small)
    assert torch.equal(found, small.flatten(1) / 255)  # up to 32 px each is itself
    (means,) = features.raw_pixels(small.repeat_interleave(7, 2).repeat_interleave(2, 3))  # 224 × 32
    torch.testing.assert_close(means, functional.interpolate(small / 255, (32, 32)).flatten(1))
