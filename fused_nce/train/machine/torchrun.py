"""A run that torchrun starts again after a process was lost: whether it is this launch's own, so that it goes on."""

from __future__ import annotations

import os
from pathlib import Path

LAUNCH_NAME = "torchrun_launch"  # in a run's folder: the launch that began it


def restarts() -> int:
    """How often this launch has started its processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def began(run_dir: Path) -> None:
    """Remember the launch that begins a run."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        (run_dir / LAUNCH_NAME).write_text(os.environ["TORCHELASTIC_RUN_ID"], encoding="utf-8")


def goes_on(run_dir: Path) -> bool:
    """Whether the launch that began a run has started its processes anew, so that the same command is to go on."""
    file, launch = run_dir / LAUNCH_NAME, os.environ.get("TORCHELASTIC_RUN_ID")
    return restarts() > 0 and file.is_file() and file.read_text(encoding="utf-8") == launch


def refused(run_dir: Path) -> None:
    """A launch that may not have a run's folder may not have it at its later attempts either.

    Launches may share their name: without `--rdzv-id`, those of several nodes are all called "none".
    """
    if restarts() == 0 and "TORCHELASTIC_RUN_ID" in os.environ:
        (run_dir / LAUNCH_NAME).unlink(missing_ok=True)
