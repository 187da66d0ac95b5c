"""A run that torchrun starts again after a process was lost: whether it is this launch's own, so that it goes on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

LAUNCH_NAME = "torchrun_launch"  # in a run's folder: the launch that began it, and its agent


def began(run_dir: Path) -> None:
    """Remember the launch that begins a run."""
    if (launch := _launch()) is not None:
        (run_dir / LAUNCH_NAME).write_text("\n".join(launch), encoding="utf-8")


def goes_on(run_dir: Path) -> bool:
    """Whether the launch that began a run has started its processes anew, so that the same command is to go on.

    torchrun counts those starts after a failure of this node alone: after another's, the agent is the one that began.
    """
    kept = _kept(run_dir)
    return bool(kept) and (kept == _launch() or (_restarts() > 0 and kept[:1] == (_launch() or ())[:1]))


def refused(run_dir: Path) -> None:
    """A launch that may not have a run's folder may not have it at its later attempts either.

    Launches may share their name: without `--rdzv-id`, those of several nodes are all called "none".
    """
    if _restarts() == 0 and _launch() is not None:
        (run_dir / LAUNCH_NAME).unlink(missing_ok=True)


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _launch() -> tuple[str, str] | None:
    """Its name, and the agent on this node, which is the parent of all processes here; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else (name, f"{socket.gethostname()} {os.getppid()}")


def _kept(run_dir: Path) -> tuple[str, ...]:
    file = run_dir / LAUNCH_NAME
    return tuple(file.read_text(encoding="utf-8").split("\n")) if file.is_file() else ()
