"""The C++ kernels of `csrc/cpu`: tiles of scores that stay in the cache, float32, bfloat16 and float16.

Inputs are used in place where the elements of a row are adjacent; any other layout is copied first, beyond the
workspace. Gradients leave in float32, or dk in bfloat16 where the inputs are and one strip of rows finishes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_nce import _extension
from fused_nce.core import workspace
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import STATISTICS, Block, Index, Spec
from fused_nce.core.tails import Coefficients, Tail

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("neg_lse", "neg_max", "square")  # in the order in which the kernels return them
ATOMS = frozenset({"block", "index", "separate", "drop_self", "self", "identity", "tanh_clip", *STATISTICS})


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Needs the built extension, CPU tensors of 16 or 32 bits, and room for the smallest plan."""
    module, reason = _extension.status()
    if module is None:
        return reason
    if q.device.type != "cpu" or k.device.type != "cpu":
        return f"its kernels run on the CPU, not on {q.device}"
    if q.dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    limit = workspace.limit_bytes("cpu")
    plan = _plan(module, spec, q.shape[0], k.shape[0], q.shape[1], q.dtype, limit)
    if not plan["fits"]:
        return f"the workspace of {limit} bytes is below the {plan['total_bytes']} of its smallest plan"
    return None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """The plan of `csrc/cpu/plan.h`, for the dearer of the two 16-bit types."""
    module, reason = _extension.status()
    if module is None:
        raise RuntimeError(reason)
    dtypes = [dtype for dtype in DTYPES if dtype.itemsize == dtype_bytes]
    if not dtypes:
        raise ValueError(f"dtype: got one of {dtype_bytes} bytes, need float32, bfloat16 or float16 for 'cpu'")
    return max(int(_plan(module, spec, n, m, d, dtype, limit_bytes)["total_bytes"]) for dtype in dtypes)


def stats(problem: Problem) -> Statistics:
    """One score GEMM, tile by tile."""
    pos, *found = torch.ops.fused_nce.cpu_stats(*_arguments(problem), _limit())
    return Statistics(pos, _rows(problem.spec, found))


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The scores again, and one GEMM a gradient."""
    stats = problem.spec.stats
    zeros = torch.zeros_like(statistics.rows[0])
    d_rows = {
        name: coefficients.d_rows[stats.index(name)] if name in stats else zeros for name in ("neg_lse", "square")
    }
    # Without neg_lse among the statistics no negative has a weight, as in a row that has no negatives.
    neg_lse = statistics.rows[stats.index("neg_lse")] if "neg_lse" in stats else zeros - float("inf")
    return _gradients(
        problem,
        torch.ops.fused_nce.cpu_grads(
            *_arguments(problem),
            statistics.pos,
            neg_lse,
            coefficients.d_pos,
            d_rows["neg_lse"],
            d_rows["square"],
            *_needs(problem, needs),
            _limit(),
        ),
    )


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """One sweep: one score GEMM, and one a gradient."""
    spec = problem.spec
    nce_weight = tail.unit(problem.n * spec.n_pos)
    square_weight = tail.penalty / (problem.n * problem.m)
    pos, neg_lse, neg_max, square, *gradients = torch.ops.fused_nce.cpu_loss(
        *_arguments(problem), nce_weight, square_weight, *_needs(problem, needs), _limit()
    )
    return Statistics(pos, _rows(spec, [neg_lse, neg_max, square])), _gradients(problem, gradients)


def _arguments(problem: Problem) -> tuple[Any, ...]:
    layout = problem.spec.layout
    block = (layout.n_c, layout.rows_per_image, problem.offset) if isinstance(layout, Block) else (1, 1, 0)
    scores = problem.q, problem.k, float(problem.scale), *block, problem.spec.clip or 0.0
    row_ids = problem.row_ids if isinstance(layout, Index) else None
    itself = problem.offset * block[0] if problem.spec.drop_self else -1
    return *scores, row_ids, itself, problem.positives


def _needs(problem: Problem, needs: Needs) -> Needs:
    """Where k is q, its gradient as a key is part of q's."""
    return needs._replace(k=needs.q) if problem.shared else needs


def _gradients(problem: Problem, found: Sequence[Tensor]) -> Gradients:
    dq, dk, dscale = found
    if problem.shared and dk.numel():
        dq, dk = dq.add_(dk), dk.new_empty(0)
    return Gradients(dq, dk, dscale)


def _limit() -> int:
    return workspace.limit_bytes("cpu")


def _rows(spec: Spec, found: list[Tensor]) -> Tensor:
    """(S, N) in the spec's order."""
    return torch.stack([found[NAMES.index(name)] for name in spec.stats])


def _plan(
    module: ModuleType, spec: Spec, n: int, m: int, d: int, dtype: torch.dtype, limit_bytes: int
) -> dict[str, Any]:
    image = spec.layout.n_c if isinstance(spec.layout, Block) else max(1, spec.n_pos)
    plan: dict[str, Any] = module.plan(n, m, d, dtype, limit_bytes, image=image)
    return plan
