"""Samples of a folder: `ROOT/[train|test]/CLASS/**/FILE`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from fused_nce.train.data.account import Account
from fused_nce.train.data.labels import of_folder
from fused_nce.train.data.members import KINDS, Name, Samples, hidden, unread

SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
SPLIT_LIKE = re.compile(r"(train|test)(ing)?$|val(id(ation)?)?$", re.IGNORECASE)


class FolderSamples(Samples):
    """The files of one kind below a folder, sorted; the folder's own subfolders are the classes.

    Files beside the class folders have no label. Linked folders are followed.

    Raises:
        ValueError: for a folder without the split, or without such a file in it.
    """

    def __init__(self, root: Path, split: str, kind: str) -> None:
        super().__init__(kind)
        found = next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)
        others = [root / name for key, names in SPLIT_FOLDERS.items() if key != split for name in names]
        if found is None and (split == "test" or any(any(folder.glob("*")) for folder in others)):
            raise ValueError(f"data: {root} has no {split} split; it must hold {root / SPLIT_FOLDERS[split][0]}")
        self.folder, self.paths = found or root, list[Path]()
        entries = [entry for entry in sorted(root.iterdir()) if not hidden(entry.name)]
        if found is not None:
            for entry in entries:
                if entry.name not in chain(*SPLIT_FOLDERS.values()):
                    self.account.leave_out("entries beside the splits", str(entry))
        folders = [entry.name for entry in entries if entry.is_dir()]
        if found is None and folders and all(SPLIT_LIKE.match(name) for name in folders):
            raise ValueError(f"data: {root} holds {', '.join(folders)}; splits must be called train, and test or val")
        for path in walk(self.folder, self.account):
            name = Name.of(path.name)
            if name.kind != kind:
                self.account.leave_out(unread(name, "files"), str(path))
                continue
            inner = path.relative_to(self.folder).parts
            self.paths.append(path)
            self.texts.append(of_folder(inner[0]) if len(inner) > 1 else "")
        if not self.paths:
            needed = ", ".join(f".{suffix}" for suffix, known in KINDS.items() if known == kind)
            left_out = f" (left out: {self.account})" if self.account.kinds else ""
            raise ValueError(f"data: no {kind[:-1]} below {self.folder}{left_out}; it must hold {needed} files")
        self.fields = [{} for _ in self.paths]
        known = set(self.texts)
        for entry in sorted(self.folder.iterdir()):
            if entry.is_dir() and not hidden(entry.name) and of_folder(entry.name) not in known:
                self.account.leave_out(f"folders without {kind}", str(entry))

    def name(self, index: int) -> str:
        return str(self.paths[index])

    label_name = name

    def short_name(self, index: int) -> str:
        return self.paths[index].relative_to(self.folder).as_posix()

    def content(self, index: int, most: int | None = None) -> bytes:
        with self.paths[index].open("rb") as file:
            return file.read(-1 if most is None else most)

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.paths = [self.paths[i] for i in rows]


def walk(folder: Path, account: Account, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """The files below a folder, sorted part by part of their path.

    Args:
        folder: to look into.
        account: told of hidden entries, of links that lead nowhere or back, and of what is neither folder nor file.
        above: device and inode of the folders that it lies in.
    """
    here = folder.stat()
    if (here.st_dev, here.st_ino) in above:
        account.leave_out("links to a folder that they lie in", str(folder))
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = folder / entry.name
        if hidden(entry.name):
            account.leave_out("hidden folders" if entry.is_dir() else "hidden files", str(path))
        elif not path.exists():
            account.leave_out("links to nothing", str(path))
        elif entry.is_dir():
            yield from walk(path, account, above | {(here.st_dev, here.st_ino)})
        elif entry.is_file():
            yield path
        else:
            account.leave_out("devices", str(path))
