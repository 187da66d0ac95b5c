"""Which backend is fastest on a GPU: a model of their times, and its fit to measured ones.

A call of N rows, M columns and width D takes launch + N·M·score(D) on each backend. `cuda` moves its scores through the
L2 but multiplies at cuBLAS' rate; `triton` never lets a score off the chip, computes it once more, and its tiles get
thin as D grows. They meet near D = 130 for 16-bit inputs. `TABLE` holds the model of a Hopper GPU, not yet a
measurement; `fit` makes a table from measured times.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Cost:
    """Times of one backend at one element size, forward and backward together."""

    launch_us: float
    score_ps: dict[int, float]  # by D; linear between the entries, constant below and proportional to D above

    def time_us(self, n: int, m: int, d: int) -> float:
        """What a call takes."""
        return self.launch_us + n * m * self._score_ps_at(d) * 1e-6

    def _score_ps_at(self, d: int) -> float:
        below = max((width for width in self.score_ps if width <= d), default=min(self.score_ps))
        above = min((width for width in self.score_ps if width > d), default=below)
        if d <= below or above == below:
            return self.score_ps[below] * max(1.0, d / below)
        share = (d - below) / (above - below)
        return self.score_ps[below] * (1 - share) + self.score_ps[above] * share


class Measured(NamedTuple):
    """One measured call."""

    backend: str
    element_bytes: int
    n: int
    m: int
    d: int
    time_us: float


# At 790 TFLOP/s of 16-bit products and 50 of float32 ones. cuda: 3 GEMMs at 0.92 of that, 1.5 ps for the rows. triton:
# 4 GEMMs at 0.55 (D = 128), 0.48 (256), 0.28 (512) and 0.125 (768); its float32 products do without the tensor cores.
# Its tail is some seventy small launches of torch's, 2 us each; `cuda` has one for it.
TABLE = {
    ("cuda", 2): Cost(30.0, {64: 2.0, 128: 2.6, 256: 3.6, 1024: 10.0, 2560: 22.7}),
    ("triton", 2): Cost(150.0, {64: 1.4, 128: 2.5, 256: 5.6, 512: 18.7, 768: 62.4}),
    ("cuda", 4): Cost(30.0, {64: 9.8, 2560: 334.0}),
    ("triton", 4): Cost(150.0, {64: 25.8, 2560: 1024.0}),
}


def fastest_first(n: int, m: int, d: int, dtype: torch.dtype) -> list[str]:
    """The backends that the table knows for this element size, by predicted time."""
    known = {name: cost.time_us(n, m, d) for (name, size), cost in TABLE.items() if size == min(dtype.itemsize, 4)}
    return sorted(known, key=known.__getitem__)


def fit(measured: Iterable[Measured]) -> dict[tuple[str, int], Cost]:
    """A table from measured times, each weighted by its inverse: what matters is the ratio.

    Raises:
        ValueError: for a backend measured less often than its model has numbers.
    """
    groups: dict[tuple[str, int], list[Measured]] = {}
    for row in measured:
        groups.setdefault((row.backend, row.element_bytes), []).append(row)
    return {key: _fit_one(key[0], rows) for key, rows in groups.items()}


def _fit_one(name: str, rows: list[Measured]) -> Cost:
    widths = sorted({row.d for row in rows})
    if len(rows) <= len(widths):
        raise ValueError(f"measured: got {len(rows)} times of {name!r} at {len(widths)} widths, need more times")
    terms = torch.zeros(len(rows), 1 + len(widths), dtype=torch.float64)
    for i, row in enumerate(rows):
        terms[i, 0] = 1.0
        terms[i, 1 + widths.index(row.d)] = row.n * row.m * 1e-6
    times = torch.tensor([[row.time_us] for row in rows], dtype=torch.float64)
    launch, *scores = torch.linalg.lstsq(terms / times, torch.ones_like(times)).solution.squeeze(1).tolist()
    return Cost(launch, dict(zip(widths, scores, strict=True)))
