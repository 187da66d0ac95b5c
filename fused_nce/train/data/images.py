"""Images and labels for training and evaluation, from whichever source a name means."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fused_nce.train.data.sources import Damage, FolderSource, ShardSource, Source, digits, fit
from fused_nce.train.host import progress_bar

# Short side that an image is resized to before the centre crop of the tests (amdim-public: 70 -> 64, 146 -> 128).
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
    """

    images: Tensor
    labels: Tensor
    classes: list[str] = field(default_factory=list)
    damaged: int = 0


def load_split(
    data: str, split: str, image_size: int, *, canvas: int | None = None, limit_bytes: int = DEFAULT_LIMIT_BYTES
) -> ImageSet:
    """Decode one split into memory.

    The splits of `digits` are disjoint. Elsewhere the probe is fitted on the training images and their labels.

    Args:
        data: `"digits"`, a folder with one subfolder a class (below `train/` and `test/`), or WebDataset shards: a
            folder with `train-*.tar[.gz]` and `test-*.tar[.gz]`, or a glob.
        split: `"train"`, `"probe"` or `"test"`.
        image_size: side in px of the test images: short side resized, centre cropped.
        canvas: side of the square to decode to instead; by default `image_size` with the test protocol.
        limit_bytes: refuse a split that takes more.

    Raises:
        ValueError: for an unknown split, a missing folder, a split without images, more than 1 % damaged images, or a
            split above the limit.
    """
    if data == "digits":
        images, labels, classes = digits(split, image_size)
        return ImageSet(images, labels, classes)
    source = open_source(data, split)
    size = canvas or image_size
    if decoded_bytes(source, size) > limit_bytes:
        need_mb = decoded_bytes(source, size) >> 20
        raise ValueError(f"data: {data} takes {need_mb} MB as uint8 of {size} px; the limit is {limit_bytes >> 20} MB")
    return decode(source, size, TEST_RESIZE.get(size, size) if canvas is None else size)


def load_labelled(data: str, split: str, image_size: int, *, seed: int, limit_mb: int = 4096) -> ImageSet:
    """The labelled images of a split; of a large probe split, 50,000 drawn at random.

    Raises:
        ValueError: see `load_split`; and for a split without labels of 2 or more classes.
    """
    found = load_split(data, split, image_size, limit_bytes=limit_mb << 20)
    known = found.labels >= 0
    if not bool(known.any()) or len(found.classes) < 2:
        raise ValueError(f"data: the {split} split of {data} has no labels of 2 or more classes; need them to evaluate")
    rows = known.nonzero().flatten()
    if split == "probe" and len(rows) > MAX_PROBE_IMAGES:
        generator = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(len(rows), generator=generator)[:MAX_PROBE_IMAGES]].sort().values
    if len(rows) == len(found.labels):
        return found
    return dataclasses.replace(found, images=found.images[rows], labels=found.labels[rows])


def open_source(data: str, split: str) -> Source:
    """A folder or shards, by what is there.

    Raises:
        ValueError: see `load_split`.
    """
    if split not in ("train", "probe", "test"):
        raise ValueError(f"split: must be 'train', 'probe' or 'test', got {split!r}")
    wanted = "test" if split == "test" else "train"
    path = Path(data)
    if not path.exists() and not any(c in data for c in "*?["):
        raise ValueError(f"data: {data} does not exist; it must be 'digits', a folder of images, or .tar[.gz] shards")
    if path.is_dir() and not any(path.glob("*.tar*")):
        return FolderSource(path, wanted)
    return ShardSource(data, wanted)


def decoded_bytes(source: Source, size: int) -> int:
    return len(source) * 3 * size * size


def decode(source: Source, size: int, resize: int) -> ImageSet:
    """Read every image of a source: short side to `resize` px, centre crop to `size` px."""
    found = _decode(source, size, lambda image: fit(image, size, resize))
    assert found is not None
    return found


def decode_native(source: Source, size: int) -> ImageSet | None:
    """Read every image of a source as it is; None at the first that is not `size` px square."""
    return _decode(source, size, lambda image: image if image.shape[1:] == (size, size) else None)


def _decode(source: Source, size: int, prepare: Callable[[Tensor], Tensor | None]) -> ImageSet | None:
    images = torch.empty(len(source), 3, size, size, dtype=torch.uint8)
    labels = torch.tensor(source.labels, dtype=torch.int64)
    damage = Damage(len(source))
    steps: Iterator[int] = progress_bar(range(len(source)), desc="decoding", unit="image", delay=2, leave=False)
    for i in steps:
        image, index = damage.read(source, i)
        ready = prepare(image)
        if ready is None:
            return None
        images[i] = ready
        labels[i] = source.labels[index]
    return ImageSet(images, labels, source.classes, damage.count)
