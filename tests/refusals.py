"""Tables of calls that must be refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Refused = tuple[Callable[[], Any], type[Exception], str]  # a call, what it raises, and a pattern of what that says


def unlike(table: Sequence[Refused]) -> list[str]:
    """The calls that are not refused so, in one line: where they stand, and what they did."""
    wrong = []
    for number, (call, kind, pattern) in enumerate(table):
        try:
            found = f"returned {call()!r}"
        except kind as error:
            found = str(error)
            if re.search(pattern, found) and "\n" not in found:
                continue
        wrong.append(f"{number}: {found}, need {kind.__name__}: {pattern}")
    return wrong
