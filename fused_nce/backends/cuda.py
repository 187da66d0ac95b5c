"""The chunk loop of `csrc/cuda`: cuBLAS GEMMs with float32 scores that stay in the GPU's L2, one kernel for the rows.

Best where D is large: the scores cross the L2, never the memory, and each is computed once (3 GEMMs) unless the columns
are too many for one strip, or have statistics of their own (4 GEMMs). Inputs are used in place where the elements of a
row are adjacent; any other layout is copied first, beyond the workspace. Gradients leave in float32, or in bfloat16
where the inputs are and one GEMM finishes them. Nothing waits for the GPU, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from fused_nce import _extension
from fused_nce.backends import cpu, kernel_prefixes
from fused_nce.backends.kernel_prefixes import Kernels
from fused_nce.core import defaults, workspace
from fused_nce.core.defaults import mirrored, slopes, tiles, ways  # noqa: F401  (handed on)
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics, Summary
from fused_nce.core.spec import KERNEL_ATOMS, Bias, Block, Index, Labels, Separate, Spec
from fused_nce.core.statistics import KERNEL_STATISTICS
from fused_nce.core.tails import KERNEL_TAILS, Coefficients, Nce, Tail

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = KERNEL_STATISTICS[:3]  # of rows and of columns
OPTIONAL_ROW_STATISTICS = KERNEL_STATISTICS[3:]  # of rows; a second kernel computes them if the spec asks for one
BOTH_WAYS = False
ATOMS = KERNEL_ATOMS
gathered_scores = gathered_grads = None


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Needs the extension built with nvcc, tensors on an NVIDIA GPU, a dtype of 16 or 32 bits, and some workspace."""
    module, reason = _extension.status()
    if module is None:
        return reason
    if q.device.type != "cuda" or k.device.type != "cuda":
        gpu = "" if torch.cuda.is_available() else ", and torch finds no GPU here"
        return f"its kernels run on NVIDIA GPUs, not on {q.device}{gpu}"
    built = module.build_info()
    if not built["cuda"]:
        return f"the kernels were built without nvcc; with it at hand: FUSED_NCE_BUILD=cpu,cuda {_command()}"
    capability = torch.cuda.get_device_capability(q.device)
    if not _runs_on(capability, built["cuda_architectures"]):
        return (
            f"the kernels were built for {built['cuda_architectures']}, which this GPU, sm_{capability[0]}"
            f"{capability[1]}, cannot run; for it: FUSED_NCE_BUILD=cpu,cuda {_command()}"
        )
    return _unable(module, spec, q, k)


@lru_cache(maxsize=64)
def _runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a GPU runs code for `sm_80,sm_90,compute_90`.

    Machine code runs on later minor versions of its major one; PTX is compiled by the driver for any later GPU; code
    with a letter, such as sm_90a, runs on that very version alone.
    """
    for kind, major, minor, exact in re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", architectures):
        version = (int(major), int(minor))
        if version == capability:
            return True
        if not exact and version < capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return False


def _command() -> str:
    return _extension.rebuild_command()


def _unable(module: ModuleType, spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """What neither its kernels nor the CPU emulation of the tests can do."""
    if q.dtype not in DTYPES:
        return f"its kernels take float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if spec.columns and spec.marked:
        return "its kernels leave no column of a row out beside statistics of columns"
    if spec.columns and spec.hardness:
        return "its kernels have no hardness beside statistics of columns"
    missing = [name for name in spec.columns if name not in NAMES]
    if missing:
        return f"it has no {', '.join(missing)} of columns"
    limit = workspace.limit_bytes(q.device.type)
    if spec.prefixes:
        needed = _prefix_bytes(module, spec, q.shape[0], k.shape[0], q.element_size(), limit)
        return kernel_prefixes.why_not(spec, needed, limit)
    needed = _total_bytes(module, spec, q.shape[0], k.shape[0], q.shape[1], q.element_size(), limit)
    return f"the workspace of {limit} bytes is below the {needed} of its smallest plan" if needed > limit else None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """The plan of `csrc/cuda/plan.h`; cuBLAS' own workspace, which torch keeps for the process, is not in it."""
    module, reason = _extension.status()
    if module is None:
        raise RuntimeError(reason)
    if spec.prefixes:
        wide = 4 * d * (n + m) if dtype_bytes < 4 else 0  # of float16
        needed = _prefix_bytes(module, spec, n, m, dtype_bytes, limit_bytes)
        return wide + needed + kernel_prefixes.beside(spec, n, m)
    return _total_bytes(module, spec, n, m, d, dtype_bytes, limit_bytes)


def stats(problem: Problem) -> Statistics:
    """One score GEMM, strip by strip."""
    if problem.spec.prefixes:
        return kernel_prefixes.stats(problem, _prefix_kernels(problem))
    spec = problem.spec
    pos, rows, columns = torch.ops.fused_nce.cuda_stats(
        *_arguments(problem), _wants_optional(spec), bool(spec.columns), _limit(problem), spec.hardness
    )
    return Statistics(pos, _wanted(spec.stats, rows), _wanted(spec.columns, columns) if spec.columns else None)


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The scores again, and one GEMM a gradient."""
    if problem.spec.prefixes:
        return kernel_prefixes.grads(problem, statistics, coefficients, needs, _prefix_kernels(problem))
    spec, zeros = problem.spec, torch.zeros_like(statistics.rows[0])

    def row(of: Tensor, name: str, absent: Tensor) -> Tensor:
        return of[spec.stats.index(name)] if name in spec.stats else absent

    def column(of: Tensor | None, name: str) -> Tensor | None:
        return of[spec.columns.index(name)] if of is not None and name in spec.columns else None

    def optional(of: Tensor) -> Tensor | None:
        return (
            torch.stack([row(of, name, zeros) for name in OPTIONAL_ROW_STATISTICS]) if _wants_optional(spec) else None
        )

    # Without neg_lse among the statistics no negative has a weight, as in a row that has no negatives.
    neg_lse, column_neg_lse = (
        row(statistics.rows, "neg_lse", zeros - float("inf")),
        column(statistics.columns, "neg_lse"),
    )
    d: list[Tensor | None] = [
        coefficients.d_pos,
        row(coefficients.d_rows, "neg_lse", zeros),
        row(coefficients.d_rows, "square", zeros),
        optional(coefficients.d_rows),
        column(coefficients.d_columns, "neg_lse"),
        column(coefficients.d_columns, "square"),
    ]
    if spec.columns and column_neg_lse is None:
        # The coefficient must be finite: float16's factor is the power of two of the largest.
        column_neg_lse, d[4] = zeros.new_full((problem.m,), -float("inf")), zeros.new_zeros(problem.m)
    factor = None
    if problem.q.dtype == torch.float16:
        # The weights enter the GEMMs as float16: coefficients of any size are brought to at most 1, on the device.
        squares = row(statistics.rows, "square", zeros), column(statistics.columns, "square")
        factor = _power_of_two(d, squares)
        d = [None if x is None else x * factor for x in d]
    found = torch.ops.fused_nce.cuda_grads(
        *_arguments(problem),
        *(statistics.pos, neg_lse, *d[:3], optional(statistics.rows), d[3], column_neg_lse, *d[4:]),
        *needs,
        _limit(problem),
        spec.hardness,
        problem.blocks > 1,
    )
    return _gradients(problem, found if factor is None else [x.div_(factor) for x in found])


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """One sweep: one score GEMM, and one a gradient. A tail that the kernels do not know costs the scores twice."""
    if problem.spec.prefixes:
        return kernel_prefixes.loss(problem, tail, needs, _prefix_kernels(problem))
    spec = problem.spec
    unit, n_scores = tail.unit(problem.n * tail.per_row(spec)), problem.n * problem.m
    if type(tail) not in KERNEL_TAILS:
        known = stats(problem)
        return known, grads(problem, known, tail.coefficients(spec, *known[:2], None, unit, 1.0, n_scores), needs)
    on = (*needs, _limit(problem), spec.hardness)
    pos, rows, *found = torch.ops.fused_nce.cuda_loss(
        *_arguments(problem), _wants_optional(spec), tail.NAME, unit, tail.penalty / n_scores, *on
    )
    return Statistics(pos, _wanted(spec.stats, rows)), _gradients(problem, found)


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
    """`csrc/cuda/whole.cpp`: of nce over rows, with the norms and the upstream gradient in launches of their own."""
    module = _extension.status()[0]
    form = None if module is None or type(tail) is not Nce or spec.marked or spec.prefixes else cpu.form_of(spec, tail)
    if module is None or form is None:
        return None
    limit = workspace.limit_bytes(cast(Tensor, leaves[0]).device.type)
    found: tuple[Any, ...] | None = module.loss(
        form, *leaves, scale, offset, normalize, parts, report_groups, limit, twins
    )
    return found


def summary(
    problems: Sequence[Problem], tail_of: Sequence[Tail], found: Sequence[Statistics], report_groups: Sequence[int]
) -> Summary:
    """In one or two launches, where torch takes forty; by torch for tails that the kernel does not know."""
    tail = tail_of[0]
    for problem, each in zip(problems, tail_of, strict=True):
        spec = problem.spec
        if type(each) is not Nce or spec.columns or NAMES[: len(spec.stats)] != spec.stats:
            return defaults.summary(problems, tail_of, found, report_groups)
    n_c = [p.spec.layout.n_c if isinstance(p.spec.layout, Block) else 1 for p in problems]
    # A separate positive stands beside the M columns.
    images = [p.m // c + isinstance(p.spec.layout, Separate) for p, c in zip(problems, n_c, strict=True)]
    summed = torch.ops.fused_nce.cuda_summary(
        [x.pos for x in found],
        [x.rows for x in found],
        n_c,
        images,
        [p.m for p in problems],
        [each.weight for each in tail_of],
        [each.penalty for each in tail_of],
        tail.reduction != "sum",
        tail.reduction == "none",
        report_groups,
    )
    return Summary(*summed)


def losses(
    problems: Sequence[Problem], tail_of: Sequence[Tail], gradients: Sequence[Tensor], need_scale: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`loss` of several problems of blocks, which share a launch for their rows where they are small.

    Args:
        problems: of one dtype, device, scale and transform.
        tail_of: `Nce` each.
        gradients: room for dq and dk of each in turn, in what they wait in; no elements: not wanted.
        need_scale: whether dscale is wanted.

    Returns:
        The positives of all, flat, the (S, all N) row statistics, and dL/dscale of each.
    """
    first = problems[0]
    scale, tensor = (1.0, first.scale) if isinstance(first.scale, Tensor) else (float(first.scale), None)
    blocks = [cast(Block, p.spec.layout) for p in problems]
    pos, rows, dscale = torch.ops.fused_nce.cuda_losses(
        [p.q for p in problems],
        [p.k for p in problems],
        scale,
        tensor,
        [block.n_c for block in blocks],
        [block.rows_per_image for block in blocks],
        [p.offset for p in problems],
        first.spec.clip or 0.0,
        [tail.unit(p.n * tail.per_row(p.spec)) for p, tail in zip(problems, tail_of, strict=True)],
        [tail.penalty / (p.n * p.m) for p, tail in zip(problems, tail_of, strict=True)],
        gradients,
        need_scale,
        _limit(first),
    )
    return pos, _wanted(first.spec.stats, rows), dscale


def _power_of_two(d: list[Tensor | None], squares: tuple[Tensor, Tensor | None]) -> Tensor:
    """0-d: what brings every weight to at most 1. A weight of the square is 2·d_square·s, and |s| ≤ √square.

    A score has a few weights, of its row and of its column: a few times what one of them is.
    """
    d_pos, d_row, d_square, d_optional, d_column, d_column_square = d
    sizes = [x.abs().amax() for x in (d_pos, d_row, d_optional, d_column) if x is not None and x.numel()]
    sizes += [
        (2 * x.abs() * y.sqrt()).amax()
        for x, y in zip((d_square, d_column_square), squares, strict=True)
        if x is not None and y is not None
    ]
    peak = torch.stack(sizes).amax()
    exponent = torch.frexp(peak).exponent.clamp(-100, 100)
    # A peak of 0 needs no factor, and one that is not finite must come out as it is.
    return torch.where(peak.isfinite() & (peak > 0), torch.ldexp(torch.ones_like(peak), -exponent), 1.0)


def _arguments(problem: Problem) -> tuple[Any, ...]:
    spec, layout, scale, bias = problem.spec, problem.spec.layout, problem.scale, None
    factors = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    block = (layout.n_c, layout.rows_per_image, problem.offset) if isinstance(layout, Block) else (1, 1, 0)
    row_ids = problem.row_ids if isinstance(layout, (Index, Labels)) else None
    column_ids = problem.column_ids if isinstance(layout, Labels) else None
    itself = problem.offset * block[0] if spec.drop_self else -1
    if isinstance(spec.transform, Bias):
        bias = torch.as_tensor(problem.bias, dtype=torch.float32, device=problem.q.device)
    k = None if problem.shared else problem.k
    scores = problem.q, k, *factors, *block, spec.clip or 0.0, row_ids, itself, problem.positives, column_ids, bias
    return *scores, *problem.marks


def _prefix_kernels(problem: Problem) -> Kernels:
    op = torch.ops.fused_nce.cuda_prefixes
    last = _limit(problem), problem.spec.hardness
    return Kernels(op, _arguments(problem)[2:], NAMES, (torch.float32, torch.bfloat16), last)


def _prefix_bytes(module: ModuleType, spec: Spec, n: int, m: int, element_bytes: int, limit: int) -> int:
    """The largest of its plans: 16 bits may be float16, which is widened."""
    sizes = [(n, m, spec.n_pos, spec.n_widths, size) for size in {4, element_bytes}]
    return max(module.cuda_prefix_bytes(*s, back, spec.marked, limit) for s in sizes for back in (True, False))


def _wants_optional(spec: Spec) -> int:
    """0: none of them; 2: the sum or the number of the negatives too, which cost every other spec nothing."""
    if not {"neg_sum", "neg_count"}.isdisjoint(spec.stats):
        return 2
    return int(not set(OPTIONAL_ROW_STATISTICS).isdisjoint(spec.stats))


def _gradients(problem: Problem, found: Sequence[Tensor]) -> Gradients:
    dq, dk, dscale, dbias = found
    return Gradients(dq, dk, dscale, dbias if isinstance(problem.spec.transform, Bias) else None)


def _limit(problem: Problem) -> int:
    return workspace.limit_bytes(problem.q.device.type)


def _wanted(names: tuple[str, ...], found: Tensor) -> Tensor:
    """(S, N) in the spec's order; a view where that is the kernels' own."""
    known = (*NAMES, *OPTIONAL_ROW_STATISTICS)
    if names == known[: len(names)]:
        return found[: len(names)]
    return torch.stack([found[known.index(name)] for name in names])


@lru_cache(maxsize=1024)
def _total_bytes(module: ModuleType, spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """The dearest of the three operations: `grads` has no statistics to hold, `stats` no weights."""
    # With statistics of columns there is no `loss`.
    tasks = ((True, False), (False, True)) if spec.columns else ((True, True), (True, False), (False, True))
    return max(
        int(
            module.cuda_plan(
                n,
                m,
                d,
                spec.n_pos,
                dtype_bytes,
                limit_bytes,
                statistics=statistics,
                gradients=gradients,
                sums=gradients * (2 if isinstance(spec.transform, Bias) else 1),
                column_stats=statistics and bool(spec.columns),
                optional=statistics and _wants_optional(spec) > 0,
                marked=spec.marked,
            )["total_bytes"]
        )
        for statistics, gradients in tasks
    )
