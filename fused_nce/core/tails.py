"""Tails: from statistics to a number, with the derivative by hand. A parity test holds them to autograd."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fused_nce.core.margins import MARGIN_TAILS
from fused_nce.core.spec import Block, Separate, Spec
from fused_nce.core.statistics import softplus
from fused_nce.core.tail import REDUCTIONS, Coefficients, Tail, bad, fixed_sum

__all__ = ["REDUCTIONS", "Coefficients", "Tail", "fixed_sum"]  # of `core/tail.py`


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
        there = softplus(rows[spec.stats.index("neg_lse")][:, None] - pos)
        if columns is None:
            return there
        return (there + softplus(columns[spec.columns.index("neg_lse")] - pos)) / 2

    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """q = σ(neg_lse − pos) on the negatives, −q on the positive; half of it each way with columns."""
        ways = 1.0 if columns is None else 0.5
        q = torch.sigmoid(rows[spec.stats.index("neg_lse")][:, None] - pos) * d_element * ways
        d_rows = torch.zeros_like(rows)
        d_rows[spec.stats.index("neg_lse")] = q.sum(dim=1)
        if columns is None:
            return Coefficients(-q, d_rows)
        back = torch.sigmoid(columns[spec.columns.index("neg_lse")] - pos) * d_element * ways
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
        nce = fixed_sum(softplus(lse[:, None] - pos)) / n
        bound = math.log(n_k) - fixed_sum(softplus(lse[:, None] - math.log(n_c) - pos)) / n
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
        return (softplus(-pos).sum(dim=1) + rows[spec.stats.index("neg_softplus")])[:, None]

    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """−σ(−t) on the positives, 1 on the negatives' sum."""
        d_rows = torch.zeros_like(rows)
        d = torch.as_tensor(d_element, dtype=rows.dtype, device=rows.device).expand(rows.shape[1], 1)
        found = rows[spec.stats.index("neg_softplus")]
        d_rows[spec.stats.index("neg_softplus")] = d[:, 0] + bad(found)  # σ(∞) = 1 would let the gradient look sound
        return Coefficients(-torch.sigmoid(-pos) * d, d_rows)

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """top1: positives above all of their row's negatives."""
        top1 = (pos > rows[spec.stats.index("neg_max")][:, None]).to(pos.dtype)
        return torch.stack([fixed_sum(top1), fixed_sum(pos)]) / pos.numel()


REPORT = Nce.REPORT
ALL: tuple[type[Tail], ...] = (Nce, LogOut, LogIn, Sigmoid, *MARGIN_TAILS)
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
    penalty, reduction, *weight = rest.removesuffix(")").split(",")
    return TAILS[name](float(penalty), reduction, *map(float, weight))
