"""Images and labels for training and evaluation, from whichever source a name means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_nce.train.data.account import Account
from fused_nce.train.data.image_source import Damage, ImageSource, digits, fit
from fused_nce.train.data.labels import Classes
from fused_nce.train.data.members import Attributes
from fused_nce.train.machine.host import progress_bar
from fused_nce.train.settings import AugmentConfig

# Of crops of random area, by side (amdim-public: 70 -> 64, 146 -> 128).
TEST_RESIZE = {32: 32, 64: 70, 128: 146, 224: 256}
DEFAULT_LIMIT_BYTES = 4096 << 20
MAX_PROBE_IMAGES = 50_000  # more labelled images than CIFAR's 50,000 change a probe little and cost minutes


@dataclass
class ImageSet:
    """A split, decoded.

    Args:
        images: `(n, 3, H, W)` uint8.
        labels: `(n,)` int64, −1 where there is none.
        classes: names, by label.
        damaged: images that could not be read, each replaced by the next good one.
        account: one line: images, classes, and what was left out and why.
        digest: of the images' names and labels.
        known: the classes of the training split; None for digits.
        attributes: that each image has or lacks.
        runs: how many lie one behind the other in each shard; none without shards.
    """

    images: Tensor
    labels: Tensor
    classes: list[str] = field(default_factory=list)
    damaged: int = 0
    account: str = ""
    digest: str = ""
    known: Classes | None = None
    runs: Sequence[int] = ()
    attributes: Attributes | None = None


def load_split(
    data: str,
    split: str,
    image_size: int,
    *,
    resize: int | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    upright: bool = False,
    known: Classes | None = None,
    leave_out_unseen: bool = False,
) -> ImageSet:
    """Decode one split into memory.

    The splits of `digits` are disjoint. Elsewhere the probe is fitted on the training images and their labels.

    Args:
        data: `"digits"`, a folder with one subfolder a class (below `train/` and `test/`), or WebDataset shards: a
            folder with `train-*.tar[.gz]` and `test-*.tar[.gz]`, or a glob.
        split: `"train"`, `"probe"` or `"test"`.
        image_size: side in px.
        resize: short side in px before the centre crop; `image_size` if left out.
        limit_bytes: refuse a split that takes more.
        upright: see `ImageSource`.
        known: see `ImageSource`.
        leave_out_unseen: see `ImageSource`.

    Raises:
        ValueError: for an unknown split, a missing folder, a split without images, a test class that training lacks,
            more than 1 % damaged images, or a split above the limit.
    """
    source = _open(data, split, image_size, known=known, upright=upright, leave_out_unseen=leave_out_unseen)
    return _load(source, image_size, resize or image_size, limit_bytes)


def _open(data: str, split: str, image_size: int, **options: Any) -> ImageSet | ImageSource:
    """A split before anything of it is decoded, but for digits."""
    if data != "digits":
        return ImageSource(data, split, **options)
    images, labels, classes = digits(split, image_size)
    line = Account().line(data, split, f"{len(labels):,} images", f"{len(classes)} classes")
    return ImageSet(images, labels, classes, account=line, digest=data)


def _load(source: ImageSet | ImageSource, image_size: int, resize: int, limit_bytes: int) -> ImageSet:
    if isinstance(source, ImageSet):
        return source
    if (need := decoded_bytes(source, image_size)) > limit_bytes:
        raise ValueError(
            f"data: {source.data}, {source.split}: {len(source):,} images take {-(-need >> 20)} MB as uint8 of "
            f"{image_size} px; memory_limit_mb must be as large, got {limit_bytes >> 20}"
        )
    return decode(source, image_size, resize)


def load_labelled(
    data: str,
    image_size: int,
    augment: AugmentConfig,
    *,
    seed: int,
    limit_mb: int = 4096,
    leave_out_unseen: bool = False,
) -> tuple[ImageSet, ImageSet]:
    """The labelled images to probe and to test on, with the same classes; of many to probe on, 50,000 drawn at random.

    Args:
        data: see `load_split`.
        image_size: side in px.
        augment: of the training, whose scale the images are given.
        seed: of the draw, which has two of each class at the least.
        limit_mb: refuse a split of which more is to be decoded.
        leave_out_unseen: see `ImageSource`.

    Raises:
        ValueError: see `load_split`; and for a split without labels, or without 2 or more classes.
    """
    known, found = None, []
    for split in ("probe", "test"):
        source = _open(data, split, image_size, upright=augment.upright, known=known, leave_out_unseen=leave_out_unseen)
        known = source.known
        labels = torch.as_tensor(source.labels)
        rows = (labels >= 0).nonzero().flatten()
        if len(labels[rows].unique()) < (2 if split == "probe" else 1):  # a number up to the largest may be no class
            json = isinstance(source, ImageSource) and ".json members" in source.samples.account.kinds
            hint = "; of images no .json member is read, so write .cls members" if json else ""
            raise ValueError(
                f"data: the {split} split of {data} has no labels of 2 or more classes; need them to evaluate{hint}"
            )
        found.append(_some(source, rows, split, image_size, augment, seed=seed, limit_mb=limit_mb))
    return found[0], found[1]


def load_attributes(
    data: str, image_size: int, augment: AugmentConfig, *, seed: int, limit_mb: int
) -> tuple[ImageSet, ImageSet]:
    """As `load_labelled`, of images that have attributes instead of a class."""
    found = []
    for split in ("probe", "test"):
        source = _open(data, split, image_size, upright=augment.upright)
        rows = torch.arange(len(source.labels))
        found.append(_some(source, rows, split, image_size, augment, seed=seed, limit_mb=limit_mb))
    return found[0], found[1]


def _some(
    source: ImageSet | ImageSource,
    rows: Tensor,
    split: str,
    image_size: int,
    augment: AugmentConfig,
    *,
    seed: int,
    limit_mb: int,
) -> ImageSet:
    """Those rows, decoded; of many to probe on, some at random. All others are forgotten first, but by the digest."""
    if split == "probe" and len(rows) > MAX_PROBE_IMAGES:
        rows = rows[drawn(torch.as_tensor(source.labels)[rows], MAX_PROBE_IMAGES, seed)]
    if isinstance(source, ImageSet):
        return source
    digest = source.samples.digest()
    source.keep(rows.tolist())
    whole = _load(source, image_size, resize_for(augment, image_size), limit_mb << 20)
    return dataclasses.replace(whole, digest=digest)


def drawn(
    labels: Tensor,  # (n,)
    count: int,
    seed: int,
) -> Tensor:  # (count,), or twice the classes where that is more
    """Rising row numbers, drawn at random, but that two of each class are among them (one of a single one).

    Protocols that choose on held-out images need two of each.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ranked, by_class = labels[order].sort(stable=True)
    needed = torch.zeros(len(labels), dtype=torch.bool)
    needed[by_class] = torch.arange(len(labels)) - torch.searchsorted(ranked, ranked) < 2
    return torch.cat((order[needed], order[~needed]))[: max(count, int(needed.sum()))].sort().values


def resize_for(augment: AugmentConfig, size: int) -> int:
    """Short side in px before the centre crop of the tests: things of square images are as large as in training.

    That is known but for random crops of random area: there it is what amdim-public takes.
    """
    low, high = augment.crop_area
    if augment.geometry != "crop":
        return size
    return round(size / math.sqrt(low)) if low == high else TEST_RESIZE.get(size, size)


def decoded_bytes(source: ImageSource, size: int) -> int:
    return len(source) * 3 * size * size


def decode(source: ImageSource, size: int, resize: int) -> ImageSet:
    """Read every image of a source: short side to `resize` px, centre crop to `size` px."""
    found = _decode(source, size, lambda image: fit(image, size, resize))
    assert found is not None
    return found


def decode_native(source: ImageSource, size: int) -> ImageSet | None:
    """Read every image of a source as it is; None at the first that is not `size` px square."""
    # fault: crops-small-images
    return _decode(source, size, lambda image: image if image.shape[1:] == (size, size) else None)


def _decode(source: ImageSource, size: int, prepare: Callable[[Tensor], Tensor | None]) -> ImageSet | None:
    images = torch.empty(len(source), 3, size, size, dtype=torch.uint8)
    labels = torch.tensor(source.labels, dtype=torch.int64)
    damage, used = Damage(len(source)), list(range(len(source)))
    steps: Iterator[int] = progress_bar(range(len(source)), desc="decoding", unit="image", delay=2, leave=False)
    for i in steps:
        image, index = damage.read(source, i)
        ready = prepare(image)
        if ready is None:
            return None
        images[i] = ready
        used[i] = index
        labels[i] = source.labels[index]  # fault: damaged-image-label
    kept = source.samples.attributes
    return ImageSet(
        images,
        labels,
        source.classes,
        damage.count,
        source.account(damage.count),
        source.samples.digest(),
        source.known,
        source.samples.runs(),
        kept and Attributes(kept.names, kept.values[used]),
    )
