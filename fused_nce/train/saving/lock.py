"""One trainer a folder: a lock that ends with its process, however that ends.

A record lock (`lockf`): readers of images, which are forked, do not inherit it, and it works on network file systems.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("fused_nce")

LOCK_NAME = ".lock"
LEASE_S = 300.0  # a node that is lost keeps its locks on a network file system for its lease, 90 s of NFS by default
HELD = (errno.EACCES, errno.EAGAIN)  # lockf(3): any other error says that the file system has no locks to give


class Held(NamedTuple):
    """A lock that this process holds."""

    file: int  # descriptor
    left_behind: bool  # there was a file already: of a process that was killed


_held: dict[Path, Held] = {}


def take(run_dir: Path, wait_s: float = 0.0) -> Held:
    """Lock a run's folder for this process, which may hold the lock already; without locks (Lustre without `-o flock`,
    some of FUSE) a warning says so, and a file that is there is not known to be left behind.

    Args:
        run_dir: folder of the run.
        wait_s: seconds for whoever holds it, where that may be a process that was lost.

    Raises:
        ValueError: another process holds it.
    """
    path, started, said = run_dir.resolve() / LOCK_NAME, time.monotonic(), False
    while True:
        held = _held.get(path)
        if held is not None and _is_at(held.file, path):
            return held
        found = path.exists()
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:  # fault: every-error-held
                owner = os.read(file, 200).decode(errors="replace") or "another process"
                os.close(file)
                if time.monotonic() - started >= wait_s:
                    raise ValueError(
                        f"out: {run_dir} is being trained by {owner}; wait for it, or use another --out"
                    ) from error
                if not said:
                    log.warning("out: %s is locked by %s: lost, maybe; waiting, %g s at most", run_dir, owner, wait_s)
                said = True
                time.sleep(min(1.0, wait_s))
                continue
            log.warning("out: %s cannot be locked (%s): only one run may train there", run_dir, error.strerror)
            found = False
        if not _is_at(file, path):  # who held it has removed it meanwhile
            os.close(file)
            continue
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        _held[path] = Held(file, found)
        return _held[path]


def release(run_dir: Path, *, refused: bool = False) -> None:
    """Give it back, if this process holds it.

    Args:
        run_dir: folder of the run.
        refused: leave the folder as it was found.
    """
    path = run_dir.resolve() / LOCK_NAME
    held = _held.pop(path, None)
    if held is None:
        return
    if _is_at(held.file, path) and not (refused and held.left_behind):
        with suppress(OSError):  # it names a process that is gone, as one that was killed leaves it
            path.unlink()
    os.close(held.file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False
