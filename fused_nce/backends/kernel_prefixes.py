"""Prefixes on the C++ kernels (`csrc/cpu/prefixes.cpp`, `csrc/cuda/prefixes.cpp`); a positive is a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_nce.core import prefixes
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import STATISTICS, Separate, Several, Spec
from fused_nce.core.tails import Coefficients, Tail

NO_NEEDS = Needs(False, False, False)


class Kernels(NamedTuple):
    """What of a call differs from backend to backend."""

    op: Callable[..., Any]
    arguments: tuple[Any, ...]  # after q and k
    names: tuple[str, ...]  # of the lines of its statistics
    dtypes: tuple[torch.dtype, ...]  # that it multiplies as they are; others are widened first
    last: tuple[int, float]  # the workspace's bytes and the hardness
    inverse_norms: Callable[[Spec, Tensor], Tensor] = prefixes.inverse_norms
    less_norms: Callable[[Spec, Tensor, Tensor, Tensor, Tensor], None] = prefixes.less_norms


def why_not(spec: Spec, needed: int, limit: int) -> str | None:
    """Positives that are columns, the statistics that are folded at once, a plan that fits; `needed` 0: none does."""
    if isinstance(spec.layout, (Separate, Several)) or not set(spec.stats) <= set(STATISTICS):
        return f"its prefixes have positives among the columns and {', '.join(STATISTICS)} alone"
    if not needed or needed > limit:
        return f"the workspace of {limit} bytes is below that of the smallest plan of {spec.n_widths} prefixes"
    return None


def beside(spec: Spec, n: int, m: int) -> int:
    """Bytes of norms and of their sums."""
    return 8 * spec.n_widths * (n + m)


def stats(problem: Problem, kernels: Kernels) -> Statistics:
    """One score GEMM."""
    return _Call(problem, kernels).run((), 1.0, [], NO_NEEDS)[0]


def grads(
    problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs, kernels: Kernels
) -> Gradients:
    """The scores again, and one GEMM a gradient."""
    spec = problem.spec
    found = [x.contiguous() for pair in (statistics, coefficients) for x in _apart(spec, *pair[:2])]
    if kernels.names != spec.stats:  # what has no statistic weighs nothing
        for place, neg_lse in ((1, float("-inf")), (3, 0.0)):
            lines = dict(zip(spec.stats, found[place].unbind(1), strict=True))
            none = torch.zeros_like(found[place][:, 0])
            lines = {"neg_lse": none + neg_lse} | lines
            found[place] = torch.stack([lines.get(name, none) for name in kernels.names], dim=1)
    return _Call(problem, kernels).run((), 1.0, found, needs)[1]


def loss(problem: Problem, tail: Tail, needs: Needs, kernels: Kernels) -> tuple[Statistics, Gradients]:
    """One sweep."""
    unit, weights = tail.unit(problem.n * tail.per_row(problem.spec)), cast(Prefixed, tail).weights
    return _Call(problem, kernels).run(weights, unit, [], needs)


class _Call:
    """One call of the op, and what is linear in its operands before and after it."""

    def __init__(self, problem: Problem, kernels: Kernels) -> None:
        self.p, self.kernels = problem, kernels
        q, k = (x if x.dtype in kernels.dtypes else x.float() for x in (problem.q, problem.k))
        self.q, self.k = q, q if problem.shared else k
        self.of_q = kernels.inverse_norms(problem.spec, self.q)
        self.of_k = self.of_q if problem.shared else kernels.inverse_norms(problem.spec, self.k)

    def run(
        self, weights: Sequence[float], unit: float, found: list[Tensor], needs: Needs
    ) -> tuple[Statistics, Gradients]:
        """(statistics, gradients)."""
        p, spec, kernels = self.p, self.p.spec, self.kernels
        need_k = needs.q if p.shared else needs.k
        given = self.of_q, self.of_k, spec.prefixes, weights, unit, found
        k = self.k.view_as(self.k) if p.shared else self.k  # the kernels take them for two
        pos, rows, dq, dk, row_sums, line_sums = kernels.op(
            self.q, k, *kernels.arguments, *given, needs.q, need_k, any(needs), *kernels.last
        )
        none = dq.new_empty(0)
        dscale = row_sums.sum() if needs.scale else none
        for dx, x, norms, sums in ((dq, self.q, self.of_q, row_sums), (dk, self.k, self.of_k, line_sums)):
            if dx.numel():
                kernels.less_norms(spec, dx, x, norms, sums * p.scale)
        if p.shared and needs.q:
            dq, dk = dq.add_(dk), none
        if kernels.names != spec.stats:
            rows = rows[:, [kernels.names.index(name) for name in spec.stats]]
        joined = Statistics(pos.transpose(0, 1).flatten(1), rows.flatten(0, 1))
        return joined, Gradients(dq, dk, dscale)


def _apart(spec: Spec, pos: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(K, N, P) and (K, S, N)."""
    each = prefixes.split(spec, pos, rows)
    return torch.stack([x for x, _ in each]), torch.stack([x for _, x in each])
