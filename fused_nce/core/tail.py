"""What every tail is: a row's elements and their slopes; reduction, penalty and weight, the same for all, once.

A tail sees (N, P) positives and (S, N) row statistics, never a score, so any backend can carry any tail.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fused_nce.core.spec import Spec

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
    """NaN where x is, else 0: what a row that counts for nothing contributes."""
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
        return f"{self.NAME}({self.penalty!r},{self.reduction},{self.weight!r})"

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
        square = fixed_sum(rows[spec.stats.index("square")]) if self.penalty else torch.zeros_like(total)
        penalty = square * (self.penalty / (pos.shape[0] * m))
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
        return self.weight if self.reduction == "sum" else self.weight / n_elements

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
            d.d_rows[spec.stats.index("square")] = d_penalty * (self.penalty / n_scores)
        return d
