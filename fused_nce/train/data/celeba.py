"""CelebA as its authors give it, or as Kaggle does: images in one folder, 40 attributes and the partition in two lists.

`ROOT/img_align_celeba/**/000001.jpg`, `ROOT/list_attr_celeba.txt` and `ROOT/list_eval_partition.txt`, or both lists as
`.csv`. An image has no class; it has or lacks each attribute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fused_nce.train.data.folders import FileSamples, walk
from fused_nce.train.data.listing import Listing
from fused_nce.train.data.members import Attributes, Name, unread
from fused_nce.train.files import printable, reading

IMAGES, LISTS = "img_align_celeba", ("list_attr_celeba", "list_eval_partition")
PARTITION = {"train": "0", "test": "2"}  # 1 is for validation
ANSWERS = {"1": True, "-1": False, "0": False}


def find(root: Path) -> tuple[Path, Path] | None:
    """The two lists of a folder; None where it is none of CelebA's."""
    for ending in (".txt", ".csv"):
        attributes, partition = (root / f"{name}{ending}" for name in LISTS)
        if attributes.is_file():
            return attributes, partition
    return None


class CelebASamples(FileSamples):
    """The images of a split that both lists name, in the order of the first.

    Raises:
        ValueError: naming the file and line, for a list that is missing or damaged, and for a split without images.
    """

    def __init__(self, root: Path, lists: tuple[Path, Path], split: str, kind: str) -> None:
        super().__init__(root / IMAGES, kind)
        parts = {name: fields[0] for _, name, fields in _rows(lists[1], 1)}
        listing, skip = Listing(self.folder), len(str(self.folder)) + 1
        if not self.folder.is_dir():
            raise ValueError(f"data: {root} has {lists[0].name} and no folder {IMAGES}; it must hold the images")
        lying: dict[str, str] = {}
        for path in walk(str(self.folder), self.account, listing):
            file = Name.of(path)
            if file.kind != kind:
                self.account.leave_out(unread(file, "files"), path)
            elif lying.setdefault(path.rpartition("/")[2], path) != path:
                self.account.leave_out(f"{kind} of a name that another has", path)
        listing.close()
        names = _names(lists[0])
        values: list[list[bool]] = []
        for line, name, fields in _rows(lists[0], len(names)):
            path = lying.pop(name, "")
            if not path:
                self.account.leave_out(f"{kind} that the list has and the folder lacks", name)
            elif name not in parts:
                self.account.leave_out(f"{kind} of no partition", name)
            elif parts[name] == PARTITION[split]:
                if not ANSWERS.keys() >= set(fields):
                    raise ValueError(f"data: {lists[0]}, line {line}: must hold 1 and -1, got {printable(fields)}")
                self.inner.append(path[skip:])
                values.append([ANSWERS[text] for text in fields])
            elif parts[name] not in PARTITION.values():
                self.account.leave_out(f"{kind} of another partition", name)
        for name in lying:
            self.account.leave_out(f"{kind} without attributes", name)
        if not self.inner:
            left_out = self.account.aside()
            raise ValueError(f"data: no {split} {kind[:-1]} of {lists[1]} lies below {self.folder}{left_out}")
        self.attributes = Attributes(names, np.array(values))
        self.texts, self.fields = [""] * len(self.inner), [{}] * len(self.inner)

    attributes: Attributes

    def short_name(self, index: int) -> str:
        return self.inner[index].rpartition("/")[2]

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.attributes = Attributes(self.attributes.names, self.attributes.values[rows])


def _lines(path: Path) -> list[list[str]]:
    with reading(path):
        return [re.split(r"[,\s]+", line.strip()) for line in path.read_text(encoding="utf-8-sig").splitlines()]


def _names(path: Path) -> list[str]:
    """The attributes: in the first line of a `.csv`, behind `image_id`, and in the second of a `.txt`."""
    lines = _lines(path)
    head = 0 if path.suffix == ".csv" else 1
    found = lines[head][1 - head :] if len(lines) > head else []
    if not found or not all(found) or len(set(found)) < len(found):
        raise ValueError(f"data: {path} must name different attributes, got {printable(found)}")
    return found


def _rows(path: Path, count: int) -> Iterator[tuple[int, str, list[str]]]:
    """(line, image, fields) of a list, whose head is passed over."""
    head = 1 if path.suffix == ".csv" else 2 if path.stem == LISTS[0] else 0
    for number, (name, *fields) in enumerate(_lines(path)[head:], start=head + 1):
        if len(fields) != count:
            if not name and not fields:
                continue  # an empty line
            raise ValueError(
                f"data: {path}, line {number}: must hold a name and {count} numbers, got {len(fields)} of them"
            )
        yield number, name, fields
