"""Views of a batch of images; evaluation takes `Normalise` alone.

Everything is drawn for each image and each view, vectorised over the batch. Two views of 128 images of 32 px take 9 ms
on one core, with crops 10, where a small encoder's step takes 300 ms on two.
"""

import torch
from torch import Tensor

from fused_nce.train import limits
from fused_nce.train.data import colour, geometry
from fused_nce.train.settings import AugmentConfig

TOGETHER_PX = 32  # up to here, a table of 4 MB is cheaper than a call for each crop


class Views:
    """uint8 images to normalised views: the flip shared by them or not, the rest independent.

    Args:
        config: how they differ.
        image_size: H, their side.
        count: V, views an image.
    """

    def __init__(self, config: AugmentConfig, image_size: int, count: int = 2) -> None:
        limits.check(config, "augment.")
        self.config, self.image_size, self.count = config, image_size, count
        self.normalise = Normalise(config)

    def __call__(
        self,
        images: Tensor,  # (B, 3, S, S) uint8, or (B, V, 3, H, H) if the crops were taken already
    ) -> tuple[Tensor, ...]:  # (B, 3, H, H) float32, V times
        c = self.config
        count = len(images)
        cut = self.crops(images) if images.dim() == 4 else images
        size = cut.shape[-3:]
        one_draw = count if c.flip_shared else count * self.count  # fault: views-flipped-together
        flipped = geometry.flip(cut.reshape(one_draw, -1, *size[1:]), c.flip_p)  # fault: flip-drawn-each
        views = flipped.reshape(count, self.count, *size).transpose(0, 1).reshape(-1, *size)
        if c.geometry == "translate":  # on bytes, a quarter of the traffic
            views = geometry.move(views, c)
        x = views.float().div_(255)
        if c.geometry == "affine":
            x = geometry.move(x, c)
        x = colour.grayscale(colour.jitter(x, c.jitter, c.jitter_p), c.gray_p)
        if c.blur_p > 0:
            x = colour.blur(x, c.blur_sigma, c.blur_p)
        return self.normalise.scale(x).split(count)

    def crops(
        self,
        images: Tensor,  # (B, 3, S, S) uint8
    ) -> Tensor:  # (B, V, 3, H, H) uint8
        if self.config.geometry != "crop":
            return images.unsqueeze(1).expand(-1, self.count, -1, -1, -1)
        c, size = self.config, self.image_size
        if images.dtype == torch.uint8 and images.shape[-2] == images.shape[-1] <= size <= TOGETHER_PX:
            return geometry.crops(images, size, self.count, c.crop_area, c.crop_ratio)
        return torch.stack([crops(image, c, size, self.count) for image in images])


def crops(
    image: Tensor,  # (3, H, W) uint8, any size
    config: AugmentConfig,
    image_size: int,
    count: int,
) -> Tensor:  # (count, 3, image_size, image_size) uint8
    """Independent crops of one image."""
    return torch.stack([geometry.crop(image, image_size, config.crop_area, config.crop_ratio) for _ in range(count)])


class Normalise:
    """uint8 images to floats of zero mean and unit deviation, a channel."""

    def __init__(self, config: AugmentConfig) -> None:
        self.mean = torch.tensor(config.mean)[:, None, None]
        self.std = torch.tensor(config.std)[:, None, None]

    def scale(
        self,
        x: Tensor,  # (B, 3, H, W) in [0, 1], changed in place
    ) -> Tensor:
        return x.sub_(self.mean).div_(self.std)

    def __call__(
        self,
        images: Tensor,  # (B, 3, H, W) uint8
    ) -> Tensor:  # (B, 3, H, W) float32
        if images.dtype != torch.uint8:
            raise TypeError(f"images: must be uint8, got {images.dtype}")
        return self.scale(images.float().div_(255))
