"""Samples of a folder: `ROOT/[train|test]/CLASS/**/FILE`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fused_nce.train.data.account import Account
from fused_nce.train.data.labels import of_folder
from fused_nce.train.data.listing import FILE, FOLDER, LINK, Listing, followed
from fused_nce.train.data.members import KINDS, Name, Samples, hidden, unread
from fused_nce.train.data.splits import SHARD_SUFFIXES, TESTS, TRAIN, alike, is_split, split_of
from fused_nce.train.data.texts import Texts
from fused_nce.train.files import printable

SPLIT_FOLDERS = {"train": (TRAIN,), "test": TESTS}
UNLABELLED = re.compile(r"unlabell?ed|unsup(ervised)?", re.IGNORECASE)  # no class: STL-10's name for most of it


class FileSamples(Samples):
    """Files below a folder.

    Attributes:
        folder: the top.
        inner: the path of each below it.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        super().__init__(kind)
        self.folder, self.inner = folder, Texts()

    def name(self, index: int) -> str:
        return f"{self.folder}/{self.inner[index]}"

    label_name = name

    def short_name(self, index: int) -> str:
        return self.inner[index]

    def content(self, index: int, most: int | None = None) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read(-1 if most is None else most)

    def size(self, index: int) -> int:
        return os.path.getsize(self.name(index))

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.inner = Texts(self.inner[i] for i in rows)


class FolderSamples(FileSamples):
    """The files of one kind below a folder, sorted; the folder's own subfolders are the classes.

    Files beside the class folders, or in one called `unlabeled`, have no label. Linked folders are followed.

    Raises:
        ValueError: for a folder without the split, or without such a file in it; or where `train` may be a class, or
            classes are called as splits are.
    """

    def __init__(self, root: Path, split: str, kind: str) -> None:
        super().__init__(root, kind)
        listing = Listing(root)
        folders = listing.folders(str(root))
        known = {key: _named(folders, key) for key in SPLIT_FOLDERS}
        splits = [root / name for name in known[split]]
        # ImageNet's `test` has no labels, its `val` does.
        found = next(filter(_has_folders, splits), splits[0] if splits else None)
        for other in splits:
            if other != found:
                self.account.leave_out(f"other folders to {split} on", str(other))
        others = [root / name for key, names in known.items() if key != split for name in names]
        if found is None and (split == "test" or any(any(folder.glob("*")) for folder in others)):
            must = " or ".join(str(root / name) for name in SPLIT_FOLDERS[split])
            raise ValueError(f"data: {root} has no {split} split; it must hold {must}")
        if found is None:
            _refuse_unclear(root, folders)
        else:
            for entry, _ in listing.entries(str(root))[1]:
                if not hidden(entry) and root / entry not in (*splits, *others):
                    self.account.leave_out("entries beside the splits", str(root / entry))
            if split == "train" and not _has_folders(found) and not others:
                beside = [name for name in folders if root / name != found and _holds(root / name, kind)]
                if beside:
                    raise ValueError(
                        f"data: {found} has no folders of classes, and {', '.join(beside[:3])} beside it {kind} too; "
                        f"if train is a class, all of them must lie in {found}, and if it is the split, elsewhere"
                    )
            self.folder, listing = found, Listing(found)
        texts, skip = {"": ""}, len(str(self.folder)) + 1
        shards = None  # a folder that holds some
        for path in walk(str(self.folder), self.account, listing):
            name = Name.of(path)
            if name.kind != kind:
                self.account.leave_out(unread(name, "files"), path)
                if shards is None and path.endswith(SHARD_SUFFIXES):
                    shards = os.path.dirname(path)
                continue
            inner = path[skip:]
            top = inner.partition("/")[0] if "/" in inner else ""
            if top not in texts:
                texts[top] = "" if UNLABELLED.fullmatch(top) else of_folder(top)
            self.inner.append(inner)
            self.texts.append(texts[top])
        listing.close()
        if not self.inner:
            needed = ", ".join(f".{suffix}" for suffix, known in KINDS.items() if known == kind)
            must = f"shards lie in {shards}: --data {shards}" if shards else f"it must hold {needed} files"
            raise ValueError(f"data: no {kind[:-1]} below {self.folder}{self.account.aside()}; {must}")
        self.fields = [{}] * len(self.inner)  # one, of which there are none
        for folder in listing.folders(str(self.folder)):
            if folder not in texts:
                self.account.leave_out(f"folders without {kind}", str(self.folder / folder))


def _named(folders: list[str], split: str) -> list[str]:
    """The folders of a split, first choice first: of its own names; or, beside those of any split, of its like."""
    own = [name for name in SPLIT_FOLDERS[split] if name in folders]
    if own or not any(name in folders for names in SPLIT_FOLDERS.values() for name in names):
        return own
    return [name for word in SPLIT_FOLDERS[split] for name in folders if is_split(name) and split_of(name) == word]


def _refuse_unclear(root: Path, folders: list[str]) -> None:
    """Folders of which some seem to be splits: as classes they would put test images into the training."""
    like = {name: split for name in folders if (split := split_of(name)) is not None}
    if TRAIN in like.values() and set(like.values()) & set(TESTS):
        shown = list(like)
    elif not (shown := alike(folders)):
        shown = folders if all(map(is_split, folders)) else []
    if shown:
        more = f" and {len(shown) - 3} more such" if len(shown) > 3 else ""
        raise ValueError(
            f"data: {root} holds {printable(', '.join(shown[:3]))}{more}; splits must be called train, and test or "
            f"val, and classes of such names lie in {root / TRAIN}"
        )


def _has_folders(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(entry.is_dir() and not hidden(entry.name) for entry in entries)


def _holds(folder: Path, kind: str) -> bool:
    with os.scandir(folder) as entries:
        return any(Name.of(entry.name).kind == kind and not hidden(entry.name) for entry in entries)


def walk(
    folder: str, account: Account, listing: Listing, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
    """The files below a folder, sorted part by part of their path.

    Args:
        folder: to look into.
        account: told of hidden entries, of links that lead nowhere or back, and of what is neither folder nor file.
        listing: of the tree.
        above: device and inode of the folders that it lies in.
    """
    here, entries = listing.entries(folder)
    if here in above:
        account.leave_out("links to a folder that they lie in", folder)
        return
    for name, entry in entries:
        path = f"{folder}/{name}"
        kind = followed(path) if entry == LINK else entry
        if hidden(name):
            account.leave_out("hidden folders" if kind == FOLDER else "hidden files", path)
        elif kind == FILE:
            yield path
        elif kind == FOLDER:
            yield from walk(path, account, listing, above | {here})
        else:
            account.leave_out("links to nothing" if kind is None else "devices", path)
