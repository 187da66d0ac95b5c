"""What a run writes while it trains: `log.jsonl` always, TensorBoard events where that is installed."""

import json
import math
import os
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"


class Journal:
    """One JSON object a line. A number that is not finite is written as null: NaN is no JSON.

    Args:
        run_dir: folder of the run.
        step: the last full line that a resumed run continues from; what a killed run wrote after it is removed.
        tensorboard: write events too.
    """

    def __init__(self, run_dir: Path, step: int, *, tensorboard: bool) -> None:
        path = run_dir / LOG_NAME
        _cut(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._writer = _event_writer(run_dir, step) if tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        """Append a line that has a `step`."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._writer is not None:
            for key, value in clean.items():
                if isinstance(value, int | float) and key != "step":
                    self._writer.add_scalar(key, value, clean["step"])

    def close(self) -> None:
        """Flush everything."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _cut(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # the line that was being written when the process died
    temporary = path.with_name(f".tmp-{os.getpid()}-log")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _event_writer(run_dir: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
