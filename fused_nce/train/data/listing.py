"""The names in a tree of folders, remembered between runs: of a million files none is looked at again.

A folder that nothing was added to or taken from keeps its times, and then its names are those of the last listing; the
second of them, of the change itself, no program can set back, as tar and rsync do with the first.
What a link leads to is looked at each time. A small tree is read anew. `FUSED_NCE_LISTINGS=0` remembers nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fused_nce.train.data.members import hidden
from fused_nce.train.files import printable, write_text

log = logging.getLogger("fused_nce")

FILE, FOLDER, LINK, OTHER = "file", "folder", "link", "other"
MIN_FILES = 10_000  # of a tree that is remembered
UNUSED_S = 90 * 86_400
TOO_NEW_NS = 2_000_000_000  # a change within a tick of the disk's clock would leave the time as it is


class Listing:
    """The entries of folders below a root; `close` writes what was read anew.

    Args:
        root: of the tree.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.file, self.started = root, _file(root), time.perf_counter()
        self.known = _read(self.file)
        self.found: dict[str, Any] = {}
        self.anew = 0

    def entries(self, folder: str) -> tuple[tuple[int, int], list[tuple[str, str]]]:
        """Device and inode of a folder, and its (name, kind), sorted by name."""
        here, kept = self._look(folder)
        both = [(name, FILE) for name in kept["files"]]
        if kept["rest"]:
            both = sorted([*both, *((name, kind) for name, kind in kept["rest"])])
        return (here.st_dev, here.st_ino), both

    def folders(self, folder: str) -> list[str]:
        """The names of the folders in one, hidden ones left out, and of links to some; sorted."""
        _, kept = self._look(folder)
        return sorted(
            name
            for name, kind in kept["rest"]
            if not hidden(name) and FOLDER in (kind, kind == LINK and followed(f"{folder}/{name}"))
        )

    def _look(self, folder: str) -> tuple[os.stat_result, dict[str, Any]]:
        here, key = os.stat(folder), folder[len(str(self.root)) :]  # however the root was called
        if key in self.found:
            return here, self.found[key]
        place = [here.st_dev, here.st_ino, here.st_mtime_ns, here.st_ctime_ns]
        kept = self.known.get(key)
        if kept is None or kept["place"] != place:  # fault: listing-of-another-time
            kept = {"place": place, "files": [], "rest": []}
            with os.scandir(folder) as entries:
                for entry in entries:
                    kind = _kind(entry)
                    kept["files" if kind == FILE else "rest"].append(entry.name if kind == FILE else [entry.name, kind])
            kept["files"].sort()
            self.anew += 1
            if time.time_ns() - here.st_ctime_ns < TOO_NEW_NS:
                kept["place"] = None
        self.found[key] = kept
        return here, kept

    def close(self) -> None:
        """Remember the tree if it is large, and say in a line how long it took."""
        files = sum(len(kept["files"]) for kept in self.found.values())
        if files < MIN_FILES:
            return
        kept = "not remembered"
        if self.file is not None:
            kept = f"the other folders as {self.file} has them"
            try:
                if self.anew or self.found.keys() != self.known.keys():
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    write_text(self.file, json.dumps(self.found))
                    _forget(self.file.parent)
                else:
                    with suppress(OSError):  # another user's
                        os.utime(self.file)  # used
            except OSError as error:
                kept = f"not remembered: {error}"
        log.info(
            "%s: %s files in %s folders listed in %.1f s, %s of these read anew (%s)", printable(self.root),
            f"{files:,}", f"{len(self.found):,}", time.perf_counter() - self.started, f"{self.anew:,}", kept,
        )  # fmt: skip


def _forget(folder: Path) -> None:
    """Remove the listings that no run has used for long: of trees that are gone, most of them."""
    for name in os.listdir(folder):
        with suppress(OSError):  # another run's doing, or another user's file
            if name.startswith("listing-") and time.time() - os.stat(folder / name).st_mtime > UNUSED_S:
                os.unlink(folder / name)  # fault: listings-of-the-gone


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink():
        return LINK
    if entry.is_dir():
        return FOLDER
    return FILE if entry.is_file() else OTHER


def followed(path: str) -> str | None:
    """What a link leads to; None for nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    return FOLDER if stat.S_ISDIR(mode) else FILE if stat.S_ISREG(mode) else OTHER


def _file(root: Path) -> Path | None:
    """Where a tree is remembered; None where nothing is to be, or for somebody without a home."""
    if os.environ.get("FUSED_NCE_LISTINGS") == "0":
        return None
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return Path(folder, "fused_nce", f"listing-{digest}.json")


def _read(file: Path | None) -> dict[str, Any]:
    """The tree as it was; none where there is no file, or one that was damaged."""
    try:
        found = json.loads(file.read_bytes()) if file is not None else {}
        for kept in found.values():
            if not (all(type(name) is str for name in kept["files"]) and "place" in kept):
                return {}
            kept["rest"] = [(str(name), str(kind)) for name, kind in kept["rest"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    known: dict[str, Any] = found
    return known
