"""Which cases of a test are in every run."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def nightly_but(kept: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases for `parametrize`: those kept in every run, the others nightly."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if case in kept else [pytest.mark.nightly]
        )
        for case in cases
    ]
