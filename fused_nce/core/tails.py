"""Tails: from row statistics to a number, with the derivative by hand. A parity test holds them to autograd.

A tail sees (N, P) positives and (S, N) row statistics, never a score, so any backend can carry any tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_nce.core.atoms import softplus
from fused_nce.core.spec import Spec

REPORT = ("top1", "pos_mean", "neg_lse_mean", "nce_minus_chance", "mi_bound")
"""What a loss reports for logging, in the order of the ops' `report` output."""

REDUCTIONS = ("mean", "sum", "none")


class Coefficients(NamedTuple):
    """dL/d statistic: the only thing a backward needs from a loss."""

    d_pos: Tensor  # (N, P)
    d_rows: Tensor  # (S, N)


def fixed_sum(x: Tensor) -> Tensor:
    """Sum of all elements in an order set by the size alone.

    `torch.sum` splits long inputs over the threads there are, so its last bits depend on their number. 0-d.
    """
    x = x.reshape(-1)
    while x.numel() > 1024:
        x = torch.nn.functional.pad(x, (0, -x.numel() % 1024)).view(-1, 1024).sum(dim=1)
    return x.sum()


@dataclass(frozen=True)
class Nce:
    """softplus(neg_lse − pos) over the positives, plus λ·mean(s²) over all scores.

    Each positive is its own classification problem against the row's negatives; `softplus(neg_lse − pos)` is
    −log(e^pos / (e^pos + Σ_neg e^t)) without the cancellation, and its gradient in the positive is −σ(neg_lse − pos),
    never p − 1.
    """

    penalty: float = 0.0
    reduction: str = "mean"

    @property
    def code(self) -> str:
        """The tail as one string, e.g. `nce(0.04,mean)`; `parse` reads it back."""
        return f"nce({self.penalty!r},{self.reduction})"

    def values(self, spec: Spec, pos: Tensor, rows: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, nce, penalty): scalars, but nce is (N, P) under `reduction="none"`. m is the number of columns."""
        n = pos.shape[0]
        elements = softplus(rows[spec.stats.index("neg_lse")][:, None] - pos)
        total = fixed_sum(elements)
        mean = total / elements.numel()
        # λ = 0 leaves the penalty out rather than multiply: 0·inf would turn a finite loss into NaN.
        square = fixed_sum(rows[spec.stats.index("square")]) if self.penalty else torch.zeros_like(total)
        penalty = square * (self.penalty / (n * m))
        nce = {"mean": mean, "sum": total, "none": elements}[self.reduction]
        return (total if self.reduction == "sum" else mean) + penalty, nce, penalty

    def unit(self, n_elements: int) -> float:
        """d loss / d element of nce: what an upstream gradient of 1 on the loss puts on each positive."""
        return 1.0 if self.reduction == "sum" else 1.0 / n_elements

    def coefficients(
        self,
        spec: Spec,
        pos: Tensor,  # (N, P)
        rows: Tensor,  # (S, N)
        d_element: Tensor | float,  # dL/d softplus(neg_lse - pos), broadcasts to (N, P)
        d_penalty: Tensor | float,  # dL/d penalty, 0-d
        n_scores: int,  # N·M of the whole problem, whatever part of its rows is given here
    ) -> Coefficients:
        """dL/d pos and dL/d rows."""
        q = torch.sigmoid(rows[spec.stats.index("neg_lse")][:, None] - pos) * d_element
        d_rows = torch.zeros_like(rows)
        d_rows[spec.stats.index("neg_lse")] = q.sum(dim=1)
        if self.penalty:
            d_rows[spec.stats.index("square")] = d_penalty * (self.penalty / n_scores)
        return Coefficients(-q, d_rows)

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, m: int) -> Tensor:
        """(len(REPORT),) numbers for logging.

        `mi_bound` is log n_k − mean softplus(neg_lse − log n_c − pos): a valid lower bound on the mutual information in
        nats, by Jensen over the n_k images. `chance − nce` is not one: its negatives come n_c correlated ones an image.
        """
        n_c = spec.layout.n_c
        n_k = m // n_c
        lse = rows[spec.stats.index("neg_lse")]
        n = pos.numel()
        nce = fixed_sum(softplus(lse[:, None] - pos)) / n
        bound = math.log(n_k) - fixed_sum(softplus(lse[:, None] - math.log(n_c) - pos)) / n
        top1 = fixed_sum((pos > rows[spec.stats.index("neg_max")][:, None]).to(pos.dtype)) / n
        chance = math.log1p((n_k - 1) * n_c)
        return torch.stack([top1, fixed_sum(pos) / n, fixed_sum(lse) / lse.numel(), nce - chance, bound])


@lru_cache(maxsize=256)
def parse(code: str) -> Nce:
    """The tail that `Nce.code` wrote."""
    penalty, reduction = code.removeprefix("nce(").removesuffix(")").split(",")
    return Nce(float(penalty), reduction)
