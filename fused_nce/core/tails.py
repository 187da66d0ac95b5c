"""Tails: from a row's statistics to a number, with the derivative by hand. A parity test holds them to autograd.

A tail sees (N, P) positives and (S, N) row statistics, never a score, so any backend can carry any tail. Reduction,
penalty and weight are the same for all, and stand once, in `Tail`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_nce.core.spec import Block, Separate, Spec, cached
from fused_nce.core.statistics import deficit, softplus

REDUCTIONS = ("mean", "sum", "none")


class Coefficients(NamedTuple):
    """dL/d statistic: the only thing a backward needs from a loss."""

    d_pos: Tensor  # (N, P)
    d_rows: Tensor  # (S, N)
    d_columns: Tensor | None = None  # (S', M); from a tail (S', N, P), as each positive sees its column


def fixed_sum(x: Tensor) -> Tensor:
    """Sum of all elements in an order set by the size alone.

    `torch.sum` splits long inputs over the threads there are, so its last bits depend on their number. 0-d.
    """
    x = x.reshape(-1)
    while x.numel() > 1024:
        x = torch.nn.functional.pad(x, (0, -x.numel() % 1024)).view(-1, 1024).sum(dim=1)
    return x.sum()


def bad(x: Tensor) -> Tensor:
    """NaN where x is NaN, else 0: a row without positives adds 0 to the loss, unless it is bad."""
    return torch.where(x.isnan(), x, torch.zeros_like(x))


@dataclass(frozen=True)
class Tail(ABC):
    """weight·reduce(elements) + λ·mean(s²).

    Attributes:
        penalty: λ, of the mean over all N·M raw scores.
        reduction: of the elements; the penalty stays a mean, and is added to their mean under "none".
        weight: factor of the elements, a number of the tail: a loss averaged over two directions costs no pass over
            the gradients. λ is given as it is to be.
    """

    penalty: float = 0.0
    reduction: str = "mean"
    weight: float = 1.0

    NAME: ClassVar[str]
    READS: ClassVar[tuple[str, ...]]  # statistics
    READS_POS: ClassVar[bool] = True  # and `pos`, which only layouts with a fixed number of positives have
    REPORT: ClassVar[tuple[str, ...]]  # what a loss reports for logging, in the order of the ops' `report` output

    @property
    def code(self) -> str:
        """The tail as one string, e.g. `nce(0.04,mean,1.0)`; `parse` reads it back."""
        return _code(self)

    def _written(self) -> str:
        return f"{self.NAME}({self.penalty!r},{self.reduction},{self.weight!r})"

    @classmethod
    def read(cls, values: Sequence[str]) -> Tail:
        """What `code` wrote between its brackets."""
        penalty, reduction, *weight = values
        return cls(float(penalty), reduction, *map(float, weight))

    @property
    def stats(self) -> tuple[str, ...]:
        """The row statistics that a spec must have for it."""
        return (*self.READS, "square") if self.penalty else self.READS

    def per_row(self, spec: Spec) -> int:
        """Elements a row."""
        return 1

    @abstractmethod
    def elements(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """(N, `per_row`) losses.

        Args:
            spec: says what the rows of `rows` are.
            pos: (N, P) positives.
            rows: (S, N) row statistics.
            columns: (S', N, P) statistics of each positive's column; None without any.
        """

    @abstractmethod
    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """dL/d statistic from dL/d element, which broadcasts to (N, `per_row`). `square` stays 0."""

    @abstractmethod
    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """(len(REPORT),) numbers for logging; m is the number of columns."""

    def values(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, nce, penalty): scalars, but nce is all elements under `reduction="none"`. m: columns."""
        elements = self.elements(spec, pos, rows, columns)
        if self.weight != 1:
            elements = elements * self.weight
        total = fixed_sum(elements)
        mean = total / elements.numel()
        # λ = 0 leaves the penalty out rather than multiply: 0·inf would turn a finite loss into NaN.
        # fault: lambda-0-times
        square = fixed_sum(rows[spec.stats.index("square")]) if self.penalty else torch.zeros_like(total)
        penalty = square * (self.penalty / (pos.shape[0] * m))  # fault: penalty-mean-over
        nce = {"mean": mean, "sum": total, "none": elements}[self.reduction]
        return (total if self.reduction == "sum" else mean) + penalty, nce, penalty

    def reports(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int, count: int) -> Tensor:
        """(count, len(REPORT)): `report` of the rows r, r + count, … for each r < count."""
        return torch.stack(
            [
                self.report(
                    spec, pos[r::count], rows[:, r::count], columns if columns is None else columns[:, r::count], m
                )
                for r in range(count)
            ]
        )

    def unit(self, n_elements: int) -> float:
        """d loss / d element: what an upstream gradient of 1 on the loss puts on each of N·`per_row` elements."""
        return self.weight if self.reduction == "sum" else self.weight / n_elements  # fault: sum-reduced-like

    def coefficients(
        self,
        spec: Spec,
        pos: Tensor,  # (N, P)
        rows: Tensor,  # (S, N)
        columns: Tensor | None,  # (S', N, P)
        d_element: Tensor | float,  # dL/d element, broadcasts to (N, per_row)
        d_penalty: Tensor | float,  # dL/d penalty, 0-d
        n_scores: int,  # N·M of the whole problem, whatever part of its rows is given here
    ) -> Coefficients:
        """dL/d pos, dL/d rows and, with column statistics, dL/d columns."""
        d = self.slopes(spec, pos, rows, columns, d_element)
        if self.penalty:
            d.d_rows[spec.stats.index("square")] = d_penalty * (self.penalty / n_scores)  # fault: penalty-slope-not
        return d


@dataclass(frozen=True)
class Nce(Tail):
    """softplus(neg_lse − pos) of each positive; with the columns' neg_lse, the mean of both directions.

    Each positive is its own classification problem against the row's negatives; `softplus(neg_lse − pos)` is
    −log(e^pos / (e^pos + Σ_neg e^t)) without the cancellation, and its gradient in the positive is −σ(neg_lse − pos),
    never p − 1.
    """

    NAME = "nce"
    READS = ("neg_lse", "neg_max")
    REPORT = ("top1", "pos_mean", "neg_lse_mean", "nce_minus_chance", "mi_bound")

    def per_row(self, spec: Spec) -> int:
        """P."""
        return spec.n_pos

    def elements(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """(N, P)."""
        there = softplus(deficit(rows[spec.stats.index("neg_lse")][:, None], pos))
        if columns is None:
            return there
        return (there + softplus(deficit(columns[spec.columns.index("neg_lse")], pos))) / 2  # fault: both-ways-summed

    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """q = σ(neg_lse − pos) on the negatives, −q on the positive; half of it each way with columns."""
        ways = 1.0 if columns is None else 0.5
        behind = deficit(rows[spec.stats.index("neg_lse")][:, None], pos)
        q = torch.sigmoid(behind) * d_element * ways  # fault: p-1-cancels
        d_rows = torch.zeros_like(rows)
        d_rows[spec.stats.index("neg_lse")] = q.sum(dim=1)
        if columns is None:
            return Coefficients(-q, d_rows)
        back = torch.sigmoid(deficit(columns[spec.columns.index("neg_lse")], pos)) * d_element * ways
        d_columns = torch.zeros_like(columns)
        d_columns[spec.columns.index("neg_lse")] = back
        return Coefficients(-q - back, d_rows, d_columns)

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """Of the rows' direction.

        `mi_bound` is log n_k − mean softplus(neg_lse − log n_c − pos): a valid lower bound on the mutual information in
        nats, by Jensen over the n_k images. `chance − nce` is not one: its negatives come n_c correlated ones an image.
        """
        n_c = spec.layout.n_c if isinstance(spec.layout, Block) else 1
        n_k = m // n_c + isinstance(spec.layout, Separate)  # a separate positive stands beside the M columns
        lse = rows[spec.stats.index("neg_lse")]
        n = pos.numel()
        behind = deficit(lse[:, None], pos)
        nce = fixed_sum(softplus(behind)) / n
        bound = math.log(n_k) - fixed_sum(softplus(behind - math.log(n_c))) / n  # fault: mutual-information-overstated
        top1 = fixed_sum((pos > rows[spec.stats.index("neg_max")][:, None]).to(pos.dtype)) / n
        chance = math.log1p((n_k - 1) * n_c)
        return torch.stack([top1, fixed_sum(pos) / n, fixed_sum(lse) / lse.numel(), nce - chance, bound])


@dataclass(frozen=True)
class _Supervised(Tail):
    """Positives as a set, of which a row may have any number; a row without any costs 0 and counts in the mean.

    Both forms are softplus(neg_lse − pos_lse), a row's positives against its negatives, and a term that the negatives
    do not enter. A lone positive thus has the gradient −σ(neg_lse − pos), which p − 1/|P| would lose.
    """

    READS_POS = False
    READS = ("neg_lse", "neg_max", "pos_lse", "pos_max", "pos_sum", "pos_count", "pos_gap")
    REPORT = ("top1", "pos_mean", "neg_lse_mean", "positives_a_row")

    def elements(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """(N, 1)."""
        found = dict(zip(spec.stats, rows, strict=True))
        value = softplus(found["neg_lse"] - found["pos_lse"]) + self.spread(found)
        # fault: anchor-without-positives
        return torch.where(found["pos_count"] > 0, value, bad(found["neg_lse"]))[:, None]

    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """ν = σ(neg_lse − pos_lse), the negatives' share: on them, off the positives."""
        found = dict(zip(spec.stats, rows, strict=True))
        d = torch.as_tensor(d_element, dtype=rows.dtype, device=rows.device).expand(rows.shape[1], 1)[:, 0]
        d = torch.where(found["pos_count"] > 0, d, torch.zeros_like(d))
        share = torch.sigmoid(found["neg_lse"] - found["pos_lse"]) * d
        share = torch.where(found["pos_count"] > 0, share, bad(found["neg_lse"]))
        d_rows = torch.zeros_like(rows)
        d_rows[spec.stats.index("neg_lse")] = share
        d_rows[spec.stats.index("pos_lse")] = -share
        # A lone positive has no gap, whatever its score; and 1 − 1 of a recomputed score would not quite be 0.
        several = found["pos_count"] > 1
        d_rows[spec.stats.index("pos_gap")] = torch.where(several, self.on_gap() * d, torch.zeros_like(d))
        return Coefficients(torch.zeros_like(pos), d_rows)

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """top1: rows, of those with a positive, whose highest score is one."""
        found = dict(zip(spec.stats, rows, strict=True))
        count = fixed_sum(found["pos_count"])
        anchors = fixed_sum((found["pos_count"] > 0).to(rows.dtype)).clamp(min=1)
        first = (found["pos_max"] > found["neg_max"]).to(rows.dtype)
        n = rows.shape[1]
        top1, mean = fixed_sum(first) / anchors, fixed_sum(found["pos_sum"]) / count.clamp(min=1)
        return torch.stack([top1, mean, fixed_sum(found["neg_lse"]) / n, count / n])

    @abstractmethod
    def spread(self, found: dict[str, Tensor]) -> Tensor:
        """The term of the positives alone, (N,)."""

    @abstractmethod
    def on_gap(self) -> float:
        """d element / d pos_gap."""


@dataclass(frozen=True)
class LogOut(_Supervised):
    """all_lse − mean pos: the mean over the positives of their negative log-probabilities."""

    NAME = "log_out"

    def spread(self, found: dict[str, Tensor]) -> Tensor:
        """pos_lse − mean pos."""
        return found["pos_gap"]

    def on_gap(self) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class LogIn(_Supervised):
    """all_lse − log mean e^pos: the negative log of the positives' mean probability."""

    NAME = "log_in"

    def spread(self, found: dict[str, Tensor]) -> Tensor:
        """log |P|, no gradient."""
        return found["pos_count"].clamp(min=1).log()

    def on_gap(self) -> float:
        """0."""
        return 0.0


@dataclass(frozen=True)
class Sigmoid(Tail):
    """Σ_pos softplus(−t) + Σ_neg softplus(t) of each row: every pair is a binary question of its own."""

    NAME = "sigmoid"
    READS = ("neg_softplus", "neg_max")
    REPORT = ("top1", "pos_mean")

    def elements(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """(N, 1)."""
        return (softplus(deficit(0.0, pos)).sum(dim=1) + rows[spec.stats.index("neg_softplus")])[:, None]

    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """−σ(−t) on the positives, 1 on the negatives' sum."""
        d_rows = torch.zeros_like(rows)
        d = torch.as_tensor(d_element, dtype=rows.dtype, device=rows.device).expand(rows.shape[1], 1)
        found = rows[spec.stats.index("neg_softplus")]
        d_rows[spec.stats.index("neg_softplus")] = d[:, 0] + bad(found)  # σ(∞) = 1 would let the gradient look sound
        return Coefficients(-torch.sigmoid(deficit(0.0, pos)) * d, d_rows)

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """top1: positives above all of their row's negatives."""
        top1 = (pos > rows[spec.stats.index("neg_max")][:, None]).to(pos.dtype)
        return torch.stack([fixed_sum(top1), fixed_sum(pos)]) / pos.numel()


# Of margins: hinges of pairs and of triplets, in units of the margin, which the scale brings to 1. A row without a
# positive or without a negative costs 0, and counts in the mean as every row does.


@dataclass(frozen=True)
class _Margin(Tail):
    """An element a row, of named statistics."""

    READS_POS = False

    def elements(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """(N, 1)."""
        return self.element(dict(zip(spec.stats, rows, strict=True)))[:, None]

    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """Constant where a hinge is active, and where it is not."""
        found = dict(zip(spec.stats, rows, strict=True))
        d_rows = torch.zeros_like(rows)
        # An element that is NaN must not leave its row's gradient at a sound 0.
        d = torch.as_tensor(d_element, dtype=rows.dtype, device=rows.device).expand(rows.shape[1], 1)[:, 0]
        d = d + bad(self.element(found))  # fault: nan-hinge-leaves
        for name, slope in self.slope(found).items():
            d_rows[spec.stats.index(name)] = slope * d
        return Coefficients(torch.zeros_like(pos), d_rows)

    @abstractmethod
    def element(self, found: dict[str, Tensor]) -> Tensor:
        """(N,) losses."""

    @abstractmethod
    def slope(self, found: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """d element / d statistic."""


@dataclass(frozen=True)
class Hardest(_Margin):
    """max(0, 1 − t_p + t_n) of each row's lowest positive and highest negative."""

    NAME = "hardest"
    READS = ("pos_min", "pos_ties", "pos_hardest", "neg_max", "neg_ties", "neg_hardest")
    REPORT = ("active", "violated")

    def element(self, found: dict[str, Tensor]) -> Tensor:
        """From the two extremes; −inf without one of them, which the hinge makes 0."""
        return self._gap(found).clamp(min=0)

    def slope(self, found: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """1 on the negative, −1 on the positive."""
        active = (self._gap(found) > 0).to(found["neg_max"].dtype)
        # At a NaN neither is active, and NaN·0 would be as good as NaN·1.
        return {"pos_hardest": -active, "neg_hardest": active}  # fault: triplets-hinge-other

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """Rows whose hinge is not 0; rows with a negative above a positive."""
        gap = self._gap(dict(zip(spec.stats, rows, strict=True)))
        return torch.stack([fixed_sum((gap > least).to(gap.dtype)) / gap.numel() for least in (0, 1)])

    def _gap(self, found: dict[str, Tensor]) -> Tensor:
        return 1 - found["pos_hardest"] + found["neg_hardest"]


@dataclass(frozen=True)
class _Sums(_Margin):
    """Σ of statistics that are sums themselves, each with its factor; reports the mean over the rows of others."""

    FACTORS: ClassVar[dict[str, float]]

    def element(self, found: dict[str, Tensor]) -> Tensor:
        """The sum."""
        return torch.stack([factor * found[name] for name, factor in self.FACTORS.items()]).sum(dim=0)

    def slope(self, found: dict[str, Tensor]) -> dict[str, Tensor | float]:
        """The factors."""
        return {**self.FACTORS}

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """The reported statistics' means."""
        return torch.stack([fixed_sum(rows[spec.stats.index(name)]) / rows.shape[1] for name in self.REPORT])


@dataclass(frozen=True)
class Pairs(_Sums):
    """½Σ_pos t² + ½Σ_neg max(0, 1 + t)²."""

    NAME = "pairs"
    READS = ("pos_square", "neg_hinge_square")
    REPORT = ("pos_square", "neg_hinge_square")
    FACTORS: ClassVar = {"pos_square": 0.5, "neg_hinge_square": 0.5}


@dataclass(frozen=True)
class AllTriplets(_Sums):
    """Σ_p Σ_n max(0, 1 − t_p + t_n)."""

    NAME = "all_triplets"
    READS = ("triplets_all", "active_all", "pos_count")
    REPORT = ("active_all",)
    FACTORS: ClassVar = {"triplets_all": 1.0}


@dataclass(frozen=True)
class SemihardTriplets(_Sums):
    """Σ_p max(0, 1 − t_p + t_n), n the highest negative below p."""

    NAME = "semihard_triplets"
    READS = ("triplets_semihard", "active_semihard", "pos_count")
    REPORT = ("active_semihard",)
    FACTORS: ClassVar = {"triplets_semihard": 1.0}


MARGIN_TAILS: tuple[type[Tail], ...] = (Hardest, Pairs, AllTriplets, SemihardTriplets)
_code = cached(lambda tail: tail._written())  # of its own class
REPORT = Nce.REPORT
KERNEL_TAILS = (Nce, LogOut, LogIn, Sigmoid)  # whose coefficients the kernels of `csrc` find, in its order
ALL: tuple[type[Tail], ...] = (*KERNEL_TAILS, *MARGIN_TAILS)
TAILS: dict[str, type[Tail]] = {tail.NAME: tail for tail in ALL}


@lru_cache(maxsize=256)
def parse(code: str) -> Tail:
    """The tail that `Tail.code` wrote.

    Raises:
        ValueError: for a name outside `TAILS`.
    """
    name, _, rest = code.partition("(")
    if name not in TAILS:
        raise ValueError(f"tail: got {code!r}, need one of {', '.join(TAILS)}")
    return TAILS[name].read(rest.removesuffix(")").split(","))
