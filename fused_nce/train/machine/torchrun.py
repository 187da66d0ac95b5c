"""A run that torchrun starts again after a process was lost: whether it is this launch's own, so that it goes on.

A launch is known by its name and by its agents, one a node, which outlive the processes that they start. The name alone
would let a command that is given again by hand go on with an older run: without `--rdzv-id` launches of several nodes
are all called "none". Nor do the variables hold the rendezvous's address, only one that may change every round.

A node that joins, or stands in for another, has an agent that the folder does not know, and may get rank 0. So no
process decides by itself: before there is a process group, all say through its store what they know. It is enough that
one of them was there before; the first process decides, and keeps the agents of all.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

from fused_nce.train.files import one_line, write_text

LIMIT = timedelta(minutes=10)  # for the slowest process to import the package
LAUNCH_NAME = "torchrun_launch"  # in a run's folder: the launch that trains there, and its agents

_agents: set[str] = set()  # of this launch, as the first process has heard
_store: Any = None  # kept: its server is the first process's, and the process group meets there too


def began(run_dir: Path) -> None:
    """Remember the launch that begins a run, or goes on with it, by all its agents."""
    if (launch := _launch()) is not None:
        write_text(run_dir / LAUNCH_NAME, "\n".join([launch[0], *sorted(_agents | {launch[1]})]))


def goes_on(run_dir: Path) -> bool:
    """Whether this process knows that its launch trained in a folder before: the same command is to go on then.

    torchrun counts its starts after a failure of this node alone: after another's, the agent is one that was there.
    """
    kept, (name, agent) = _kept(run_dir), _launch() or ("", "")
    return name == kept[0] and (agent in kept[1:] or _restarts() > 0) if kept else False


def agreed(mine: bool, saved: bool) -> tuple[bool, bool]:
    """What all processes of a launch by torchrun do: whether they go on, as any of them knows, and whether from a
    checkpoint, as the first one sees: a network file system may not show a new one to all at once.

    Args:
        mine: this process knows that the run goes on.
        saved: it sees a checkpoint.

    Raises:
        ValueError: another process does not come.
    """
    launch, rank, world = _launch(), int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    _agents.clear()
    if launch is None or world == 1:
        return mine, saved
    from torch.distributed import DistError
    from torch.distributed.rendezvous import rendezvous

    global _store
    try:
        if _store is None:
            _store, _, _ = next(rendezvous("env://", timeout=LIMIT))
        if rank > 0:
            _store.set(f"fused_nce/{rank}/says", f"{mine:d}{launch[1]}")
            again, saved = (word == "1" for word in _taken(f"fused_nce/{rank}/hears"))
            return again, saved
        said = [_taken(f"fused_nce/{other}/says") for other in range(1, world)]
        again = mine or any(words[0] == "1" for words in said)  # fault: first-process-alone-knows
        _agents.update(words[1:] for words in said)
        for other in range(1, world):
            _store.set(f"fused_nce/{other}/hears", f"{again:d}{saved:d}")
    except DistError as error:
        raise ValueError(f"processes: not all came to the start: {one_line(str(error))}") from error
    return again, saved


def refused(run_dir: Path) -> None:
    """A launch that may not have a run's folder may not have it at its later attempts either.

    Launches may share their name: without `--rdzv-id`, those of several nodes are all called "none".
    """
    if _restarts() == 0 and _kept(run_dir)[:1] == (_launch() or (None,))[:1]:
        (run_dir / LAUNCH_NAME).unlink(missing_ok=True)


def _taken(key: str) -> str:
    """What is written there, once it is; deleted, for an agent's store outlives the processes of a round."""
    text: str = _store.get(key).decode()
    _store.delete_key(key)
    return text


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _launch() -> tuple[str, str] | None:
    """Its name, and the agent on this node, which is the parent of all processes here; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else (name, f"{socket.gethostname()} {os.getppid()}")


def _kept(run_dir: Path) -> tuple[str, ...]:
    file = run_dir / LAUNCH_NAME
    return tuple(file.read_text(encoding="utf-8").split("\n")) if file.is_file() else ()
