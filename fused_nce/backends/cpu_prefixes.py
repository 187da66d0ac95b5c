"""Prefixes on the C++ kernels (`csrc/cpu/prefixes.cpp`): float32, 16 bits widened first; a positive is a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_nce.core import prefixes, workspace
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import STATISTICS, Separate, Several, Spec
from fused_nce.core.tails import Coefficients, Tail

NO_NEEDS = Needs(False, False, False)


def why_not(module: Any, spec: Spec, n: int, m: int, d: int, limit: int) -> str | None:
    """Positives that are columns, the statistics that are folded at once, and a plan that fits."""
    if isinstance(spec.layout, (Separate, Several)) or not set(spec.stats) <= set(STATISTICS):
        return f"its prefixes have positives among the columns and {', '.join(STATISTICS)} alone"
    if not workspace_bytes(module, spec, n, m, d, limit):
        return f"the workspace of {limit} bytes is below that of the smallest plan of {spec.parts} prefixes"
    return None


def workspace_bytes(module: Any, spec: Spec, n: int, m: int, d: int, limit: int) -> int:
    """The larger of both plans, norms and their sums beside; 0 where one does not fit."""
    sizes, filters = (n, m, d, max(1, spec.n_pos), spec.parts), (bool(spec.filters), "guide" in spec.filters)
    plans = [module.prefix_workspace_bytes(*sizes, both, True, *filters, limit) for both in (True, False)]
    return max(plans) + 8 * spec.parts * (n + m) if all(plans) else 0


def stats(problem: Problem, arguments: tuple[Any, ...]) -> Statistics:
    """One score GEMM."""
    return _Call(problem, arguments).run((), 1.0, [], NO_NEEDS)[0]


def grads(
    problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs, arguments: tuple[Any, ...]
) -> Gradients:
    """The scores again, and one GEMM a gradient."""
    spec = problem.spec
    found = [x.contiguous() for pair in (statistics, coefficients) for x in _apart(spec, *pair[:2])]
    return _Call(problem, arguments).run((), 1.0, found, needs)[1]


def loss(problem: Problem, tail: Tail, needs: Needs, arguments: tuple[Any, ...]) -> tuple[Statistics, Gradients]:
    """One sweep."""
    if not isinstance(tail, Prefixed):
        found = stats(problem, arguments)
        d = tail.slopes(problem.spec, *found[:2], None, tail.unit(problem.n * tail.per_row(problem.spec)))
        return found, grads(problem, found, d, needs, arguments)
    return _Call(problem, arguments).run(tail.weights, tail.unit(problem.n * tail.per_row(problem.spec)), [], needs)


class _Call:
    """One call of the op, and what is linear in its operands before and after it."""

    def __init__(self, problem: Problem, arguments: tuple[Any, ...]) -> None:
        self.p, self.arguments = problem, arguments[2:]
        self.q = problem.q.float()
        self.k = self.q if problem.shared else problem.k.float()
        self.of_q = prefixes.inverse_norms(problem.spec, self.q)
        self.of_k = self.of_q if problem.shared else prefixes.inverse_norms(problem.spec, self.k)

    def run(
        self, weights: Sequence[float], unit: float, found: list[Tensor], needs: Needs
    ) -> tuple[Statistics, Gradients]:
        """(statistics, gradients)."""
        p, spec = self.p, self.p.spec
        need_k = needs.q if p.shared else needs.k
        given = self.of_q, self.of_k, spec.prefixes, weights, unit, found
        k = self.k.view_as(self.k) if p.shared else self.k  # the kernels take them for two
        pos, rows, dq, dk, row_sums, line_sums = torch.ops.fused_nce.cpu_prefixes(
            self.q, k, *self.arguments, *given, needs.q, need_k, any(needs), workspace.limit_bytes("cpu")
        )
        none = dq.new_empty(0)
        dscale = row_sums.sum() if needs.scale else none
        for dx, x, norms, sums in ((dq, self.q, self.of_q, row_sums), (dk, self.k, self.of_k, line_sums)):
            if dx.numel():
                dx[:, spec.prefixes[-1] :] = 0.0
                prefixes.less_norms(spec, dx, x, norms, sums * p.scale)
        if p.shared and needs.q:
            dq, dk = dq.add_(dk), none
        joined = Statistics(pos.transpose(0, 1).flatten(1), rows.flatten(0, 1))
        return joined, Gradients(dq, dk, dscale)


def _apart(spec: Spec, pos: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(K, N, P) and (K, S, N)."""
    each = prefixes.split(spec, pos, rows)
    return torch.stack([x for x, _ in each]), torch.stack([x for _, x in each])
