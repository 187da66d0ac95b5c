"""Prefixes of one pair of operands (Matryoshka, Kusupati et al. 2022, arXiv:2205.13147): a problem of each width.

The rows of a width are the operands' first columns, normalised anew. Scores of the next width are those of this one and
the product of the columns between, so all of them cost one product of the full width; and the gradient of a block of
columns is one product with the sum of the weights of the widths that contain it. What is linear in unnormalised dot
products is theirs; the norms' own part of a gradient is one number a row and width: with ρ = 1/‖q‖ and r the cosine,

    d L / d q  =  ρ·Σ_j scale·w_ij·k̂_j  −  ρ²·(scale·Σ_j w_ij r_ij)·q
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_nce.core.problem import Problem, Statistics
from fused_nce.core.spec import Spec
from fused_nce.core.tails import TAILS, Coefficients, Nce, Tail

EPS = 1e-12  # below, a norm counts as this, as in `torch.nn.functional.normalize`


def blocks(spec: Spec) -> list[slice]:
    """The columns that each prefix adds to the one before."""
    return [slice(a, b) for a, b in zip((0, *spec.prefixes), spec.prefixes, strict=False)]


def inverse_norms(spec: Spec, x: Tensor) -> Tensor:
    """(K, N) ρ of each prefix of (N, D) rows, in the accumulation dtype; NaN where the norm's square is beyond it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = torch.stack([wide[:, block].square().sum(dim=1) for block in blocks(spec)])
    norms = squares.cumsum(dim=0).sqrt().clamp(min=EPS)
    return 1 / norms + 0 * norms  # 0 would be a cosine like any other  # fault: prefix-norm-overflows


def problems(problem: Problem) -> list[Problem]:
    """Each prefix as a problem of its own, differentiable in the operands."""
    p, spec = problem, problem.spec
    wide = torch.promote_types(p.q.dtype, torch.float32)

    def cut(x: Tensor, width: int) -> Tensor:
        rows = x[:, :width].to(wide)
        unit = torch.nn.functional.normalize(rows, dim=1, eps=EPS)
        return unit + 0 * rows.detach().square().sum(dim=1, keepdim=True)  # NaN, as of `inverse_norms`

    found = []
    for width, part in zip(spec.prefixes, without_operands(problem), strict=True):
        q = cut(p.q, width)
        found.append(part._replace(q=q, k=q if p.shared else cut(p.k, width)))
    return found


def without_operands(problem: Problem) -> list[Problem]:
    """What of each prefix is no operand: the positives and ceilings of its own."""
    p, spec, count = problem, problem.spec, problem.spec.n_widths
    positives = [None] * count if p.positives is None else p.positives.unflatten(1, (count, -1)).unbind(1)
    ceilings = [None] * count if p.ceilings is None else p.ceilings.unflatten(0, (count, -1)).unbind(0)
    each = zip(positives, ceilings, strict=True)
    return [p._replace(spec=spec.one, positives=x, ceilings=y) for x, y in each]


def split(spec: Spec, pos: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each prefix (N, P) and (S, N), of statistics or of coefficients."""
    of_pos = pos.reshape(pos.shape[0], spec.n_widths, -1 if pos.numel() else 0).unbind(1)
    return list(zip(of_pos, rows.reshape(spec.n_widths, -1, rows.shape[1]).unbind(0), strict=True))


def joined(found: Sequence[tuple[Tensor, Tensor]]) -> Statistics:
    """(N, K·P) and (K·S, N)."""
    return Statistics(torch.cat([x for x, _ in found], dim=1), torch.cat([x for _, x in found]))


def less_norms(
    spec: Spec,
    dx: Tensor,  # (N, D), of unnormalised products
    x: Tensor,  # (N, D)
    norms: Tensor,  # (K, N) ρ
    sums: Tensor,  # (K, N) scale·Σ w·r
) -> None:
    """Subtract the norms' part of a gradient in place; columns beyond the widest prefix have none."""
    dx[:, spec.prefixes[-1] :] = 0.0
    share = (sums * norms.square()).masked_fill(norms >= 1 / EPS, 0.0)  # fault: prefix-norm-still
    for i, block in enumerate(blocks(spec)):  # those that contain the block
        dx[:, block].addcmul_(share[i:].sum(dim=0)[:, None], x[:, block].to(dx.dtype), value=-1)


@dataclass(frozen=True)
class Prefixed(Tail):
    """Σ weight·nce of the prefixes: a row's element is the weighted sum of its elements.

    Attributes:
        widths: of the spec.
        weights: one each.
    """

    widths: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    NAME = "prefixed"
    READS = Nce.READS
    REPORT = ()  # a line of an instance's own, below

    def __post_init__(self) -> None:
        names = tuple(f"{name}_{width}" for width in self.widths for name in Nce.REPORT)
        object.__setattr__(self, "REPORT", names)

    def _written(self) -> str:
        each = (f"{width}:{weight!r}" for width, weight in zip(self.widths, self.weights, strict=True))
        return f"{self.NAME}({','.join((repr(self.penalty), self.reduction, repr(self.weight), *each))})"

    @classmethod
    def read(cls, values: Sequence[str]) -> Tail:
        """What `code` wrote between its brackets."""
        penalty, reduction, weight, *each = values
        pairs = [pair.split(":") for pair in each]
        widths, weights = tuple(int(width) for width, _ in pairs), tuple(float(x) for _, x in pairs)
        return cls(float(penalty), reduction, float(weight), widths, weights)

    def per_row(self, spec: Spec) -> int:
        """P."""
        return spec.n_pos

    def elements(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """(N, P)."""
        each = zip(self.weights, split(spec, pos, rows), strict=True)
        # fault: prefix-weight-dropped
        return torch.stack([weight * Nce().elements(spec.one, *found, None) for weight, found in each]).sum(dim=0)

    def slopes(
        self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, d_element: Tensor | float
    ) -> Coefficients:
        """Of each prefix, by its weight."""
        each = zip(self.weights, split(spec, pos, rows), strict=True)
        found = [Nce().slopes(spec.one, *part, None, d_element * weight)[:2] for weight, part in each]
        return Coefficients(*joined(found)[:2])

    def report(self, spec: Spec, pos: Tensor, rows: Tensor, columns: Tensor | None, m: int) -> Tensor:
        """Of each prefix."""
        return torch.cat([Nce().report(spec.one, *found, None, m) for found in split(spec, pos, rows)])


TAILS[Prefixed.NAME] = Prefixed
