"""What a run writes while it trains: `log.jsonl` always, and to the boards that are open.

A run is worth more than its log: what cannot be written, on a full disk or in a folder that is gone, is counted and
said, and the training goes on.
"""

import json
import logging
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

from fused_nce.train.files import settle, write_text
from fused_nce.train.monitor.boards import Boards

log = logging.getLogger("fused_nce")

LOG_NAME = "log.jsonl"


class Journal:
    """One JSON object a line. A number that is not finite is written as null: NaN is no JSON.

    Args:
        run_dir: folder of the run.
        step: the last full line that a resumed run continues from; what a killed run wrote after it is removed.
        boards: that show the numbers too.
    """

    def __init__(self, run_dir: Path, step: int, boards: Boards | None = None) -> None:
        self.path, self.lost, self._file, self.boards = run_dir / LOG_NAME, 0, -1, boards
        _cut(self.path, step)
        self._open()

    def write(self, line: dict[str, Any]) -> None:
        """Append a line that has a `step`."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._append((json.dumps(clean) + "\n").encode())
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                log.warning("%s: a line could not be written (%s); training goes on", self.path, error)
        if self.boards is not None:
            shown = {k: v for k, v in clean.items() if isinstance(v, int | float) and k != "step"}
            self.boards.add(shown, line["step"])

    def close(self) -> None:
        """Flush everything."""
        file, self._file = self._file, -1
        settle(*[partial(os.close, file)] * (file >= 0), *[] if self.boards is None else [self.boards.close])
        if self.lost:
            log.warning("%s lacks %d lines that could not be written", self.path, self.lost)

    def _open(self) -> None:
        """The new one first: a number that is closed belongs to whoever opens a file next."""
        old, self._file = self._file, os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if old >= 0:
            os.close(old)

    def _append(self, line: bytes) -> None:
        """All of a line or none."""
        if not self.path.exists():  # its folder was deleted; the loop makes it anew when it saves
            self._open()
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(f"{self.path}: no space for the whole line")
        except OSError:
            os.ftruncate(self._file, size)
            raise


def _cut(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [row.rstrip("\n") + "\n" for row in rows if _belongs(row, step)]
    if kept != rows:
        write_text(path, "".join(kept))


def _belongs(row: str, step: int) -> bool:
    """Whether it is a whole line of a step so far; one that was being written when the process died is not."""
    try:
        return bool(json.loads(row)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
