"""Tails of margins: hinges of pairs and of triplets, in units of the margin, which the scale brings to 1.

A row without a positive or without a negative costs 0, and counts in the mean as every row does.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fused_nce.core.spec import Spec
from fused_nce.core.tail import Coefficients, Tail, bad, fixed_sum


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
        d = d + bad(self.element(found))
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
        return {"pos_hardest": -active, "neg_hardest": active}

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
