"""The oracle: every score at once, by the atoms' definitions. Any torch device and dtype; memory of several (N, M)."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce.core import atoms
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Spec
from fused_nce.core.tails import Coefficients, Nce


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Nothing is refused: this is the definition."""
    return None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """Not bounded: up to twelve (N, M) tensors are alive, and both inputs in the accumulation dtype."""
    wide = max(dtype_bytes, 4)
    return wide * (12 * n * m + (n + m) * d)


def stats(problem: Problem) -> Statistics:
    """Statistics of the whole score matrix."""
    return _fold(problem, *_scores(problem))


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """Gradients from finished statistics; the scores are computed again."""
    return _descend(problem, *_scores(problem), statistics, coefficients, needs)


def loss(problem: Problem, tail: Nce, needs: Needs) -> tuple[Statistics, Gradients]:
    """Statistics, then gradients, from the same scores."""
    scores = _scores(problem)
    found = _fold(problem, *scores)
    unit = tail.unit(found.pos.numel())
    coefficients = tail.coefficients(problem.spec, *found, unit, 1.0, problem.n * problem.m)
    return found, _descend(problem, *scores, found, coefficients, needs)


def _fold(problem: Problem, s: Tensor, t: Tensor, own: Tensor) -> Statistics:
    return Statistics(t[own].view(problem.n, -1), atoms.fold_tile(problem.spec, s, t, own))


def _descend(
    problem: Problem,
    s: Tensor,
    t: Tensor,
    own: Tensor,
    statistics: Statistics,
    coefficients: Coefficients,
    needs: Needs,
) -> Gradients:
    """dL/dq = scale·W k, dL/dk = scale·Wᵀ q, dL/dscale = Σ W·⟨q,k⟩."""
    w = atoms.tile_weights(problem.spec, s, t, own, statistics.rows, coefficients.d_rows)
    positive = torch.zeros_like(s).masked_scatter(own, coefficients.d_pos)
    w = w + positive * atoms.transform_slope(problem.spec.transform, t)
    q, k = problem.q.to(s.dtype), problem.k.to(s.dtype)
    none = s.new_empty(0)
    return Gradients(
        problem.scale * (w @ k) if needs.q else none,
        problem.scale * (w.T @ q) if needs.k else none,
        (w * (q @ k.T)).sum() if needs.scale else none,
    )


def _scores(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(s, t, own), each (N, M)."""
    wide = torch.promote_types(problem.q.dtype, torch.float32)
    s = problem.scale * (problem.q.to(wide) @ problem.k.to(wide).T)
    own = atoms.own_mask(problem.spec.layout, range(problem.n), range(problem.m), problem.offset, s.device)
    return s, atoms.transform_value(problem.spec.transform, s), own
