"""Which backend is fastest on a GPU: a model of their times, its table, and its fit to measured ones.

A call of N rows, M columns and width D takes launch + N·M·(score + GEMMs·gemm(D)) on each backend. `cuda` moves its
scores through the L2 but multiplies at cuBLAS' rate; `triton` never lets a score off the chip, computes it again for
each gradient, and its tiles get thin as D grows. From 8,192² to 32,768² scores it leads in 16 bits up to D = 256;
beside a penalty, whose dq takes a pass of its own, as far for one gradient, for both up to 123 at most.
Calls with statistics of columns, those whose weights `triton` stores for cuBLAS, as far as its plan has room for them
(`backends/triton/plan.py`), and those of so many columns that strips of `cuda` are thin have costs of their own. The
table is `cost.json`; `python -m bench.fit` makes another from a measured record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("cost.json")
BOTH_WAYS = ", both ways"  # after the name of a backend: of its calls with statistics of columns
STORED = ", stored"  # of statistics of rows alone, where weights are stored
THIN = ", thin strips"  # likewise of `cuda`, with so many columns that its strips have few rows: products wait for keys
PLAIN = ", plain"  # likewise, where there is no penalty
THICK, THIN_FROM = 1 << 15, 1 << 16  # columns up to which strips are not thin, and from which they are: between, a mix


class Tiles(NamedTuple):
    """Which of a call's scores are computed, in parts of N·M."""

    seen: float = 1.0  # at all: of symmetric scores, the tiles on and above the diagonal
    again: float = 0.0  # a second time, because they were not kept
    for_keys: float = 1.0  # with a product of their own for the keys: of symmetric scores, those off the diagonal


class Call(NamedTuple):
    """What is asked of a backend, as far as its time depends on it."""

    op: str = "loss"  # or "stats", "grads"
    q: bool = True  # a gradient of the rows is wanted, or of a scale alone, which comes from it
    k: bool = True
    shared: bool = False  # one tensor in both roles
    columns: bool = False  # has column statistics: no weight before all of them are there
    penalised: bool = False
    symmetric: bool = False  # and so are the scores, which the CPU's tiles then see once
    at_once: bool = True  # of `triton`: one pass gives the statistics of rows and columns, else two
    stored: bool = False  # of `triton`: weights are stored for cuBLAS, as its plan says

    @classmethod
    def of(cls, op: str, needs: tuple[bool, bool, bool], penalised: bool = False) -> Call:
        """One that wants these gradients (`problem.Needs`)."""
        q, k, scale = needs
        return cls(op, q or (scale and not k), k, penalised=penalised)

    def tiles(self, *, kept: bool) -> Tiles:
        """Of large problems, with all scores kept from statistics to weights, or none that both sides' must precede."""
        share = 0.5 if self.symmetric else 1.0
        two_sided = self.op == "loss" and (self.columns or self.symmetric) and (self.q or self.k)
        return Tiles(share, share if two_sided and not kept else 0.0, share)  # fault: flop-kept-again

    def strip_tiles(self) -> Tiles:
        """Of a backend that holds a strip of scores for all that is made of it, and says no more of its plan."""
        return self._replace(symmetric=False).tiles(kept=False)

    def planned(self, columns: bool, at_once: bool, strip: int) -> Call:
        """With what `backends/triton/plan.ways` says."""
        return self._replace(columns=columns, at_once=at_once or not columns, stored=strip > 0)

    def entry(self, backend: str, m: int) -> str:
        """The table's name for what a backend does with so many columns.

        Thin passes of `triton` cost the same wherever it takes them. A table without the name has one that begins it.
        """
        stored = backend == "triton" and self.stored and self.at_once
        if self.columns:
            return backend + BOTH_WAYS * (stored or (backend == "cuda" and not self.shared))
        thin = backend == "cuda" and m >= THIN_FROM  # fault: cost-thin-strips
        return backend + STORED * stored + THIN * thin + PLAIN * (not self.penalised)  # fault: cost-stored

    def gemms(self, backend: str, tiles: Tiles | None = None) -> float:
        """N·M·D products that a backend computes: the scores and, of each gradient, w·y.

        Args:
            backend: its name.
            tiles: where they are known better than from what is asked: those of a plan.
        """
        first = self.op != "grads"  # statistics are to be made
        if backend != "triton":
            tiles = tiles or self.strip_tiles()
            for_keys = self.q if self.shared else self.k
            of_gradients = 0.0 if self.op == "stats" else self.q * tiles.seen + for_keys * tiles.for_keys
            return tiles.seen + tiles.again + of_gradients
        passes = first * (2.0 if self.columns and not self.at_once else 1.0)  # fault: cost-two-folds
        if self.op == "stats":
            return passes
        if self.stored:
            return passes + (self.q or self.k) + self.q + self.k
        if self.shared:  # one pass has both roles
            return passes + 2 * self.q
        once = first and self.q and not self.columns and not self.penalised  # dq comes with the statistics
        return passes + 2 * (self.q + self.k) - once


@dataclass(frozen=True)
class Cost:
    """Times of one backend at one element size."""

    launch_us: float
    gemm_ps: dict[int, float]  # a score and GEMM by D; linear between the entries, constant below, proportional above
    score_ps: float = 0.0  # a score, whatever is made of it

    def time_us(self, gemms: float, n: int, m: int, d: int) -> float:
        """What a call takes."""
        return self.launch_us + n * m * (self.score_ps + gemms * self._gemm_ps_at(d)) * 1e-6

    def _gemm_ps_at(self, d: int) -> float:
        below = max((width for width in self.gemm_ps if width <= d), default=min(self.gemm_ps))
        above = min((width for width in self.gemm_ps if width > d), default=below)
        if d <= below or above == below:
            return self.gemm_ps[below] * max(1.0, d / below)
        share = (d - below) / (above - below)
        return self.gemm_ps[below] * (1 - share) + self.gemm_ps[above] * share


Table = dict[tuple[str, int], Cost]  # by backend and bytes of an element


class Measured(NamedTuple):
    """One measured call."""

    backend: str
    element_bytes: int
    call: Call
    n: int
    m: int
    d: int
    time_us: float

    @property
    def entry(self) -> tuple[str, int]:
        """Of the table."""
        return self.call.entry(self.backend, self.m), self.element_bytes

    @property
    def gemms(self) -> float:
        """Products that were computed."""
        return self.call.gemms(self.backend)


def table() -> Table:
    """The shipped table."""
    return _read(PATH)


@cache
def _read(path: Path) -> Table:
    rows = json.loads(path.read_text(encoding="utf-8"))["costs"]
    return {
        (row["backend"], row["element_bytes"]): Cost(
            row["launch_us"], {int(width): ps for width, ps in row["gemm_ps"].items()}, row["score_ps"]
        )
        for row in rows
    }


def write(costs: Table, source: str) -> None:
    """Make this the shipped table.

    Args:
        costs: the table.
        source: where its numbers are from.
    """
    lines = [
        json.dumps(
            {
                "backend": backend,
                "element_bytes": size,
                "launch_us": round(cost.launch_us, 2),
                "score_ps": round(cost.score_ps, 4),
                "gemm_ps": {str(width): round(ps, 4) for width, ps in sorted(cost.gemm_ps.items())},
            }
        )
        for (backend, size), cost in costs.items()
    ]
    body = ",\n    ".join(lines)
    PATH.write_text(
        f'{{\n  "source": {json.dumps(source, ensure_ascii=False)},\n  "costs": [\n    {body}\n  ]\n}}\n',
        encoding="utf-8",
    )
    _read.cache_clear()


def fastest_first(call: Call, n: int, m: int, d: int, dtype: torch.dtype, costs: Table | None = None) -> list[str]:
    """The backends that the table knows for this element size, by predicted time: `times_us`'s arguments."""
    times = times_us(call, n, m, d, dtype, costs)
    return sorted(times, key=times.__getitem__)


def times_us(call: Call, n: int, m: int, d: int, dtype: torch.dtype, costs: Table | None = None) -> dict[str, float]:
    """What the table predicts of each backend that it knows for this element size.

    Args:
        call: what is asked.
        n: rows.
        m: columns.
        d: width.
        dtype: of the rows.
        costs: the shipped table by default.
    """
    size, costs = min(dtype.itemsize, 4), table() if costs is None else costs
    thin = min(1.0, max(0.0, (m - THICK) / (THIN_FROM - THICK)))  # fault: cost-no-share
    shares = ((1 - thin, THICK), (thin, THIN_FROM))
    return {
        name: sum(x * _of(costs, call.entry(name, to), size).time_us(call.gemms(name), n, m, d) for x, to in shares)
        for name, known in costs
        if known == size and "," not in name
    }


def _of(costs: Table, entry: str, size: int) -> Cost:
    while (entry, size) not in costs:
        entry = entry.rpartition(",")[0]
    return costs[entry, size]


def fit(measured: Iterable[Measured]) -> Table:
    """A table from measured times, each weighted by its inverse: what matters is the ratio.

    Raises:
        ValueError: for a backend measured less often than its model has numbers.
    """
    groups: dict[tuple[str, int], list[Measured]] = {}
    for row in measured:
        groups.setdefault(row.entry, []).append(row)
    return {key: _fit_one(key[0], rows) for key, rows in groups.items()}


def _fit_one(name: str, rows: list[Measured]) -> Cost:
    widths = sorted({row.d for row in rows})
    if len(rows) <= len(widths):
        raise ValueError(f"measured: got {len(rows)} times of {name!r} at {len(widths)} widths, need more times")
    several = len({(row.d, row.gemms) for row in rows}) > len(widths)  # else a score's share is not to be told
    terms = torch.zeros(len(rows), 2 + len(widths), dtype=torch.float64)
    for i, row in enumerate(rows):
        terms[i, 0], terms[i, 1] = 1.0, several * row.n * row.m * 1e-6
        terms[i, 2 + widths.index(row.d)] = row.gemms * row.n * row.m * 1e-6
    times = torch.tensor([[row.time_us] for row in rows], dtype=torch.float64)
    launch, score, *products = _positive(terms / times).tolist()
    return Cost(launch, {width: ps for width, ps in zip(widths, products, strict=True) if ps > 0}, score)


def _positive(terms: torch.Tensor) -> torch.Tensor:
    """x ≥ 0 with terms·x nearest to 1: noise makes a small one negative, which is then 0."""
    found, kept = torch.zeros(terms.shape[1], dtype=terms.dtype), terms.any(dim=0)
    while True:
        ones = torch.ones(terms.shape[0], 1, dtype=terms.dtype)
        found[kept] = torch.linalg.lstsq(terms[:, kept], ones).solution.squeeze(1)
        if bool((found >= 0).all()):
            return found
        least = int(found.argmin())
        found[least], kept[least] = 0.0, False
