"""The members of a `Backend` that it hands on where it has nothing of its own: a loss' end in plain torch, its plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_nce.core import atoms
from fused_nce.core.cost import Call, Tiles
from fused_nce.core.problem import Problem, Statistics, Summary
from fused_nce.core.spec import Spec
from fused_nce.core.tails import Coefficients, Tail


def slopes(
    problem: Problem, tail: Tail, found: Statistics, d_element: Tensor | float, d_penalty: Tensor | float
) -> Coefficients:
    """dL/d statistic from dL/d element and dL/d penalty; a column's is summed over its positives in a fixed order."""
    p, at = problem, atoms.at_positives(problem, found.columns)
    d = tail.coefficients(p.spec, found.pos, found.rows, at, d_element, d_penalty, p.n * p.n_columns)
    if d.d_columns is None:
        return d
    index = atoms.positive_columns(p, range(p.n)).reshape(-1)
    stat = torch.arange(d.d_columns.shape[0], device=index.device)[:, None]
    total = d.d_columns.new_zeros(d.d_columns.shape[0], p.m)
    return d._replace(d_columns=total.index_put((stat, index), d.d_columns.flatten(1), accumulate=True))


def summary(
    problems: Sequence[Problem], tail_of: Sequence[Tail], found: Sequence[Statistics], report_groups: Sequence[int]
) -> Summary:
    """The sum of the tails' (loss, nce, penalty), and their reports one below the other."""
    values, lines = [], []
    for p, tail, each, count in zip(problems, tail_of, found, report_groups, strict=True):
        at = (p.spec, each.pos, each.rows, atoms.at_positives(p, each.columns))
        values.append(tail.values(*at, p.n_columns))
        lines.append(tail.reports(*at, p.n_columns, count))
    if len(values) == 1:
        return Summary(*values[0], lines[0])
    loss, nce, penalty = (torch.stack(each).sum() for each in zip(*values, strict=True))
    return Summary(loss, nce, penalty, torch.cat(lines))


def mirrored(spec: Spec, tail: Tail, offset: int) -> bool:
    """No score counts twice."""
    return False


def tiles(spec: Spec, call: Call, n: int, m: int, d: int, dtype: torch.dtype) -> Tiles:
    """A strip of scores is held for all that is made of it."""
    return call.strip_tiles()


def ways(spec: Spec, q: Tensor, k: Tensor, shared: bool) -> tuple[bool, int]:
    """Statistics of both sides come at once, and no weight is stored."""
    return True, 0
