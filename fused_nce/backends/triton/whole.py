"""A plain call in few launches: norms, the sweep, its end in the numbers of the loss; and one launch in the backward.

What it does not serve goes to the ops of `core/ops.py`, which compute the same in more launches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad

from fused_nce.backends.triton import configs, norms, tail
from fused_nce.backends.triton.launch import Merge, Sweep, on_device, with_rows
from fused_nce.core import first_contact, ops
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Block, Identity, Separate, Spec
from fused_nce.core.tails import Coefficients, Nce, Tail, fixed_sum
from fused_nce.core.upstream import batched, refuse_batched

NAMES = ("neg_lse", "neg_max", "square")
ALONE = 1024  # rows that one program closes at most, of few positives


class Leaves(NamedTuple):
    """What a call is given, in the order of `problem.WholeLoss`."""

    q: Tensor
    k: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    positives: Tensor | None
    own: Tensor | None
    row_ids: Tensor | None
    column_ids: Tensor | None


@dataclass(frozen=True)
class Call:
    """All but the tensors."""

    spec: Spec
    tail: Nce
    scale: float
    offset: int
    normalize: bool
    parts: bool
    twins: bool
    needs: tuple[bool, bool, bool] = (False, False, False)  # of q, k and the scale

    def wanted(self, shared: bool) -> Needs:
        """Of the tensors in the scores."""
        q, k, scale = self.needs
        return Needs(q or (shared and k), k and not shared, scale)


# ---- what is served ---------------------------------------------------------------------------------------------


def _watched(x: Tensor) -> bool:
    """Something looks at the calls of operators or changes what they do: a mode, a transform, a trace, autocast."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    within = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.get_autocast_dtype(kind)
    return modes > 0 or within or cast or torch.jit.is_tracing()


def _rows(like: Tensor, *others: Tensor | None) -> bool:
    """Of one dtype, device and width."""
    kind = (like.dtype, like.device, like.shape[1:])
    return all(x is None or ((x.dtype, x.device, x.shape[1:]) == kind and x.numel() > 0) for x in others)


def _serves(call: Call, x: Leaves) -> bool:
    spec, rule, layout = call.spec, call.tail, call.spec.layout
    rest = (x.bias, x.positives, x.row_ids, x.column_ids)
    if type(rule) is not Nce or spec.marked or spec.prefixes or any(y is not None for y in rest):
        return False
    if spec.stats != NAMES[: max(2, len(spec.stats))] or x.q.dim() != 2 or not _rows(x.q, x.q, x.k, x.own):
        return False
    if x.scale is not None and (x.scale.dim() or x.scale.device != x.q.device):
        return False
    if spec.columns and (spec.columns != ("neg_lse",) or x.k is None or not isinstance(layout, Block)):
        return False  # targets of any number of rows
    if call.twins and (x.k is None or x.k.shape != x.q.shape or not call.normalize):
        return False
    if isinstance(layout, Separate):
        if call.parts or (x.k is not None and x.k.requires_grad):
            return False  # the keys are a queue's
        whole = x.own is not None and x.own.shape == x.q.shape and not x.own.requires_grad and call.normalize
        return whole and layout.p == 1 and isinstance(spec.transform, Identity) and not rule.penalty
    columns = len(x.q) * 2 if call.twins else len(x.q if x.k is None else x.k)
    return isinstance(layout, Block) and x.own is None and columns != layout.n_c  # no negatives: worth a warning


def whole_loss(
    spec: Spec,
    rule: Tail,
    leaves: tuple[Tensor | None, ...],
    scale: float,
    offset: int,
    normalize: bool,
    parts: bool,
    report_groups: int,
    twins: bool = False,
) -> tuple[Any, ...] | None:
    """As `problem.WholeLoss`."""
    x = Leaves(*leaves)  # type: ignore[arg-type]
    given = [y for y in leaves if y is not None]
    if report_groups != 1 or any(type(y) not in (Tensor, torch.nn.Parameter) for y in given) or _watched(x.q):
        return None
    graph = torch.is_grad_enabled()
    needs = tuple(graph and y is not None and y.requires_grad for y in x[:3])
    call = Call(spec, rule, scale, offset, normalize, parts, twins, needs)  # type: ignore[arg-type]
    if not _serves(call, x):
        return None
    tensors = (x.q, x.k, x.scale, x.own)
    found = _Loss.apply(*tensors, call) if any(needs) else _forward(call, *tensors)[0]
    loss, nce, penalty, report, pos, rows = found
    return loss, nce, penalty, dict(zip(Nce.REPORT, report.unbind(0), strict=True)), pos, rows


# ---- the scores' tensors ----------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """The tensors of the scores, and the norms that rows were divided by."""

    q: Tensor
    k: Tensor
    shared: bool
    q_norms: Tensor
    k_norms: Tensor  # or of the own keys
    positives: Tensor | None = None  # (N, 1) of own keys
    products: Tensor | None = None  # theirs before the scale, where that is a tensor


def _shape(d: int) -> dict[str, int]:
    """Of a program of `norms`."""
    width = min(256, configs.power_of_two(d))
    return {"D": d, "X": 2048 // width, "WIDTH": width}


def _sides(call: Call, q: Tensor, k: Tensor | None, scale: float | Tensor, own: Tensor | None) -> Sides:
    """One launch where rows are divided by their norms; none elsewhere."""
    shared, none = call.twins or k is None, q.new_empty(0, dtype=torch.float32)
    x, y = with_rows(q), None if k is None else with_rows(k)
    if not call.normalize:
        return Sides(x, x if y is None else y, shared, none, none)
    (n, d), shape = q.shape, _shape(q.shape[1])
    second = y if own is None else with_rows(own)
    if call.twins:  # the two of a row side by side
        both = q.new_empty(n, 2, d)
        unit_q, unit_k = both[:, 0], both[:, 1]  # fault: triton-twins-apart
    else:
        unit_q, unit_k = q.new_empty(q.shape), none if y is None or own is not None else y.new_empty(y.shape)
    m = 0 if second is None or own is not None else len(second)
    q_norms, k_norms = none.new_empty(n), none.new_empty(0 if second is None else len(second))
    positives = none.new_empty(1 + isinstance(scale, Tensor), 0 if own is None else n, 1)
    programs = triton.cdiv(n, shape["X"]) + triton.cdiv(m, shape["X"])
    norms.unit_kernel[(programs,)](
        x, none if second is None else second, unit_q, unit_k, q_norms, k_norms, positives, scale, n, m,
        x.stride(0), 1 if second is None else second.stride(0), unit_q.stride(0),
        TENSOR_SCALE=isinstance(scale, Tensor), OWN=own is not None, **shape,
    )  # fmt: skip
    if call.twins:
        unit_q = both.view(-1, d)
    elif own is not None:
        return Sides(unit_q, y, False, q_norms, k_norms, positives[0], positives[-1])  # type: ignore[arg-type]
    return Sides(unit_q, unit_q if shared else unit_k, shared, q_norms, k_norms)


def _scale_of(call: Call, scale: Tensor | None) -> float | Tensor:
    if scale is None:
        return call.scale
    wide = scale.detach().to(torch.float32)
    return wide if call.scale == 1.0 else wide * call.scale


# ---- forward ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What the forward leaves for the backward."""

    gradients: Gradients  # at upstream 1, of the tensors in the scores
    columns: Tensor  # (S', M) statistics; empty without any
    d_pos: Tensor
    sides: Sides


def _close(
    sweep: Sweep, call: Call, pos: Tensor, made: dict[str, Tensor]
) -> tuple[Merge, Callable[[Tensor, Tensor], None]]:
    """The launch that merges splits, with the nce tail; and that for both sides, when rows and columns are merged.

    What they make beside the statistics goes into `made`.
    """
    spec, rule, n, m = sweep.spec, call.tail, sweep.p.n, sweep.p.m
    n_c = spec.layout.n_c if isinstance(spec.layout, Block) else 1
    images = m // n_c + isinstance(spec.layout, Separate)  # a separate positive stands beside the M columns
    p, new = pos.shape[1], sweep.new
    partners = min(16, 1 << (p - 1).bit_length())
    both = bool(spec.columns)
    rows = min(ALONE, 8 * ALONE // partners)
    alone = n <= rows and not both and not first_contact.large()  # fault: triton-summary-untried
    rows, warps = (rows, 16) if alone else (128, 4)
    programs = triton.cdiv(n, rows)
    listed = rule.reduction == "none"
    made |= {"d_pos": new(n, p), "d_rows": new(len(spec.stats), n), "elements": new(n, p) if listed else sweep.empty}
    made |= {"sums": new(6 + both, programs), "loss": new(), "nce": new(), "penalty": new(), "report": new(5)}
    made |= {"d_columns": new(len(spec.columns), m) if both else sweep.empty}
    numbers = [made[name] for name in ("loss", "nce", "penalty", "report")]
    weights = (rule.weight, rule.penalty / (n * m))
    logs = (math.log1p((images - 1) * n_c), math.log(images))
    flags = {"POSITIVES": p, "MEAN": rule.reduction != "sum"}

    def launch(partial: Tensor, mirrored: Tensor, out: Tensor, splits: int, constants: dict[str, Any]) -> None:
        tail.close_kernel[(programs,)](
            partial, mirrored, out, pos, made["d_pos"], made["d_rows"], made["elements"], made["sums"], *numbers,
            n, splits, rule.unit(n * p), *weights, *logs, math.log(n_c),
            **constants, **flags, PARTNERS=partners, ELEMENTS=listed, ALONE=alone, X=rows, num_warps=warps,
        )  # fmt: skip
        if not alone:
            sum_up(0)

    def launch_both(found: Tensor, back: Tensor) -> None:
        tail.close_both_kernel[(programs + triton.cdiv(m, rows),)](
            found, back, pos, made["d_pos"], made["d_rows"], made["d_columns"], made["elements"], made["sums"],
            sweep.row_ids, n, m, sweep.first, sweep.itself, programs, rule.unit(n * p), *weights, math.log(n_c),
            FORM=sweep.form, POSITIVES=p, PARTNERS=partners, ELEMENTS=listed, X=rows,
        )  # fmt: skip
        sum_up(6)

    def sum_up(own: int) -> None:
        tail.summary_kernel[(1,)](made["sums"], *numbers, n, programs, *weights, *logs, **flags, OWN=own)

    return launch, launch_both


def _forward(
    call: Call, q: Tensor, k: Tensor | None, scale: Tensor | None, own: Tensor | None
) -> tuple[tuple[Tensor, ...], Found]:
    """(loss, nce, penalty, report, pos, rows), and what the backward needs."""
    with on_device(q), torch.no_grad(), torch.profiler.record_function("fused_nce::loss[triton]"):
        factor = _scale_of(call, scale)
        sides = _sides(call, q, k, factor, own)
        problem = Problem(
            sides.q, sides.k, factor, call.spec, call.offset, positives=sides.positives, shared=sides.shared
        )
        needs, sweep = call.wanted(sides.shared), Sweep(problem, ops.stash_of(sides.q))
        pos, made = sweep.positives(), dict[str, Tensor]()
        close, close_both = _close(sweep, call, pos, made)
        merge = None if call.spec.columns else close
        _, rows, columns = sweep.statistics(sweep.sums_at_once(call.tail, needs), pos, merge)
        if columns is not None:
            close_both(rows, columns)
        gradients = Gradients(sweep.empty, sweep.empty, sweep.empty)
        if any(needs):
            d = Coefficients(made["d_pos"], made["d_rows"], made["d_columns"] if columns is not None else None)
            gradients = sweep.gradients(Statistics(pos, rows, columns), d, bool(call.tail.penalty), needs)
        if needs.scale:
            dscale = gradients.dscale
            if sides.products is not None:
                dscale = dscale + fixed_sum(made["d_pos"] * sides.products)  # fault: triton-own-scale
            gradients = gradients._replace(dscale=dscale * call.scale if call.scale != 1.0 else dscale)
    nce = made["elements"] if call.tail.reduction == "none" else made["nce"]
    values = (made["loss"], nce, made["penalty"], made["report"], pos, rows)
    return values, Found(gradients, sweep.empty if columns is None else columns, made["d_pos"], sides)


# ---- backward ---------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """What one gradient goes through."""

    x: Tensor  # rows as given; the gradient itself where they were not divided
    norms: Tensor
    on: Tensor  # dL/d what was in the scores, at upstream 1
    out: Tensor

    @property
    def rows(self) -> int:
        return len(self.out)


def _ways(call: Call, x: Leaves, of: tuple[Tensor, Tensor], on: Gradients, dtype: torch.dtype, kept: bool) -> list[Way]:
    """Of q and of k; of no rows where no gradient is wanted."""
    found = [on.dq, on.dk]
    if call.twins and on.dq.numel():
        both = on.dq.view(-1, 2, on.dq.shape[1])
        found = [both[:, 0], both[:, 1]]
    ways = []
    for given, norm, g, need in zip((x.q, x.k), of, found, call.needs, strict=False):
        g = g if need else g.new_empty(0, 1)
        alone = not kept and g.dtype == dtype and g.is_contiguous()  # fault: triton-whole-kept
        out = g if alone else g.new_empty(g.shape, dtype=dtype)
        ways.append(Way(with_rows(given) if call.normalize and need and given is not None else g, norm, g, out))
    return ways


def _through(call: Call, x: Leaves, ways: list[Way], d_pos: Tensor, upstream: Tensor) -> None:
    """upstream·dL/d rows as given, in one launch; none for the scale alone."""
    q, k = ways
    widest = max(ways, key=lambda way: way.rows)
    if not widest.rows:
        return
    own = q.norms if x.own is None else with_rows(x.own)
    shape = _shape(widest.on.shape[1])
    with on_device(widest.out):
        norms.through_kernel[(sum(triton.cdiv(way.rows, shape["X"]) for way in ways),)](
            q.x, k.x, q.norms, k.norms, q.on, k.on, q.out, k.out, own, k.norms, d_pos, _scale_of(call, x.scale),
            upstream.to(torch.float32), q.rows, k.rows, q.x.stride(0), k.x.stride(0), widest.on.stride(0),
            own.stride(0), NORMALISE=call.normalize, OWN=x.own is not None and q.rows > 0,
            TENSOR_SCALE=x.scale is not None, **shape,
        )  # fmt: skip


def _again(
    call: Call, x: Leaves, pos: Tensor, rows: Tensor, columns: Tensor, ups: tuple[Tensor | None, ...]
) -> tuple[Gradients, Tensor, tuple[Tensor, Tensor]]:
    """The gradients from those of the parts, by the scores once more; dL/d pos and the norms."""
    with on_device(x.q):
        sides = _sides(call, x.q, x.k, _scale_of(call, x.scale), x.own)
    wanted = call.wanted(sides.shared)
    columns = columns if call.spec.columns else pos.new_empty(0, len(sides.k))
    keys = None if sides.shared else sides.k
    scores = ops.Scores(
        sides.q, keys, x.scale, None, sides.positives, None, None, None, None, None,
        call.scale, call.spec.code, call.offset,
    )  # fmt: skip
    d = ops.coefficients_of(scores, call.tail.code, "triton", (pos, rows, columns), *ups)
    d_columns = columns if d.d_columns is None else d.d_columns
    needs = [wanted.q, wanted.k, wanted.scale, False, False]
    found = (pos, rows, columns, d.d_pos, d.d_rows, d_columns)
    dq, dk, dscale, *_ = torch.ops.fused_nce.grads(*scores, *found, needs, "triton")
    return Gradients(dq, dk, dscale), d.d_pos, (sides.q_norms, sides.k_norms)


class _Loss(torch.autograd.Function):
    """A node of its own. A compiler or a transform never meets it: a call that one watches is not served."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, scale: Tensor | None, own: Tensor | None, call: Call) -> Any:
        """(loss, nce, penalty, report, pos, rows)."""
        values, (gradients, columns, d_pos, sides) = _forward(call, q, k, scale, own)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.dtypes = call, (q.dtype, None if scale is None else scale.dtype)
        kept = call.parts or call.normalize  # what the backward computes with
        keys = None if own is not None else k  # a queue may change before it
        ctx.save_for_backward(
            *gradients[:3],
            d_pos,
            sides.q_norms,
            sides.k_norms,
            columns,
            *values[4:],
            *((q, keys, scale, own) if kept else ()),
        )
        ctx.mark_non_differentiable(*values[3 if call.parts else 1 :])
        return values

    @staticmethod
    def backward(ctx: Any, *ups: Tensor | None) -> Any:
        """Of q, k and the scale, from dL/d (loss, nce, penalty)."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fused_nce: double backward (create_graph=True) is not supported: the gradients leave with the forward "
                "and carry no graph of their own; backend='chunked' has one"
            )
        call, (dtype, scale_dtype) = ctx.call, ctx.dtypes
        dq, dk, dscale, d_pos, q_norms, k_norms, columns, pos, rows, *leaves = ctx.saved_tensors
        q, k, scale, own = leaves or (dq, None, None, None)
        x, on, of = Leaves(q, k, scale, None, None, own, None, None), Gradients(dq, dk, dscale), (q_norms, k_norms)
        upstream, kept = ups[0], torch._C._autograd._get_current_graph_task_keep_graph()
        if ups[1] is not None or ups[2] is not None:  # the stash, at upstream 1 on the sum, cannot serve a part
            refuse_batched(*(g for g in ups[:3] if g is not None))
            on, d_pos, of = _again(call, x, pos, rows, columns, ups[:3])
            upstream, kept = torch.ones_like(pos[0, 0]), False
        elif upstream is None:
            return (None,) * 5
        several = batched(upstream)
        ways = _ways(call, x, of, on, dtype, kept or several)
        _through(call, x, ways, d_pos, torch.ones_like(pos[0, 0]) if several else upstream)
        found = [way.out if need else None for way, need in zip(ways, call.needs, strict=False)]
        if several:
            found = [None if g is None else (g * upstream).to(dtype) for g in found]
        on_scale = None
        if call.needs[2]:
            on_scale = (on.dscale * upstream).to(scale_dtype)
        return *found, on_scale, None, None
