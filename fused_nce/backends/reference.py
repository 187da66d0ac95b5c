"""The oracle: every score at once, by the atoms' definitions. Any torch device and dtype; memory of several (N, M)."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fused_nce.backends import gathered
from fused_nce.core import atoms, prefixes
from fused_nce.core.defaults import mirrored, slopes, summary, tiles, ways  # noqa: F401  (handed on)
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import VOCABULARY, Bias, Separate, Spec
from fused_nce.core.statistics import Scores
from fused_nce.core.tails import Coefficients, Tail

BOTH_WAYS = False
ATOMS = VOCABULARY
losses = whole_loss = None
gathered_scores = partial(gathered.scores, limit_bytes=None)
gathered_grads = partial(gathered.grads, limit_bytes=None)


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Nothing is refused: this is the definition."""
    return None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """Not bounded: up to twelve (N, M) tensors are alive, and both inputs in the accumulation dtype."""
    wide = max(dtype_bytes, 4)
    return wide * (12 * n * m + (n + m) * d)


def stats(problem: Problem) -> Statistics:
    """Statistics of the whole score matrix."""
    if problem.spec.prefixes:
        return prefixes.joined([stats(part)[:2] for part in prefixes.problems(problem)])
    return _fold(problem, _scores(problem).x)


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """Gradients from finished statistics; the scores are computed again."""
    if problem.spec.prefixes:
        return _descend_prefixes(problem, statistics, coefficients, needs)
    return _descend(problem, _scores(problem), statistics, coefficients, needs)


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """Statistics, then gradients, from the same scores."""
    spec, unit = problem.spec, tail.unit(problem.n * tail.per_row(problem.spec))
    if spec.prefixes:
        found = stats(problem)
        return found, grads(problem, found, tail.slopes(spec, *found, unit), needs)
    scores = _scores(problem)
    found = _fold(problem, scores.x)
    coefficients = tail.coefficients(spec, *found, unit, 1.0, problem.n * problem.m)
    return found, _descend(problem, scores, found, coefficients, needs)


class _Problem(NamedTuple):
    """A problem and all its scores."""

    r: Tensor  # (N, M) raw scores at scale 1
    x: Scores


def _scores(problem: Problem) -> _Problem:
    wide, spec = torch.promote_types(problem.q.dtype, torch.float32), problem.spec
    q, k = problem.q.to(wide), problem.k.to(wide)
    r = q @ k.T
    if spec.distance:
        atoms.to_half_distances(r, q, k)
    s = problem.scale * r
    of = atoms.sets(problem, range(problem.n), range(problem.m), r)
    return _Problem(r, Scores(s, atoms.transformed(problem, s, r, of), of))


def _fold(problem: Problem, x: Scores) -> Statistics:
    spec = problem.spec
    pos = x.t.new_empty(problem.n, 0)
    if isinstance(spec.layout, Separate):
        pos = cast(Tensor, problem.positives)
    elif spec.n_pos:
        pos = x.t.gather(1, atoms.positive_columns(problem, range(problem.n)))
    rows, columns = (
        atoms.merge_tiles(names, [atoms.fold_tile(names, x, dim)]) if names else None
        for names, dim in ((spec.stats, 1), (spec.columns, 0))
    )
    return Statistics(pos, cast(Tensor, rows), columns)


def _descend(
    problem: Problem, scores: _Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs
) -> Gradients:
    """dL/dq = scale·W k, dL/dk = scale·Wᵀ q, dL/dscale = Σ W·r; of a distance, W k less ΣW·q, and Wᵀ q less ΣW·k."""
    spec, (r, x) = problem.spec, scores
    on_t, on_s = atoms.tile_weights(spec.stats, x, statistics.rows, coefficients.d_rows)
    if spec.columns:
        found, d = cast(Tensor, statistics.columns), cast(Tensor, coefficients.d_columns)
        across = atoms.tile_weights(spec.columns, x, found, d, dim=0)
        on_t, on_s = on_t + across[0], on_s + across[1]
    if spec.n_pos and not isinstance(spec.layout, Separate):
        on_t.scatter_add_(1, atoms.positive_columns(problem, range(problem.n)), coefficients.d_pos)
    w = on_t * atoms.transform_slope(spec.transform, x.t) + on_s  # fault: reference-clip-slope
    q, k = problem.q.to(w.dtype), problem.k.to(w.dtype)
    none = w.new_empty(0)
    both = w + w.T if problem.shared else w  # fault: reference-one-tensor
    dq = both @ k if needs.q else none
    dk = w.T @ q if needs.k and not problem.shared else none
    if spec.distance:
        if dq.numel():
            atoms.less_itself(dq, both, q, dim=1)  # fault: reference-distance-gradient
        if dk.numel():
            atoms.less_itself(dk, w, k, dim=0)
    return Gradients(
        problem.scale * dq,
        problem.scale * dk,
        (w * r).sum() if needs.scale else none,
        on_t.sum() if needs.scale and isinstance(spec.transform, Bias) else None,
    )


def _descend_prefixes(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The sum over the prefixes, each through the norms of its rows: dx = (dx̂ − ⟨dx̂, x̂⟩·x̂) / ‖x‖."""
    p, spec, wide = problem, problem.spec, statistics.rows.dtype
    none = statistics.rows.new_empty(0)
    total = {"q": p.q.new_zeros(p.q.shape, dtype=wide), "k": p.k.new_zeros(p.k.shape, dtype=wide)}
    norms = {"q": prefixes.inverse_norms(spec, p.q), "k": prefixes.inverse_norms(spec, p.k)}
    d_scale = p.q.new_zeros((), dtype=wide)
    given = (prefixes.split(spec, *x[:2]) for x in (statistics, coefficients))
    of = zip(prefixes.problems(p), *given, strict=True)
    for i, (part, found, d) in enumerate(of):
        out = grads(part, Statistics(*found), Coefficients(*d), needs)
        for name, x, dx in (("q", part.q, out.dq), ("k", part.k, out.dk)):
            if dx.numel():
                along = (dx * x).sum(dim=1, keepdim=True)
                total[name][:, : spec.prefixes[i]] += norms[name][i][:, None] * (dx - along * x)
        if needs.scale:
            d_scale += out.dscale
    dq, dk = total["q"] if needs.q else none, total["k"] if needs.k and not p.shared else none
    return Gradients(dq, dk, d_scale if needs.scale else none)
