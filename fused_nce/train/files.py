"""The files of a run: read with their name in every error, written whole or not at all; and text fit for a terminal."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger("fused_nce")

MAX_JSON_BYTES = 64 << 20


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around whatever parses a file: each kind of damage becomes one error with the file's name.

    Raises:
        ValueError: naming the file, for anything that the body raises; what it says of a setting stays as it is.
    """
    try:
        yield
    except Exception as error:  # parsers raise types of their own
        if str(error).startswith(f"{path}: "):
            raise
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        said = getattr(error, "strerror", None) or said  # the system's, without its number and the path
        raise ValueError(f"{path}: cannot be used: {one_line(said)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it is missing, above 64 MB, damaged or holds something else.
    """
    with reading(path):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"is above {MAX_JSON_BYTES >> 20} MB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no JSON object")
    return values


def named(path: str | Path) -> Path:
    """The path by a name that another can stand beside: `.` and `..` have none."""
    return Path(path) if Path(path).name not in ("", "..") else Path(path).resolve()


def aside(path: Path) -> Path:
    """A name beside it that no other writer has: processes of two machines, or containers, may share a number."""
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def clear(folder: Path) -> None:
    """Remove what writers that were killed have left under such names, of which each has one; while nobody writes."""
    for path in folder.glob(".tmp-*"):
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: Path, text: str) -> None:
    """In UTF-8: see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Under a temporary name, synced, then renamed: a reader, or a run after a crash, never sees half a file."""
    temporary = aside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def one_line(text: str) -> str:
    """Without line breaks, tabs and runs of blanks."""
    return " ".join(text.split())


def settle(*ends: Callable[[], Any]) -> None:
    """Each end of a run, where an error may be on its way: what one raises is said, and stands in no other's place."""
    for end in ends:
        try:
            end()
        except Exception as error:  # fault: end-hides-error
            log.warning("the end of the run: %s", one_line(f"{type(error).__name__}: {error}"))


def printable(text: object) -> str:
    """Every character that would steer a terminal, or that it cannot show, as its escape: file names may hold any."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
