"""The chunk loop in plain torch: any device, any float dtype, no compiler.

A strip of rows holds a few score-sized buffers within the workspace: 3 GEMMs, no score computed twice. Where the
columns are so many that such a strip would be thinner than `MIN_STRIP_ROWS`, they are split into panels too; then the
statistics of all panels come first and the scores are computed again for the weights: 4 GEMMs, in the same workspace.
"""

from __future__ import annotations

import math

from torch import Tensor

from fused_nce.backends import gathered
from fused_nce.backends.prefixed import PrefixSweep
from fused_nce.backends.strips import Sweep, plan, score_buffers
from fused_nce.core import workspace
from fused_nce.core.defaults import mirrored, slopes, summary, tiles, ways  # noqa: F401  (handed on)
from fused_nce.core.problem import GatheredGradients, Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import VOCABULARY, Spec
from fused_nce.core.tails import Coefficients, Tail

BOTH_WAYS = False
ATOMS = VOCABULARY
losses = whole_loss = None


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Plain torch refuses nothing, but a row that may not be cut has to fit."""
    if spec.whole_rows:
        limit, wide = workspace.limit_bytes(q.device.type), max(q.dtype.itemsize, 4)
        needed = wide * (score_buffers(spec) * k.shape[0] + ((k.shape[0] + 1) * q.shape[1] if q.itemsize < 4 else 0))
        if needed > limit:
            return f"the workspace of {limit} bytes is below the {needed} of one row's {k.shape[0]} scores, sorted"
    return None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """A tile's buffers, the scaled strip of q, the panel of k in float32 when it is 16-bit, and O(N) statistics.

    Column statistics of the strips wait in pairs of pairs, log2 of their number at a time.
    """
    wide = max(dtype_bytes, 4)
    strip, panel = plan(spec, n, m, d, wide, dtype_bytes < 4, limit_bytes)
    cast = (strip + panel) * d if dtype_bytes < 4 else 0
    waiting = len(spec.columns) * m * (2 + math.ceil(math.log2(-(-n // strip)))) if spec.columns else 0
    norms = 2 * spec.n_widths * (n + m) if spec.prefixes else 0  # and what they add to the gradients
    return wide * (score_buffers(spec) * strip * panel + strip * d + cast + waiting + 8 * spec.n_widths * n + norms)


def stats(problem: Problem) -> Statistics:
    """Statistics, strip by strip."""
    return _sweep(problem).statistics()


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """Gradients from finished statistics; the scores are computed again."""
    return _sweep(problem).gradients(needs, statistics, coefficients)


def gathered_scores(q: Tensor, k: Tensor, indices: Tensor) -> Tensor:
    """Of the rows that a block of the workspace's size takes, one after the other."""
    return gathered.scores(q, k, indices, workspace.limit_bytes(q.device.type))


def gathered_grads(
    q: Tensor, k: Tensor, indices: Tensor, d: Tensor, need_q: bool, need_k: bool, need_scale: bool
) -> GatheredGradients:
    """The same blocks."""
    return gathered.grads(q, k, indices, d, need_q, need_k, need_scale, workspace.limit_bytes(q.device.type))


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """Both, each strip's scores used for its statistics and then, in place, for its gradients."""
    sweep = _sweep(problem)
    if not any(needs):
        return sweep.statistics(), Gradients(sweep.empty, sweep.empty, sweep.empty)
    return sweep.run(tail, needs)


def _sweep(problem: Problem) -> Sweep:
    return PrefixSweep(problem) if problem.spec.prefixes else Sweep(problem)
