"""Frozen features: an encoder's taps, pooled to vectors, in eval mode and without gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_nce.train.machine import threads
from fused_nce.train.machine.host import progress_bar

Encode = Callable[[Tensor], dict[str, Tensor]]
Transform = Callable[[Tensor], Tensor]

GRID = 2  # maps are averaged to 2 × 2: a 7 × 7 map of 256 channels is 12,544 numbers an image, 2.5 GB for CIFAR-10
CALIBRATION_IMAGES = 4096
PIXELS_SIDE = 32  # of larger images the probe's D × D covariance would fill the memory: 90 GB at 224 px


def mean_and_sd(
    x: Tensor,  # (n, D)
) -> tuple[Tensor, Tensor]:  # (D,) each
    """Mean and deviation of each feature; infinite where it is constant but for rounding: divided by it, that is 0."""
    mean, sd = x.mean(0), x.std(0)
    return mean, torch.where(sd > 1e-6 * mean.abs(), sd, torch.inf)


def as_vectors(
    tap: Tensor,  # (B, D), (B, C, frames), (B, C, 1, 1) or (B, C, H, W)
) -> Tensor:  # (B, D)
    """(B, D) features of a tap: a vector as it is, a map averaged over a 2 × 2 grid, frames over time, in fp32."""
    if tap.ndim == 3:
        tap = tap.float().mean(2)
    if tap.ndim == 4 and tap.shape[-1] > 1:
        tap = functional.adaptive_avg_pool2d(tap.float(), GRID)
    return tap.flatten(1).float()


def width(
    model: nn.Module,
    sample: Tensor,  # (1, ...)
    tap: str,
) -> int:
    """Width of a tap for one input, measured without changing the model's statistics or the random state."""
    training = model.training
    check_taps(model.eval(), sample, [tap])
    with torch.inference_mode():
        numbers = as_vectors(model.encode(sample)[tap]).shape[1]  # type: ignore[operator]
    model.train(training)
    return numbers


def check_taps(
    model: nn.Module,
    sample: Tensor,  # (1, 3, H, W)
    taps: Sequence[str],
    option: str = "taps",
) -> None:
    """Refuses a tap that the encoder does not have, before the long pass over the data; `option` gave it."""
    with torch.inference_mode():
        known = model.encode(sample)  # type: ignore[operator]
    for tap in taps:
        if tap not in known:
            raise ValueError(f"{option}: must be one of {', '.join(sorted(known))}, got {tap!r}")


def extract(
    model: nn.Module,
    images: Tensor,  # (n, 3, H, W) uint8
    transform: Transform,
    taps: Sequence[str],
    *,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
    name: str = "features",
) -> dict[str, Tensor]:
    """Features of every image at each tap.

    The model is in eval mode: BatchNorm uses the statistics of pre-training, so an image's features do not depend
    on the images beside it and nothing is learned from test images.

    Args:
        model: has `encode(x) -> {tap: tensor}`.
        images: (n, 3, H, W) uint8.
        transform: uint8 batch to the float batch that the encoder wants.
        taps: names of the taps to keep.
        batch_size: images of one forward pass.
        dtype: autocast to this dtype, or None for the weights' own.
        name: shown beside the progress bar.

    Returns:
        {tap: (n, D) fp32 on the CPU}.

    Raises:
        ValueError: no image, an unknown tap, or a feature that is not finite.
    """
    if len(images) == 0:
        raise ValueError("images: 0 found; need at least 1")
    device = next(model.parameters()).device
    model.eval()  # fault: features-statistics-test
    encode: Encode = model.encode  # type: ignore[assignment]
    check_taps(model, transform(images[:1].to(device)), taps)
    found: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    cast = torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
    with torch.inference_mode(), cast, progress_bar(total=len(images), desc=name, unit="img", leave=False) as bar:
        for batch in images.split(batch_size):
            threads.look()
            maps = encode(transform(batch.to(device)).contiguous(memory_format=torch.channels_last))
            for tap in taps:
                found[tap].append(as_vectors(maps[tap]).cpu())
            bar.update(len(batch))
    features = {tap: torch.cat(parts) for tap, parts in found.items()}
    for tap, values in features.items():
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite().all(dim=1)).sum())
            raise ValueError(f"features {tap}: {bad} of {len(values)} images are not finite; need a usable checkpoint")
    return {tap: values.clone() for tap, values in features.items()}


def calibrate_batch_norm(
    model: nn.Module,
    images: Tensor,  # (n, 3, H, W) uint8, none of them a test image
    transform: Transform,
    batch_size: int = 256,
) -> None:
    """Gives an untrained encoder the BatchNorm statistics of up to 4,096 images, evenly spaced.

    Folders list their images class by class: every batch has its images from all over them, and as many as another
    but for one, for all count alike. Without it a random encoder's features keep a large common mean, its cosines are
    all near 1 and it would be a weaker baseline than it need be.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    count = min(len(images), CALIBRATION_IMAGES)
    chosen, batches = torch.arange(count) * len(images) // max(count, 1), -(-count // batch_size)
    with torch.no_grad():
        for first in range(batches):
            batch = images[chosen[first::batches]]
            if len(batch) > 1:  # one image alone has no variance
                model.encode(transform(batch.to(next(model.parameters()).device)))  # type: ignore[operator]
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def raw_pixels(
    *splits: Tensor,  # (n, 3, H, W) uint8 each
) -> list[Tensor]:  # (n, D) each
    """Pixels as features: each image's own, scaled to 0..1; one channel where all three are equal in every split.

    Of images of more than 32 px they are means: of 32 × 32 parts.
    """
    # A part at a time: the comparison of a whole split takes as much memory as its images.
    grey = all(bool((part == part[:, :1]).all()) for images in splits for part in images.split(256))
    h, w = (min(PIXELS_SIDE, pixels) for pixels in splits[0].shape[2:])

    def numbers(part: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d((part[:, :1] if grey else part).float() / 255.0, (h, w)).flatten(1)

    return [torch.cat([numbers(part) for part in images.split(256)]) for images in splits]
