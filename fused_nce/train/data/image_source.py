"""Images by index, from a folder or WebDataset shards, with the numbers of their classes; and scikit-learn's digits."""

import io
import logging
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fused_nce.train.data import celeba
from fused_nce.train.data.account import Account, some
from fused_nce.train.data.folders import FolderSamples, walk
from fused_nce.train.data.labels import CLASSES_FILE, Classes
from fused_nce.train.data.listing import Listing
from fused_nce.train.data.members import IMAGE, Name, Samples, hidden, unread
from fused_nce.train.data.shards import ShardSamples
from fused_nce.train.data.splits import Shards, find_shards, shards_in
from fused_nce.train.files import printable

log = logging.getLogger("fused_nce")

SPLITS = ("train", "probe", "test")
DIGITS_SPLIT_SEED = 0
MAX_DAMAGED = 0.01  # of a set; above it the set, not an image, is at fault
FULL_16_BIT = 65535


def open_samples(data: str, split: str, kind: str, *, hold: bool = True) -> Samples:
    """The files of one kind, from a folder or shards, by what is there.

    Args:
        data: a folder of class folders, of shards or of CelebA, or a glob of shards.
        split: "train", "probe" (the training split) or "test".
        kind: `members.IMAGE` or `members.RECORDING`.
        hold: see `ShardSamples`.

    Raises:
        ValueError: for an unknown split, or data that cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f"split: must be 'train', 'probe' or 'test', got {split!r}")
    wanted, path = "test" if split == "test" else "train", Path(data)
    if not path.exists() and not any(c in data for c in "*?["):
        own = "'digits', CelebA's folder, " if kind == IMAGE else ""
        raise ValueError(f"data: {data} does not exist; it must be {own}a folder of {kind}, or .tar[.gz] shards")
    if kind == IMAGE and (lists := celeba.find(path)) is not None:
        return celeba.CelebASamples(path, lists, wanted, kind)
    shards = shards_in(path) if path.is_dir() else []
    if path.is_dir() and not shards:
        return FolderSamples(path, wanted, kind)
    folders = [p for p in path.iterdir() if p.is_dir() and not hidden(p.name)] if shards else []
    files = (p for folder in folders for p in walk(str(folder), Account(), Listing(folder)))
    both = next((p for p in files if Name.of(p).kind == kind), None)
    if both is not None:
        raise ValueError(
            f"data: {data} holds shards ({shards[0].name}) and {kind} in folders ({both}); "
            "name the shards by a glob, or move either away"
        )
    found = find_shards(data)
    samples = _shard_samples(data, found, wanted, kind, hold)
    for entry in found.aside if shards or wanted == "train" else []:
        samples.account.leave_out("shards of no split" if shards else "shards of another split", str(entry))
    for entry in sorted(path.iterdir()) if shards else []:
        if entry not in shards and entry.is_file() and entry.name != CLASSES_FILE:
            samples.account.leave_out(unread(Name.of(entry.name), "files"), str(entry))
    return samples


def _shard_samples(data: str, found: Shards, split: str, kind: str, hold: bool) -> ShardSamples:
    """Of a split; where several are there to test on, of the first, or of the first with labels."""
    groups = found.tests if split == "test" else [found.train]
    if not any(groups):
        must = "test-*.tar or val*.tar" if split == "test" else "train-*.tar"
        raise ValueError(f"data: no {split} shards at {data}; there must be {must}, or .tar.gz or .tgz")
    samples = ShardSamples(groups[0], kind, hold=hold)
    for other in groups[1:]:
        left = other
        if not (any(samples.texts) or any(samples.fields)):
            second = ShardSamples(other, kind, hold=hold)
            if any(second.texts) or any(second.fields):
                samples, left = second, samples.shards
        samples.account.leave_out(f"other shards to {split} on", str(left[0]), len(left))
    return samples


class Readable(Protocol):
    """Images, or recordings, by index, without holding them decoded."""

    samples: Samples

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:  # (3, H, W) uint8, any size; or (samples,) int16
        ...


class ImageSource:
    """Images of a split with the numbers of their classes, which are those of the training split.

    Args:
        data: see `open_samples`.
        split: "train", "probe" or "test".
        known: the classes of the training split, where they have been read already.
        upright: turn images as their EXIF orientation says.
        leave_out_unseen: leave out images of classes that no training image has, instead of refusing them.

    Attributes:
        samples: their files.
        known: the classes.
        labels: of every image, −1 where there is none.

    Raises:
        ValueError: for data that cannot be read, or a class that no training image has.
    """

    def __init__(
        self,
        data: str | Path,
        split: str,
        *,
        known: Classes | None = None,
        upright: bool = False,
        leave_out_unseen: bool = False,
    ) -> None:
        data = str(data)
        self.samples, self.upright = open_samples(data, split, IMAGE), upright
        self.data, self.split = data, split
        if known is None:
            known = Classes(open_samples(data, "train", IMAGE, hold=False) if split == "test" else self.samples)
        self.known, self.classes = known, known.names
        self.labels = known.numbers(self.samples, leave_out_unseen=leave_out_unseen)
        if not self.labels:
            raise ValueError(f"data: all {split} images of {data} are of classes that no training image has")

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, rows: list[int]) -> None:
        """Forget all other images, and say so in the account."""
        kept = set(rows)
        gone: dict[str, list[int]] = {}
        for i, label in enumerate(self.labels):
            if i not in kept:
                bare = label < 0 and self.samples.attributes is None
                gone.setdefault("without a label" if bare else "that were not drawn", []).append(i)
        for why, those in gone.items():
            self.samples.account.leave_out(f"images {why}", self.samples.name(those[0]), len(those))
        self.samples.keep(rows)
        self.labels = [self.labels[i] for i in rows]

    def account(self, damaged: int = 0) -> str:
        """One line: images, classes, and what was left out and why."""
        attributes = self.samples.attributes
        known = (
            [f"{len(set(self.labels) - {-1}):,} classes", some(self.labels.count(-1), "without a label")]
            if attributes is None
            else [f"{len(attributes.names)} attributes"]
        )
        return self.samples.account.line(
            self.data,
            self.split,
            f"{len(self):,} images",
            *known,
            some(damaged, "damaged, each replaced by the next one"),
        )

    def read(self, index: int) -> Tensor:
        return to_rgb(self.samples.content(index), upright=self.upright)


class Damage:
    """Counts what cannot be read and puts the next good one in its place, so that batches stay full.

    Args:
        total: images or recordings of the set.
        kind: which of them.
        said: warn of them; a reader tells its loader instead, which warns once for all readers.

    Attributes:
        bad: index and reason of each.
    """

    def __init__(self, total: int, kind: str = IMAGE, *, said: bool = True) -> None:
        self.total, self.kind, self.said, self.bad = total, kind, said, dict[int, str]()

    @property
    def count(self) -> int:
        return len(self.bad)

    def read(self, source: Readable, index: int) -> tuple[Tensor, int]:
        """The image or recording, and the index that it came from.

        Raises:
            ValueError: when more than 1 % of the set is damaged.
        """
        while True:
            try:
                return source.read(index), index
            except MemoryError:
                raise
            except Exception as error:  # decoders raise errors of many types for broken files, and for too large ones
                self.report(index, f"{source.samples.name(index)}: {error or type(error).__name__}")
                index = (index + 1) % self.total

    def report(self, index: int, what: str) -> None:
        if index in self.bad:
            return
        self.bad[index] = what
        thing, what = self.kind[:-1], printable(what)
        if self.said and (self.count == 1 or self.count % 1000 == 0):
            log.warning("damaged %s %d, replaced by the next one: %s", thing, self.count, what)
        if self.count > MAX_DAMAGED * self.total:
            raise ValueError(f"data: {self.count} of {self.total} {self.kind} are damaged, above 1 %; the last: {what}")


def to_rgb(
    content: bytes,
    *,
    upright: bool = False,
) -> Tensor:  # (3, H, W) uint8
    """Decode an image: grey is repeated, 16 bits scaled to 8, transparency dropped, and of frames the first taken.

    Args:
        content: of a file.
        upright: turn it as its EXIF orientation says.

    Raises:
        ValueError: for no image, and for values whose scale is unknown.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        raise ValueError(f"is no image of a format that Pillow knows ({len(content)} bytes)") from error
    with image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return deep_grey(np.asarray(image)).expand(3, -1, -1).contiguous()
        tensor: Tensor = TF.pil_to_tensor(image.convert("RGB"))
    return tensor


def deep_grey(values: np.ndarray) -> Tensor:  # (H, W) any dtype -> (1, H, W) uint8
    """Grey of more than 8 bits: integers are of 16 bits, floats in [0, 1] or else in [0, 255]."""
    low, high = float(values.min()), float(values.max())
    top = FULL_16_BIT if values.dtype.kind in "iu" else 1 if high <= 1 else 255
    if not 0 <= low <= high <= top:
        need = "[0, 65535]" if top == FULL_16_BIT else "[0, 1] or [0, 255]"
        raise ValueError(f"has grey values in [{low:g}, {high:g}]; need {need}")
    return torch.from_numpy((values.astype(np.float64) * (255 / top)).round().astype(np.uint8))[None]


def fit(image: Tensor, size: int, resize: int) -> Tensor:  # (3, H, W) uint8 -> (3, size, size) uint8
    """Short side to `resize` px (bicubic), then a centre crop of `size` px."""
    if min(image.shape[-2:]) != resize:
        image = TF.resize(image, [resize], TF.InterpolationMode.BICUBIC, antialias=True)
    return image if image.shape[-2:] == (size, size) else TF.center_crop(image, [size, size])


def digits(split: str, image_size: int) -> tuple[Tensor, Tensor, list[str]]:
    """scikit-learn's 1797 handwritten digits: half of each class to train on, a quarter to probe, a quarter to test.

    Returns:
        Images `(n, 3, H, H)` uint8, enlarged from 8×8; labels `(n,)`; the class names.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("data: 'digits' needs scikit-learn; pip install scikit-learn") from error
    raw, target = load_digits(return_X_y=True)
    images = torch.from_numpy(raw).float().reshape(-1, 1, 8, 8) * (255 / 16)
    labels = torch.from_numpy(target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(DIGITS_SPLIT_SEED))
    parts: dict[str, list[Tensor]] = {"train": [], "probe": [], "test": []}
    for label in range(10):
        members = order[labels[order] == label]
        half, quarter = len(members) // 2, len(members) // 4
        for part, chosen in zip(parts, members.split([half, quarter, len(members) - half - quarter]), strict=True):
            parts[part].append(chosen)
    if split not in parts:
        raise ValueError(f"split: must be 'train', 'probe' or 'test', got {split!r}")
    chosen = torch.cat(parts[split])
    large = torch.nn.functional.interpolate(images[chosen], (image_size, image_size), mode="bicubic", antialias=True)
    rgb = large.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return rgb, labels[chosen], [str(i) for i in range(10)]
