"""Where images come from: scikit-learn's digits, a folder, or WebDataset shards. All of them by index."""

import glob
import io
import json
import logging
import tarfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

log = logging.getLogger("fused_nce")

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm"}
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
DIGITS_SPLIT_SEED = 0
MAX_DAMAGED = 0.01  # of a set; above it the set, not an image, is at fault


class Readable(Protocol):
    """Images, or recordings, by index, without holding them decoded."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Tensor:  # (3, H, W) uint8, any size; or (samples,) int16
        ...


class Source(Readable, Protocol):
    """Images with the numbers of their classes."""

    labels: list[int]
    classes: list[str]


class FolderSource:
    """`ROOT/[train|test]/CLASS/**/IMAGE`. Images beside the class folders have no label (−1)."""

    def __init__(self, root: Path, split: str) -> None:
        found = next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)
        if found is None and (split == "test" or any((root / "test").glob("*"))):
            raise ValueError(f"data: {root} has no {split} split; it must hold {root / SPLIT_FOLDERS[split][0]}")
        folder = found or root
        self.classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not self.paths:
            raise ValueError(f"data: no image below {folder}; it must hold {', '.join(sorted(IMAGE_SUFFIXES))} files")
        label = {name: i for i, name in enumerate(self.classes)}
        self.labels = [label.get(p.relative_to(folder).parts[0], -1) for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int) -> Tensor:
        return to_rgb(self.paths[index].read_bytes())


class Shards:
    """WebDataset shards by index: members that share a key are a sample, one kept and the small ones beside it parsed.

    A plain `.tar` is indexed once and read by offset. A `.tar.gz` cannot be, so what it keeps is held in memory.

    Args:
        pattern: a folder of shards, or a glob.
        split: "train" or "test".
        kept: suffixes of the member that a sample is read from, with their dots.
        notes: parsers of the members beside it, by suffix without the dot.

    Attributes:
        notes: of each sample, what its parsers found, by suffix.
        shards: the files.
    """

    def __init__(
        self, pattern: str, split: str, kept: Collection[str], notes: Mapping[str, Callable[[bytes], Any]]
    ) -> None:
        self.shards = find_shards(pattern, split)
        self.notes: list[dict[str, Any]] = []
        self.entries: list[tuple[str, Path, int, bytes | int]] = []  # key, shard, offset, the bytes or their number
        for shard in self.shards:
            self._index(shard, kept, notes)

    def _index(self, shard: Path, kept: Collection[str], notes: Mapping[str, Callable[[bytes], Any]]) -> None:
        zipped = shard.suffix == ".gz"
        pending: dict[str, tuple[int, bytes | int]] = {}
        found: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(shard, "r:gz" if zipped else "r:") as tar:
                for member in tar:
                    # A key is the path up to the first dot of the file's name, as WebDataset defines it.
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    handle = tar.extractfile(member) if zipped or suffix in notes else None
                    if f".{suffix.lower()}" in kept:
                        pending[key] = (member.offset_data, handle.read() if handle else member.size)
                    elif suffix in notes and handle:
                        found.setdefault(key, {})[suffix] = notes[suffix](handle.read())
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise ValueError(f"data: shard {shard} cannot be read: {error}") from error
        for key, (offset, content) in pending.items():
            self.entries.append((key, shard, offset, content))
            self.notes.append(found.get(key, {}))

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        key, shard, *_ = self.entries[index]
        return f"{shard}:{key}"

    def content(self, index: int) -> bytes:
        """The kept member of a sample."""
        _, shard, offset, content = self.entries[index]
        if isinstance(content, int):
            with shard.open("rb") as handle:
                handle.seek(offset)
                content = handle.read(content)
        return content


class ShardSource(Shards):
    """Images in shards; `.cls` holds the label as text."""

    def __init__(self, pattern: str, split: str) -> None:
        super().__init__(pattern, split, IMAGE_SUFFIXES, {"cls": int})
        if not self.entries:
            raise ValueError(f"data: no image in {', '.join(map(str, self.shards))}")
        self.labels: list[int] = [note.get("cls", -1) for note in self.notes]
        names = self.shards[0].parent / "classes.json"
        count = max(self.labels) + 1
        self.classes = json.loads(names.read_text()) if names.is_file() else [str(i) for i in range(count)]
        if len(self.classes) < count:
            raise ValueError(f"data: {names} names {len(self.classes)} classes, but a label is {count - 1}")

    def read(self, index: int) -> Tensor:
        return to_rgb(self.content(index))


class Damage:
    """Counts images that cannot be read and puts the next good one in their place, so that batches stay full."""

    def __init__(self, total: int) -> None:
        self.total, self.bad = total, set[int]()

    @property
    def count(self) -> int:
        return len(self.bad)

    def read(self, source: Readable, index: int) -> tuple[Tensor, int]:
        """The image, and the index that it came from.

        Raises:
            ValueError: when more than 1 % of the set is damaged.
        """
        while True:
            try:
                return source.read(index), index
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
                self.report(index, f"{source.name(index)}: {error}")
                index = (index + 1) % self.total

    def report(self, index: int, what: str) -> None:
        if index in self.bad:
            return
        self.bad.add(index)
        if self.count == 1 or self.count % 1000 == 0:
            log.warning("damaged image %d, replaced by the next one: %s", self.count, what)
        if self.count > MAX_DAMAGED * self.total:
            raise ValueError(f"data: {self.count} of {self.total} images are damaged, above 1 %; the last: {what}")


def find_shards(pattern: str, split: str) -> list[Path]:
    """The `.tar` and `.tar.gz` files of a split, sorted."""
    path = Path(pattern)
    names = SPLIT_FOLDERS[split]
    if path.is_dir():
        found = [p for name in names for p in path.glob(f"{name}*.tar*")]
        if not found and split == "train":
            found = list(path.glob("*.tar*"))
    else:
        base = path.name
        options = [base] if split == "train" else [base.replace("train", name) for name in names if "train" in base]
        found = [Path(p) for option in options for p in glob.glob(str(path.parent / option))]
    shards = sorted(p for p in found if p.name.endswith((".tar", ".tar.gz")))
    if not shards:
        raise ValueError(f"data: no {split} shards at {pattern}; a folder must hold {names[0]}-*.tar or .tar.gz files")
    return shards


def to_rgb(content: bytes) -> Tensor:  # (3, H, W) uint8
    with Image.open(io.BytesIO(content)) as image:
        tensor: Tensor = TF.pil_to_tensor(image.convert("RGB"))
    return tensor


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
