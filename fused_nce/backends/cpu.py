"""The C++ kernels of `csrc/cpu`: tiles of scores that stay in the cache, float32, bfloat16 and float16.

Inputs are used in place where the elements of a row are adjacent; any other layout is copied first, beyond the
workspace. Gradients leave in float32, or dk in bfloat16 where the inputs are and one strip of rows finishes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fused_nce import _extension
from fused_nce.backends import kernel_prefixes
from fused_nce.backends.kernel_prefixes import Kernels
from fused_nce.core import defaults, workspace
from fused_nce.core.cost import Call, Tiles
from fused_nce.core.defaults import ways  # noqa: F401  (handed on)
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics, Summary
from fused_nce.core.spec import KERNEL_ATOMS, Bias, Block, Index, Labels, Several, Spec
from fused_nce.core.statistics import KERNEL_STATISTICS
from fused_nce.core.tails import KERNEL_TAILS, Coefficients, LogIn, LogOut, Nce, Tail

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH_WAYS = True  # `loss` finds the statistics of columns too
ATOMS = KERNEL_ATOMS
losses = gathered_scores = gathered_grads = None


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Needs the built extension, CPU tensors of 16 or 32 bits, and room for the smallest plan."""
    module, reason = _extension.status()
    if module is None:
        return reason
    if q.device.type != "cpu" or k.device.type != "cpu":
        return f"its kernels run on the CPU, not on {q.device}"
    if q.dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if spec.columns and spec.marked:
        return "its kernels leave no column of a row out beside statistics of columns"
    if spec.columns and spec.hardness:
        return "its kernels have no hardness beside statistics of columns"
    if spec.prefixes:
        needed = _prefix_bytes(module, spec, q.shape[0], k.shape[0], q.shape[1], workspace.limit_bytes("cpu"))
        return kernel_prefixes.why_not(spec, needed, workspace.limit_bytes("cpu"))
    # fault: cpu-plan-forgets
    return _no_room(module, spec, q.shape[0], k.shape[0], q.shape[1], q.dtype, workspace.limit_bytes("cpu"), k is q)


@lru_cache(maxsize=256)
def _no_room(
    module: ModuleType, spec: Spec, n: int, m: int, d: int, dtype: torch.dtype, limit: int, shared: bool
) -> str | None:
    for plan in _plans(module, spec, n, m, d, dtype, limit, shared=shared):
        if not plan["fits"]:
            return f"the workspace of {limit} bytes is below the {plan['total_bytes']} of its smallest plan"
    return None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """The plan of `csrc/cpu/plan.h`, for the dearest of the operations and of the two 16-bit types."""
    module, reason = _extension.status()
    if module is None:
        raise RuntimeError(reason)
    dtypes = [dtype for dtype in DTYPES if dtype.itemsize == dtype_bytes]
    if not dtypes:
        raise ValueError(f"dtype: got one of {dtype_bytes} bytes, need float32, bfloat16 or float16 for 'cpu'")
    if spec.prefixes:
        wide = 4 * d * (n + m) if dtype_bytes < 4 else 0
        needed = _prefix_bytes(module, spec, n, m, d, limit_bytes)
        return needed and wide + needed + kernel_prefixes.beside(spec, n, m)
    shared = spec.drop_self
    plans = [plan for dtype in dtypes for plan in _plans(module, spec, n, m, d, dtype, limit_bytes, shared=shared)]
    return max(int(plan["total_bytes"]) for plan in plans)


def mirrored(spec: Spec, tail: Tail, offset: int) -> bool:
    """Whether a tile of scores, of one matrix in both roles, counts for its rows and its columns.

    As `is_symmetric` and `has_sides` in `csrc/cpu/work.cpp` have it; labels count as those of both roles.
    """
    layout = spec.layout
    pairs = isinstance(layout, Block) and layout.n_c == layout.rows_per_image
    sides = type(tail) in (Nce, LogOut, LogIn) and "neg_softplus" not in spec.stats and not spec.columns
    return sides and offset == 0 and not (spec.prefixes or spec.hardness) and (pairs or isinstance(layout, Labels))


def tiles(spec: Spec, call: Call, n: int, m: int, d: int, dtype: torch.dtype) -> Tiles:
    """What a call computes by the plan of `csrc/cpu/plan.h`."""
    module, _ = _extension.status()
    if module is None or spec.prefixes:
        return call.tiles(kept=False)
    plan = module.plan(
        n,
        m,
        d,
        dtype,
        _limit(),
        statistics=call.op != "grads",
        need_q=call.q and call.op != "stats",
        need_k=(call.q if call.shared else call.k) and call.op != "stats",
        symmetric=call.symmetric,
        **_plan_options(spec, call.shared),
    )
    return Tiles(*plan["shares"])


def stats(problem: Problem) -> Statistics:
    """One score GEMM, tile by tile."""
    if problem.spec.prefixes:
        return kernel_prefixes.stats(problem, _prefix_kernels(problem))
    pos, rows, columns = torch.ops.fused_nce.cpu_stats(*_arguments(problem), _limit(), problem.spec.hardness)
    return Statistics(pos, rows, columns if problem.spec.columns else None)


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The scores again, and one GEMM a gradient."""
    if problem.spec.prefixes:
        return kernel_prefixes.grads(problem, statistics, coefficients, needs, _prefix_kernels(problem))
    none = statistics.rows.new_empty(0, problem.m)
    given = (
        x if x is not None else none
        for x in (*statistics[:2], statistics.columns, *coefficients[:2], coefficients.d_columns)
    )
    on = (*given, *needs, _limit(), problem.spec.hardness, problem.blocks > 1)
    found = torch.ops.fused_nce.cpu_grads(*_arguments(problem), *on)
    return _gradients(problem, found)


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """One sweep: one score GEMM, and one a gradient. A tail that the kernels do not know costs the scores twice.

    Where every weight needs a row's statistics and a column's, all of them come first: scores that the workspace does
    not hold until then are computed twice. Symmetric scores, of one matrix in both roles, take half of it all.
    """
    spec = problem.spec
    if spec.prefixes:
        return kernel_prefixes.loss(problem, tail, needs, _prefix_kernels(problem))
    unit, n_scores = tail.unit(problem.n * tail.per_row(spec)), problem.n * problem.m
    if type(tail) not in KERNEL_TAILS:
        found = stats(problem)
        d = tail.coefficients(spec, found.pos, found.rows, None, unit, 1.0, n_scores)
        return found, grads(problem, found, d, needs)
    pos, rows, *gradients, columns = torch.ops.fused_nce.cpu_loss(
        *_arguments(problem), tail.NAME, unit, tail.penalty / n_scores, *needs, _limit(), spec.hardness
    )
    known = Statistics(pos, rows, columns if spec.columns else None)
    return known, _gradients(problem, gradients)


def slopes(
    problem: Problem, tail: Tail, found: Statistics, d_element: Tensor | float, d_penalty: Tensor | float
) -> Coefficients:
    """As `defaults.slopes`, in one pass over the rows."""
    form, d = form_of(problem.spec, tail), torch.as_tensor(d_element)
    if form is None or problem.blocks > 1:
        return defaults.slopes(problem, tail, found, d_element, d_penalty)
    d_pos, d_rows, d_columns = _module().slopes(form, *_finished(problem, found), d, float(d_penalty))
    return Coefficients(d_pos, d_rows, d_columns if problem.spec.columns else None)


def summary(
    problems: Sequence[Problem], tail_of: Sequence[Tail], found: Sequence[Statistics], report_groups: Sequence[int]
) -> Summary:
    """As `defaults.summary`, in one pass over the rows."""
    form = form_of(problems[0].spec, tail_of[0])
    if form is None or len(problems) > 1 or problems[0].blocks > 1:
        return defaults.summary(problems, tail_of, found, report_groups)
    return Summary(*_module().summary(form, *_finished(problems[0], found[0]), report_groups[0]))


def whole_loss(
    spec: Spec,
    tail: Tail,
    leaves: tuple[Tensor | None, ...],
    scale: float,
    offset: int,
    normalize: bool,
    parts: bool,
    report_groups: int,
    twins: bool = False,
) -> tuple[Any, ...] | None:
    """`csrc/loss.cpp`, which has a node of its own in the graph."""
    module = _extension.status()[0]
    form = None if module is None or twins else form_of(spec, tail)
    if module is None or form is None:
        return None
    found: tuple[Any, ...] | None = module.loss(form, *leaves, scale, offset, normalize, parts, report_groups)
    return found


@lru_cache(maxsize=256)
def form_of(spec: Spec, tail: Tail) -> Any:
    """Both as the kernels know them; None for what they do not know."""
    prefixed = isinstance(tail, Prefixed)  # fault: whole-prefixes-unserved
    if not (prefixed or type(tail) in KERNEL_TAILS) or not spec.atoms <= ATOMS or isinstance(spec.layout, Several):
        return None
    if prefixed and kernel_prefixes.why_not(spec, 1, 1):
        return None
    if spec.columns and spec.hardness:
        return None
    block = spec.layout if isinstance(spec.layout, Block) else Block()
    return _module().Form(
        layout=spec.layout.NAME,
        n_c=block.n_c,
        rows_per_image=block.rows_per_image,
        positives=spec.n_pos,
        drop_self=spec.drop_self,
        biased=isinstance(spec.transform, Bias),
        clip=spec.clip or 0.0,
        hardness=spec.hardness,
        rows=_numbers(spec.stats),
        columns=_numbers(spec.columns),
        tail=Nce.NAME if prefixed else tail.NAME,
        penalty=tail.penalty,
        weight=tail.weight,
        reduction=tail.reduction,
        report=tail.REPORT,
        code=spec.code,
        widths=spec.prefixes,
        weights=tail.weights if isinstance(tail, Prefixed) else (),
    )


def _module() -> ModuleType:
    """The extension, of a call that has found it."""
    module, reason = _extension.status()
    if module is None:
        raise RuntimeError(reason)
    return module


def _numbers(names: Sequence[str]) -> list[int]:
    return [KERNEL_STATISTICS.index(name) for name in names]


def _finished(problem: Problem, found: Statistics) -> tuple[Any, ...]:
    row_ids = problem.row_ids if isinstance(problem.spec.layout, Index) else None
    columns = found.rows.new_empty(0, problem.m) if found.columns is None else found.columns
    return problem.m, problem.offset, row_ids, found.pos, found.rows, columns


def _arguments(problem: Problem) -> tuple[Any, ...]:
    spec, layout = problem.spec, problem.spec.layout
    block = (layout.n_c, layout.rows_per_image, problem.offset) if isinstance(layout, Block) else (1, 1, 0)
    scores = problem.q, problem.k, float(problem.scale), *block, spec.clip or 0.0
    row_ids = problem.row_ids if isinstance(layout, (Index, Labels)) else None
    column_ids = problem.column_ids if isinstance(layout, Labels) else None
    itself = problem.offset * block[0] if spec.drop_self else -1
    names = (_numbers(of) for of in (spec.stats, spec.columns))
    bias = float(problem.bias) if isinstance(spec.transform, Bias) else 0.0
    return *scores, row_ids, itself, problem.positives, column_ids, bias, *problem.marks, *names


def _prefix_kernels(problem: Problem) -> Kernels:
    op = torch.ops.fused_nce.cpu_prefixes
    last = _limit(), problem.spec.hardness
    norms = _inverse_norms, _less_norms
    return Kernels(op, _arguments(problem)[2:], problem.spec.stats, (torch.float32,), last, *norms)


def _inverse_norms(spec: Spec, x: Tensor) -> Tensor:
    found: Tensor = _module().prefix_norms(x, spec.prefixes)
    return found


def _less_norms(spec: Spec, dx: Tensor, x: Tensor, norms: Tensor, sums: Tensor) -> None:
    _module().less_prefix_norms(dx, x, norms, sums, spec.prefixes)


def _prefix_bytes(module: ModuleType, spec: Spec, n: int, m: int, d: int, limit: int) -> int:
    """The larger of both plans; 0 where one does not fit."""
    sizes, filters = (n, m, d, max(1, spec.n_pos), spec.n_widths), (bool(spec.filters), "guide" in spec.filters)
    plans = [module.prefix_workspace_bytes(*sizes, both, True, *filters, limit) for both in (True, False)]
    return max(plans) if all(plans) else 0


def _gradients(problem: Problem, found: Sequence[Tensor]) -> Gradients:
    dq, dk, dscale, dbias = found
    return Gradients(dq, dk, dscale, dbias if isinstance(problem.spec.transform, Bias) else None)


def _limit() -> int:
    return workspace.limit_bytes("cpu")


def _plans(
    module: ModuleType, spec: Spec, n: int, m: int, d: int, dtype: torch.dtype, limit_bytes: int, *, shared: bool
) -> list[dict[str, Any]]:
    """Of `loss`, `stats` and `grads`."""
    options = _plan_options(spec, shared)
    return [
        module.plan(n, m, d, dtype, limit_bytes, statistics=statistics, need_q=gradients, need_k=gradients, **options)
        for statistics, gradients in ((True, True), (True, False), (False, True))
    ]


def _plan_options(spec: Spec, shared: bool) -> dict[str, Any]:
    return {
        "image": spec.layout.n_c if isinstance(spec.layout, Block) else max(1, spec.n_pos),
        "shared": shared,
        "labels": isinstance(spec.layout, Labels),
        "marked": spec.marked,
        "guided": "guide" in spec.filters,
        "row_stats": _numbers(spec.stats),
        "column_stats": _numbers(spec.columns),
    }
