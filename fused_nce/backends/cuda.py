"""The chunk loop of `csrc/cuda`: cuBLAS GEMMs with float32 scores that stay in the GPU's L2, one kernel for the rows.

Best where D is large: the scores cross the L2, never the memory, and each is computed once (3 GEMMs) unless the columns
are too many for one strip (4 GEMMs). Inputs are used in place where the elements of a row are adjacent; any other
layout is copied first, beyond the workspace. Gradients leave in float32. Nothing waits for the GPU, so a call can be
captured in a CUDA graph.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_nce import _extension
from fused_nce.core import workspace
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import STATISTICS, Block, Identity, Spec, TanhClip
from fused_nce.core.tails import Coefficients, Nce, Tail

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("neg_lse", "neg_max", "square")  # in the order in which the kernels return them


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Needs the extension built with nvcc, tensors on an NVIDIA GPU, a dtype of 16 or 32 bits, and some workspace."""
    module, reason = _extension.status()
    if module is None:
        return reason
    if q.device.type != "cuda" or k.device.type != "cuda":
        gpu = "" if torch.cuda.is_available() else ", and torch finds no GPU here"
        return f"its kernels run on NVIDIA GPUs, not on {q.device}{gpu}"
    if not module.build_info()["cuda"]:
        return f"the kernels were built without nvcc; with it at hand: FUSED_NCE_BUILD=cpu,cuda {_command()}"
    return _unable(module, spec, q, k)


def _command() -> str:
    return _extension.rebuild_command()


def _unable(module: ModuleType, spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """What neither its kernels nor the CPU that plays a GPU in the tests can do."""
    if not isinstance(spec.layout, Block) or not isinstance(spec.transform, (Identity, TanhClip)):
        return f"its kernels know block layouts, with or without a clip, not {spec.code}"
    unknown = [name for name in spec.stats if name not in NAMES]
    if unknown:
        return f"its kernels know the statistics {', '.join(NAMES)}, not {', '.join(unknown)}"
    if q.dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    limit = workspace.limit_bytes(q.device.type)
    needed = _total_bytes(module, spec, q.shape[0], k.shape[0], q.shape[1], q.element_size(), limit)
    return f"the workspace of {limit} bytes is below the {needed} of its smallest plan" if needed > limit else None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """The plan of `csrc/cuda/plan.h`; cuBLAS' own workspace, which torch keeps for the process, is not in it."""
    module, reason = _extension.status()
    if module is None:
        raise RuntimeError(reason)
    return _total_bytes(module, spec, n, m, d, dtype_bytes, limit_bytes)


def stats(problem: Problem) -> Statistics:
    """One score GEMM, strip by strip."""
    pos, rows = torch.ops.fused_nce.cuda_stats(*_arguments(problem), _limit(problem))
    return Statistics(pos, _wanted(problem.spec, rows))


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The scores again, and one GEMM a gradient."""
    names, zeros = problem.spec.stats, torch.zeros_like(statistics.rows[0])

    def row(of: Tensor, name: str, absent: Tensor) -> Tensor:
        return of[names.index(name)] if name in names else absent

    d_pos, d_neg_lse, d_square = (
        coefficients.d_pos,
        row(coefficients.d_rows, "neg_lse", zeros),
        row(coefficients.d_rows, "square", zeros),
    )
    # Without neg_lse among the statistics no negative has a weight, as in a row that has no negatives.
    neg_lse = row(statistics.rows, "neg_lse", zeros - float("inf"))
    factor = None
    if problem.q.dtype == torch.float16:
        # The weights enter the GEMMs as float16: coefficients of any size are brought to at most 1, on the device.
        factor = _power_of_two(d_pos, d_neg_lse, d_square, row(statistics.rows, "square", zeros))
        d_pos, d_neg_lse, d_square = d_pos * factor, d_neg_lse * factor, d_square * factor
    found = torch.ops.fused_nce.cuda_grads(
        *_arguments(problem), statistics.pos, neg_lse, d_pos, d_neg_lse, d_square, *needs, _limit(problem)
    )
    return Gradients(*(found if factor is None else (x.div_(factor) for x in found)))


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """One sweep: one score GEMM, and one a gradient."""
    nce_weight = tail.unit(problem.n * problem.spec.block.n_c)
    square_weight = tail.penalty / (problem.n * problem.m)
    pos, rows, *gradients = torch.ops.fused_nce.cuda_loss(
        *_arguments(problem), nce_weight, square_weight, *needs, _limit(problem)
    )
    return Statistics(pos, _wanted(problem.spec, rows)), Gradients(*gradients)


def summary(problem: Problem, tail: Tail, found: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The tail's (loss, nce, penalty, report) in one or two launches, where torch's own operations take forty.

    None for a tail that it does not know.
    """
    plain = tail.weight == 1 or tail.reduction != "none"
    if type(tail) is not Nce or not plain or problem.spec.stats != STATISTICS:
        return None
    loss, nce, penalty, report = torch.ops.fused_nce.cuda_summary(
        found.pos, found.rows, problem.m, tail.penalty, tail.reduction != "sum", tail.reduction == "none"
    )
    if tail.weight != 1:
        nce = nce * tail.weight
        loss = nce + penalty
    return loss, nce, penalty, report


def _power_of_two(d_pos: Tensor, d_neg_lse: Tensor, d_square: Tensor, square: Tensor) -> Tensor:
    """0-d: what brings every weight to at most 1. A weight of the square is 2·d_square·s, and |s| ≤ √square."""
    sizes = [d_pos.abs().amax(), d_neg_lse.abs().amax(), (2 * d_square.abs() * square.sqrt()).amax()]
    peak = torch.stack(sizes).amax()
    exponent = torch.frexp(peak).exponent.clamp(-100, 100)
    # A peak of 0 needs no factor, and one that is not finite must come out as it is.
    return torch.where(peak.isfinite() & (peak > 0), torch.ldexp(torch.ones_like(peak), -exponent), 1.0)


def _arguments(problem: Problem) -> tuple[Any, ...]:
    layout, scale = problem.spec.block, problem.scale
    factors = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    return problem.q, problem.k, *factors, layout.n_c, layout.rows_per_image, problem.offset, problem.spec.clip or 0.0


def _limit(problem: Problem) -> int:
    return workspace.limit_bytes(problem.q.device.type)


def _wanted(spec: Spec, rows: Tensor) -> Tensor:
    """(S, N) in the spec's order."""
    return rows if spec.stats == NAMES else torch.stack([rows[NAMES.index(name)] for name in spec.stats])


def _total_bytes(module: ModuleType, spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """The dearest of the three operations: `grads` has no statistics to hold, `stats` no weights."""
    return max(
        int(
            module.cuda_plan(n, m, d, spec.block.n_c, dtype_bytes, limit_bytes, statistics=s, gradients=g)[
                "total_bytes"
            ]
        )
        for s, g in ((True, True), (True, False), (False, True))
    )
