"""Saves while a run trains: one that fails does not end it, three in a row do, and no second signal breaks one off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from fused_nce.train import config as config_module
from fused_nce.train.files import settle
from fused_nce.train.machine import host
from fused_nce.train.machine.interrupt import Interrupt
from fused_nce.train.method import Method
from fused_nce.train.saving import lock

log = logging.getLogger("fused_nce")

MAX_FAILED = 3


class Saves:
    """What became of a run's saves, and of its folder.

    Args:
        run_dir: the folder.
        asked: the run's settings, for a folder that was deleted.
        interrupt: the run's signals.
    """

    def __init__(self, run_dir: Path, asked: Method, interrupt: Interrupt) -> None:
        self.run_dir, self.asked, self.interrupt = run_dir, asked, interrupt
        self.failed = 0  # in a row
        self.made_anew: int | None = None  # the step at which the folder was found deleted

    def attempt(self, save: Callable[[], None]) -> bool:
        """Whether it was possible; said where not."""
        try:
            with self.interrupt.held():
                save()
        except OSError as error:
            free = host.free_space(self.run_dir)
            log.warning("checkpoint not saved (%s; %s on the disk); training goes on", error, free)
            return False
        return True

    def due(self, wait: Callable[[], None], save: Callable[[], None]) -> None:
        """Wait for the save before and begin the next: the second whatever the first says, which is of an older one.

        Raises:
            OSError: `MAX_FAILED` times in a row either could not be done.
        """
        done = [self.attempt(part) for part in (wait, save)]  # fault: failed-save-skips
        self.failed = 0 if all(done) else self.failed + 1
        if self.failed >= MAX_FAILED:
            settle(wait)  # the one that has begun: the processes end next, and with them its group
            raise OSError(f"checkpoint: {self.failed} in a row could not be written to {self.run_dir}")

    def keep_folder(self, step: int) -> None:
        """A folder that was deleted meanwhile is made anew: a checkpoint without its settings is lost."""
        if (self.run_dir / config_module.CONFIG_NAME).exists():
            return
        if self.made_anew is None:
            self.made_anew = step
            log.warning("%s was deleted; it is made anew, without the log so far", self.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock.take(self.run_dir)
        config_module.save(self.asked, self.run_dir)
