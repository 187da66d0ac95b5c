"""The files of a run that reports are made from and written to: `log.jsonl`, an evaluation's names."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from fused_nce.train.files import reading

Line = dict[str, Any]


def read_log(run_dir: Path) -> list[Line]:
    """The run's log in order of steps. After a resume the later line of a step counts.

    A last line that is cut short (the process was killed while writing) is left out.

    Raises:
        ValueError: no log, an empty log, or a damaged line that is not the last.
    """
    path = run_dir / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"run: {run_dir} has no log.jsonl; need the folder of a training run")
    with reading(path):
        rows = path.read_text(encoding="utf-8").splitlines()
    steps: dict[int, Line] = {}
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            if "step" in line:
                steps[int(line["step"])] = line
        except (json.JSONDecodeError, TypeError, ValueError):
            if number < len(rows):
                raise ValueError(f"{path}: line {number} is no JSON object: {row[:60]!r}") from None
    if not steps:
        raise ValueError(f"run: {path} holds no step; need a run that trained")
    return [steps[step] for step in sorted(steps)]


def column(log: list[Line], x: str, y: str) -> tuple[list[float], list[float]]:
    """The finite (x, y) pairs of two keys; a line without one of them is left out."""
    pairs = []
    for line in log:
        a, b = line.get(x), line.get(y)
        if isinstance(a, (int, float)) and isinstance(b, (int, float)) and math.isfinite(a) and math.isfinite(b):
            pairs.append((float(a), float(b)))
    return [a for a, _ in pairs], [b for _, b in pairs]


def median(log: list[Line], key: str) -> float | None:
    """The median of a key over the run, or None where it was never logged."""
    values = column(log, "step", key)[1]
    return statistics.median(values) if values else None


def suffix(data: str | None) -> str:
    """Ending of the names of an evaluation's files on another data set."""
    return "" if data is None else "-" + re.sub(r"[^\w.-]+", "_", Path(data).name)
