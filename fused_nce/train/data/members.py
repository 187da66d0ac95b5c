"""What a file or a shard's member is, by its name alone; and samples by index, wherever they lie."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fused_nce.train.data.account import Account

# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")
PACKED = ("gz", "bz2", "xz", "zst")
# Those that webdataset writes as integers, without `count`; the first that a sample has is its label.
LABEL_SUFFIXES = ("cls", "class", "cls2", "index", "inx", "id")
IMAGE, RECORDING, LABEL, FIELDS = "images", "recordings", "labels", "fields"
KINDS = {
    **dict.fromkeys(IMAGE_SUFFIXES, IMAGE),
    "wav": RECORDING,
    **dict.fromkeys(LABEL_SUFFIXES, LABEL),
    **dict.fromkeys(("json", "jsn"), FIELDS),
}
# What a sample of each kind may have beside it in a shard.
BESIDE = {IMAGE: {LABEL}, RECORDING: {LABEL, FIELDS}}


HIDDEN = re.compile(r"(^|/)(__MACOSX(/|$)|\.(?!\.?(/|$)))")  # not `.` and `..`


class Name(NamedTuple):
    """Of a file or a member, taken apart: `a/22.05.PNG` is stem `a/22.05`, key `a/22` and suffix `png`."""

    stem: str  # up to the last dot
    key: str  # up to the first dot of the file's name, as WebDataset defines it
    suffix: str  # lower case
    kind: str | None  # of the table; None for what nothing reads

    @classmethod
    def of(cls, path: str) -> Name:
        folder, slash, base = path.rpartition("/")
        stem, dot, suffix = base.rpartition(".")
        stem, suffix = (stem, suffix.lower()) if dot else (base, "")
        return cls(folder + slash + stem, folder + slash + stem.partition(".")[0], suffix, KINDS.get(suffix))


def hidden(name: str) -> bool:
    """Whether a path leads through what a tool left there: `.ipynb_checkpoints`, `__MACOSX`, `._1.png`."""
    return HIDDEN.search(name) is not None


def unread(name: Name, things: str) -> str:
    """How the account calls a file that is not read."""
    if not name.suffix:
        return f"{things} without a suffix"
    inner = re.search(r"\.\w+$", name.stem) if name.suffix in PACKED else None
    return f"{inner[0].lower() if inner else ''}.{name.suffix} {things}"


class Attributes(NamedTuple):
    """What each of several samples has or lacks."""

    names: list[str]
    values: NDArray[np.bool_]  # (n, A)


class Samples:
    """Files of one kind by index, each with its label as text.

    Of each sample there are numbers and bytes in arrays, and references to what it shares with others; no object of its
    own, which every forked reader would copy (`texts.Texts`).

    Attributes:
        kind: `IMAGE` or `RECORDING`.
        texts: the label of each, "" where it has none.
        fields: other labels of each, by name.
        numbered: whether integers among the texts are numbers of classes, rather than names.
        class_names: of a classes file, in the order of their numbers; None without one.
        account: what was left out.
        attributes: that each has or lacks; None where the data have no such list.
    """

    attributes: Attributes | None = None

    def __init__(self, kind: str) -> None:
        self.kind, self.account = kind, Account()
        self.texts: list[str] = []
        self.fields: list[dict[str, str]] = []
        self.numbered, self.class_names = False, None

    numbered: bool
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)

    def name(self, index: int) -> str:
        """Where a sample lies, for people."""
        raise NotImplementedError

    def label_name(self, index: int) -> str:
        """Where its label is written."""
        raise NotImplementedError

    def short_name(self, index: int) -> str:
        """The same on every machine."""
        raise NotImplementedError

    def content(self, index: int, most: int | None = None) -> bytes:
        """The file, or its first `most` bytes."""
        raise NotImplementedError

    def size(self, index: int) -> int:
        """Bytes of the file."""
        raise NotImplementedError

    def runs(self) -> list[int]:
        """How many lie one behind the other in each shard; none without shards."""
        return []

    def ahead(self, indices: list[int]) -> None:
        """They will be read soon."""

    def keep(self, rows: list[int]) -> None:
        """Forget all others."""
        self.texts = [self.texts[i] for i in rows]
        self.fields = [self.fields[i] for i in rows]

    def digest(self) -> str:
        """SHA-256 of all names and labels, in order: another one is other data."""
        found = hashlib.sha256()
        for i, text in enumerate(self.texts):
            found.update(f"{self.short_name(i)}\0{text}\0{sorted(self.fields[i].items())}\n".encode("utf-8", "replace"))
        if self.attributes is not None:
            found.update(repr(self.attributes.names).encode() + self.attributes.values.tobytes())
        return found.hexdigest()
