"""How the documents write a table and a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; first column left, the others right."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, never an exponent; a dash for None and NaN."""
    if value is None or value != value:
        return "–"
    before_point = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:.{max(0, digits - before_point)}f}"
