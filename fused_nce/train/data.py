"""Images and labels for training and evaluation, from whichever source a name means."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fused_nce.train import progress
from fused_nce.train.sources import Damage, FolderSource, ShardSource, Source, digits, fit

# Short side that an image is resized to before the centre crop of the tests (amdim-public: 70 -> 64, 146 -> 128).
TEST_RESIZE = {32: 32, 64: 70, 128: 146, 224: 256}
DEFAULT_LIMIT_BYTES = 4096 << 20


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
    steps: Iterator[int] = progress.bar(range(len(source)), desc="decoding", unit="image", delay=2, leave=False)
    for i in steps:
        image, index = damage.read(source, i)
        ready = prepare(image)
        if ready is None:
            return None
        images[i] = ready
        labels[i] = source.labels[index]
    return ImageSet(images, labels, source.classes, damage.count)
