"""The files of a run that reports are made from and written to: `log.jsonl`, an evaluation's names."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
from pathlib import Path
from typing import Any

from fused_nce.train.files import read_json, reading

log = logging.getLogger("fused_nce")

Line = dict[str, Any]


def read_log(run_dir: Path, until: int | None = None) -> list[Line]:
    """The run's log in order of steps, to that of a checkpoint if `until` says which: a killed run, or one that still
    goes on, has lines beyond it; of such alone, the first. After a resume the later line of a step counts.

    What is no line of a step is left out, as a resume leaves it out, and counted in a warning; but for a last line that
    is cut short, since the process was killed while writing.

    Raises:
        ValueError: no log, or one without a step.
    """
    path = run_dir / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"run: {run_dir} has no log.jsonl; need the folder of a training run")
    with reading(path):
        rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    steps: dict[int, Line] = {}
    damaged = []
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            steps[int(line["step"])] = line
        except (KeyError, TypeError, ValueError, OverflowError):  # JSON has infinite numbers
            damaged += [number] if number < len(rows) else []
    if not steps:
        raise ValueError(f"run: {path} holds no step; need a run that trained")
    if damaged:
        log.warning("%s: %d damaged lines left out, the first of them line %d", path, len(damaged), damaged[0])
    known = [steps[step] for step in sorted(steps)]
    return known if until is None else [line for line in known if line["step"] <= until] or known[:1]


def read_evaluation(path: Path, needed: tuple[str, ...]) -> dict[str, Any]:
    """What `fused-nce eval` wrote.

    Raises:
        ValueError: naming the file, if it is damaged or lacks what is needed.
    """
    result = read_json(path)
    if missing := [key for key in needed if key not in result]:
        raise ValueError(f"{path}: has no {missing[0]}; evaluate the run again: fused-nce eval {path.parent}")
    return result


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
    return "" if data is None else "-" + re.sub(r"[^\w.-]+", "_", data_name(data))


def data_name(data: str) -> str:
    """Of a data set: its folder's; of a glob of shards, that and the glob."""
    path = Path(data).absolute()
    return f"{path.parent.name}/{path.name}" if set(path.name) & set("*?[") else path.name
