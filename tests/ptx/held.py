"""Losses on a backend whose kernels the interpreter runs, held to the error budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.losses.test_registry import etas_of


def hold(names: Sequence[str], dtype: str, backend: str, record_eta: Any) -> int:
    """Losses within their budget; how many of them the backend takes."""
    taken, failures = 0, []
    for name in names:
        try:
            etas = etas_of(name, "cpu", backend, getattr(torch, dtype), 0, -2.5)
        except ValueError as error:
            if "which cannot run this: " not in str(error):
                raise
            continue
        taken += 1
        record_eta(f"{backend} ptx", dtype, etas)
        if not max(etas.values()) <= 1:
            failures.append(f"{name}: {etas}")
    assert not failures, "\n".join(failures)
    return taken
