"""Augmentation: torchvision's transforms are the definition, image by image; the draws are real for every image."""

import math
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from fused_nce.train.data import augment, colour, geometry
from fused_nce.train.settings import AugmentConfig

PLAIN = AugmentConfig(
    flip_p=0, geometry="none", jitter_p=0, gray_p=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)  # no change at all
STEPS = torch.arange(32, dtype=torch.uint8)


@pytest.fixture
def images():
    return torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (colour.brightness, TF.adjust_brightness, 0.6, 1.4),
        (colour.contrast, TF.adjust_contrast, 0.6, 1.4),
        (colour.saturation, TF.adjust_saturation, 0.6, 1.4),
        (colour.hue, TF.adjust_hue, -0.5, 0.5),
    ],
)
def test_colour_is_torchvisions_image_by_image(images, ours, theirs, low, high):
    images[0] = 0.5  # no chroma
    images[1, 0] = images[1, 1]  # ties between channels
    factors = torch.linspace(low, high, len(images))
    expected = torch.stack([theirs(x, f.item()) for x, f in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours(images, factors), expected, atol=2e-5, rtol=0)


def test_grayscale_is_torchvisions(images):
    torch.testing.assert_close(colour.grayscale(images.clone(), 1.0), TF.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


def test_affine_is_torchvisions_image_by_image(images):
    count = len(images)
    draw = torch.Generator().manual_seed(1)
    degrees = torch.rand(count, generator=draw) * 60 - 30
    shift = torch.randint(-5, 6, (count, 2), generator=draw).float()
    zoom = torch.rand(count, generator=draw) + 0.5
    shear = torch.rand(count, generator=draw) * 40 - 20
    expected = torch.stack(
        [
            TF.affine(
                images[i],
                degrees[i].item(),
                shift[i].int().tolist(),
                zoom[i].item(),
                [shear[i].item(), 0.0],
                interpolation=TF.InterpolationMode.BILINEAR,
            )
            for i in range(count)
        ]
    )
    torch.testing.assert_close(geometry.affine(images, degrees, shift, zoom, shear), expected, atol=2e-4, rtol=0)


def test_translate_is_a_crop_of_the_reflected_image(images):
    shifts = torch.tensor([[dy, dx] for dy in (-4, 0, 4) for dx in (-4, -1, 0, 3)])
    padded = TF.pad(images, [4, 4, 4, 4], padding_mode="reflect")
    expected = torch.stack(
        [TF.crop(p, 4 - dy, 4 - dx, 32, 32) for p, (dy, dx) in zip(padded, shifts.tolist(), strict=True)]
    )
    assert torch.equal(geometry.translate(images, shifts), expected)


def test_translation_is_uniform_over_whole_pixels():
    """U{-4..4} an axis with chance 0.8, over 20,000 images whose first row and column tell the shift."""
    torch.manual_seed(0)
    ramp = STEPS.expand(20_000, 1, 32, 32)
    moved = geometry.move(ramp, replace(PLAIN, geometry="translate", geometry_p=0.8))
    shift = 16 - moved[:, 0, 16, 16].long()
    share = torch.bincount(shift + 4, minlength=9) / len(shift)
    expected = torch.full((9,), 0.8 / 9)
    expected[4] += 0.2
    assert torch.allclose(share, expected, atol=5 * math.sqrt(0.29 * 0.71 / 20_000))


def test_jitter_draws_for_every_image():
    """Chance 0.8, brightness uniform in [0.6, 1.4]: moments over 20,000 images, five deviations of room."""
    torch.manual_seed(0)
    x = colour.jitter(torch.full((20_000, 3, 1, 1), 0.5), (0.4, 0.0, 0.0, 0.0), 0.8)[:, 0, 0, 0] / 0.5
    changed = x != 1
    assert abs(float(changed.float().mean()) - 0.8) < 5 * math.sqrt(0.16 / 20_000)
    inside = x[changed]
    assert 0.6 <= float(inside.min()) < 0.605
    assert 1.395 < float(inside.max()) <= 1.4 + 1e-6
    assert abs(float(inside.mean()) - 1) < 5 * 0.4 / math.sqrt(3 * len(inside))
    assert len(inside.unique()) > 0.9 * len(inside)


def test_jitter_takes_every_order():
    """Contrast and brightness do not commute: with both factors fixed, both results must occur, half and half."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, 4, 4)
    orders = [
        colour.contrast(colour.brightness(image, torch.tensor([1.4])), torch.tensor([1.4])),
        colour.brightness(colour.contrast(image, torch.tensor([1.4])), torch.tensor([1.4])),
    ]
    fixed = pytest.MonkeyPatch()
    with fixed.context() as patch:
        patch.setattr(colour, "_draw", lambda count, strength, centre: torch.full((count,), 1.4 if centre else 0.0))
        out = colour.jitter(image.expand(4000, -1, -1, -1).clone(), (0.4, 0.4, 0.0, 0.0), 1.0)
    first = torch.stack([torch.isclose(out, expected).all((1, 2, 3)) for expected in orders]).float().mean(1)
    assert float(first.sum()) == 1
    assert abs(float(first[0]) - 0.5) < 5 * math.sqrt(0.25 / 4000)


def test_grayscale_and_flip_chances():
    torch.manual_seed(0)
    x = torch.rand(20_000, 3, 1, 2)
    gray = colour.grayscale(x.clone(), 0.25)
    share = float((gray[:, 0] == gray[:, 1]).all((1, 2)).float().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.1875 / 20_000)
    flipped = float((geometry.flip(x, 0.5)[:, 0, 0, 0] == x[:, 0, 0, 1]).float().mean())
    assert abs(flipped - 0.5) < 5 * math.sqrt(0.25 / 20_000)


def test_the_flip_is_shared_and_the_rest_is_not():
    torch.manual_seed(0)
    ramp = STEPS.expand(400, 3, 32, 32)
    one, two = augment.Views(replace(PLAIN, flip_p=0.5), 32)(ramp)
    assert torch.equal(one, two)
    assert 100 < int((one[:, 0, 0, 0] == 0).sum()) < 300
    one, two = augment.Views(replace(PLAIN, geometry="translate", geometry_p=1.0), 32)(ramp)
    shifts = torch.stack((one[:, 0, 16, 16], two[:, 0, 16, 16]))
    assert abs(float(torch.corrcoef(shifts)[0, 1])) < 0.25
    one, two = augment.Views(replace(PLAIN, jitter=(0.4, 0.0, 0.0, 0.0), jitter_p=1.0), 32)(ramp)
    assert not torch.isclose(one, two).all((1, 2, 3)).any()


def test_no_change_is_the_test_transform(images):
    batch = (images * 255).to(torch.uint8)
    config = AugmentConfig(flip_p=0, geometry="none", jitter_p=0, gray_p=0)
    one, two = augment.Views(config, 32)(batch)
    expected = TF.normalize(batch.float() / 255, list(config.mean), list(config.std))
    torch.testing.assert_close(one, expected)
    assert torch.equal(one, two)
    torch.testing.assert_close(augment.Normalise(config)(batch), expected)


def test_the_transforms_leave_their_input_alone(images):
    batch = (images * 255).to(torch.uint8)
    before = batch.clone()
    for kind in ("translate", "affine", "crop", "none"):
        config = AugmentConfig(geometry=kind)
        augment.Views(config, 32)(batch)
        augment.Normalise(config)(batch)
    assert torch.equal(batch, before)


def test_crops_are_of_the_models_size_and_differ(images):
    batch = (images * 255).to(torch.uint8)
    one, two = augment.Views(replace(PLAIN, geometry="crop"), 16)(batch)
    assert one.shape == two.shape == (12, 3, 16, 16)
    assert not torch.isclose(one, two).all((1, 2, 3)).any()


def test_the_seed_decides_everything(images):
    batch, results = (images * 255).to(torch.uint8), []
    for _ in range(2):
        torch.manual_seed(7)
        results.append(torch.stack(augment.Views(AugmentConfig(), 32)(batch)))
    assert torch.equal(*results)


def test_refusals(images):
    with pytest.raises(TypeError, match=r"images: must be uint8, got torch\.float32"):
        augment.Normalise(AugmentConfig())(images)


def test_blur_is_torchvisions_image_by_image(images):
    sigma = torch.linspace(0.1, 2.0, len(images))
    expected = torch.stack([TF.gaussian_blur(x, [5, 5], [s.item()] * 2) for x, s in zip(images, sigma, strict=True)])
    torch.testing.assert_close(colour.gaussian(images, sigma, 5), expected, atol=2e-6, rtol=0)


def test_blur_is_drawn_for_every_image(images):
    torch.manual_seed(0)
    many = images.repeat(20, 1, 1, 1)
    changed = (colour.blur(many.clone(), (1.0, 2.0), 0.5) != many).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.6
    small = augment.Views(replace(PLAIN, blur_p=1.0), 32)(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8))
    assert not torch.equal(*small)  # each view its own width


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_views_as_asked_for_each_flipped_by_itself(count):
    torch.manual_seed(0)
    ramp = STEPS.expand(200, 3, 32, 32).clone()
    for shared in (True, False):
        views = augment.Views(replace(PLAIN, flip_p=0.5, flip_shared=shared), 32, count)(ramp)
        assert [tuple(view.shape) for view in views] == [(200, 3, 32, 32)] * count
        turned = torch.stack([view[:, 0, 0, 0] > 0.05 for view in views])
        agreement = (turned == turned[0]).all(0).float().mean()
        assert agreement == 1 if shared or count == 1 else agreement < 0.7


def test_crops_of_a_batch_are_torchvisions_one_by_one():
    """The same numbers drawn, the same bytes; the second ratio leaves no crop but the middle's."""
    batch = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for side, size, area, ratio in ((32, 32, (0.02, 1.0), (0.75, 1.33)), (9, 14, (0.9, 1.0), (3.0, 4.0))):
        images, results = batch[:, :, :side, :side], []
        for together in (True, False):
            torch.manual_seed(5)
            if together:
                found = geometry.crops(images, size, 2, area, ratio)
            else:
                found = torch.stack([torch.stack([geometry.crop(x, size, area, ratio) for _ in "12"]) for x in images])
            results += [found, torch.get_rng_state()]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])
