"""The three ops: schema, body, fake kernel, autograd and FLOP formula, each once, for every backend.

They are functional custom ops, not `autograd.Function`s: under `torch.compile` a Function has every output's gradient
materialised, and the branch that recomputes would always be taken. The choice of a backend, logging and warnings happen
in the bodies, where they break no graph.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_nce.core import spec as specs
from fused_nce.core import tails
from fused_nce.core.dispatch import choose
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics

_lib = torch.library.Library("fused_nce", "FRAGMENT")
# scale·scale_tensor multiplies the dot product; needs = gradient wanted of q, k, scale_tensor; backend "" = choose.
_SCORES = "Tensor q, Tensor k, Tensor? scale_tensor, float scale, str spec, SymInt offset"
_lib.define(f"stats({_SCORES}, str backend) -> (Tensor pos, Tensor rows)", tags=(torch.Tag.pt2_compliant_tag,))
_lib.define(
    f"grads({_SCORES}, Tensor pos, Tensor rows, Tensor d_pos, Tensor d_rows, bool[] needs, str backend) -> "
    "(Tensor dq, Tensor dk, Tensor dscale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    f"loss({_SCORES}, str tail, bool[] needs, str backend) -> (Tensor loss, Tensor nce, Tensor penalty, Tensor report, "
    "Tensor pos, Tensor rows, Tensor dq, Tensor dk, Tensor dscale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _problem(q: Tensor, k: Tensor, scale_tensor: Tensor | None, scale: float, spec: str, offset: int) -> Problem:
    factor = scale if scale_tensor is None else scale_tensor.detach().to(_wide(q)) * scale
    return Problem(q.detach(), k.detach(), factor, specs.parse(spec), offset)


def _wide(q: Tensor) -> torch.dtype:
    """What everything is accumulated in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _chain_scale(grads: Gradients, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels give dL/d(scale·scale_tensor). What is unwanted may be one empty tensor there, but not in an op."""
    return grads.dq, grads.dk.clone() if grads.dk is grads.dq else grads.dk, grads.dscale * scale


# ---- bodies -----------------------------------------------------------------------------------------------------


def _stats(
    q: Tensor, k: Tensor, scale_tensor: Tensor | None, scale: float, spec: str, offset: int, backend: str
) -> tuple[Tensor, Tensor]:
    problem = _problem(q, k, scale_tensor, scale, spec, offset)
    name, module = choose(problem.spec, q, k, backend)
    with torch.autocast(q.device.type, enabled=False), torch.profiler.record_function(f"fused_nce::stats[{name}]"):
        return module.stats(problem)


def _grads(
    q: Tensor,
    k: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    spec: str,
    offset: int,
    pos: Tensor,
    rows: Tensor,
    d_pos: Tensor,
    d_rows: Tensor,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(q, k, scale_tensor, scale, spec, offset)
    name, module = choose(problem.spec, q, k, backend)
    with torch.autocast(q.device.type, enabled=False), torch.profiler.record_function(f"fused_nce::grads[{name}]"):
        out = module.grads(
            problem, Statistics(pos, rows), tails.Coefficients(d_pos.contiguous(), d_rows.contiguous()), Needs(*needs)
        )
    return _chain_scale(out, scale)


def _loss(
    q: Tensor,
    k: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    spec: str,
    offset: int,
    tail: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    problem = _problem(q, k, scale_tensor, scale, spec, offset)
    if problem.m == problem.spec.layout.n_c:
        warnings.warn("fused_nce: one image has no negatives; its nce is 0, and so is the gradient of it", stacklevel=2)
    rule = tails.parse(tail)
    name, module = choose(problem.spec, q, k, backend)
    with torch.autocast(q.device.type, enabled=False), torch.profiler.record_function(f"fused_nce::loss[{name}]"):
        found, out = module.loss(problem, rule, Needs(*needs))
        # On a GPU the tail's forty small launches would cost more than the GEMMs of a small batch.
        summary = getattr(module, "summary", None)
        if summary is not None:
            *values, report = summary(problem, rule, found)
        else:
            values = rule.values(problem.spec, *found, problem.m)
            report = rule.report(problem.spec, *found, problem.m)
    return *values, report, *found, *_chain_scale(out, scale)


for _name, _body in (("stats", _stats), ("grads", _grads), ("loss", _loss)):
    torch.library.impl(f"fused_nce::{_name}", "CompositeExplicitAutograd", _body, lib=_lib)


# ---- fake kernels -----------------------------------------------------------------------------------------------


def _fake_stats(q: Tensor, k: Tensor, t: Any, scale: float, spec: str, offset: int, backend: str) -> tuple[Tensor, ...]:
    rule, n = specs.parse(spec), q.shape[0]
    wide = _wide(q)
    return q.new_empty(n, rule.layout.n_c, dtype=wide), q.new_empty(len(rule.stats), n, dtype=wide)


def _fake_gradients(q: Tensor, k: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(q)
    return (
        q.new_empty(q.shape if needs[0] else (0,), dtype=wide),
        k.new_empty(k.shape if needs[1] else (0,), dtype=wide),
        q.new_empty(() if needs[2] else (0,), dtype=wide),
    )


def _fake_grads(
    q: Tensor, k: Tensor, t: Any, scale: float, spec: str, offset: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(q, k, rest[-2])


def _fake_loss(
    q: Tensor,
    k: Tensor,
    t: Any,
    scale: float,
    spec: str,
    offset: int,
    tail: str,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    pos, rows = _fake_stats(q, k, t, scale, spec, offset, backend)
    scalar = [pos.new_empty(()) for _ in range(3)]
    nce = torch.empty_like(pos) if tails.parse(tail).reduction == "none" else scalar[1]
    return scalar[0], nce, scalar[2], pos.new_empty(len(tails.REPORT)), pos, rows, *_fake_gradients(q, k, needs)


for _name, _fake in (("stats", _fake_stats), ("grads", _fake_grads), ("loss", _fake_loss)):
    torch.library.register_fake(f"fused_nce::{_name}", _fake, lib=_lib)


# ---- autograd ---------------------------------------------------------------------------------------------------


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused_nce: double backward (create_graph=True) is not supported: "
            "the gradients leave with the forward and carry no graph of their own"
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what both backward rules share: the score inputs and the statistics."""
    ctx.set_materialize_grads(False)
    q, k, scale_tensor, ctx.scale, ctx.spec, ctx.offset = inputs[:6]
    ctx.backend = inputs[-1]
    ctx.needs = [q.requires_grad, k.requires_grad, scale_tensor is not None and scale_tensor.requires_grad]
    if len(output) == 2:
        ctx.save_for_backward(q, k, scale_tensor, *output)
        return
    ctx.tail, ctx.needs = inputs[6], inputs[7]
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(q, k, scale_tensor, *output[4:])


def _as_inputs(ctx: Any, q: Tensor, k: Tensor, scale_tensor: Tensor | None, found: tuple[Tensor, ...]) -> list[Any]:
    """(dq, dk, dscale) in the inputs' dtypes, None where not wanted."""
    dtypes = (q.dtype, k.dtype, None if scale_tensor is None else scale_tensor.dtype)
    return [g.to(dtype) if need else None for g, dtype, need in zip(found, dtypes, ctx.needs, strict=True)]


def _recompute(ctx: Any, saved: tuple[Any, ...], d: tails.Coefficients) -> list[Any]:
    """Gradients from coefficients: the scores once more, then one GEMM a gradient."""
    q, k, scale_tensor, pos, rows = saved
    out = torch.ops.fused_nce.grads(
        q, k, scale_tensor, ctx.scale, ctx.spec, ctx.offset, pos, rows, d.d_pos, d.d_rows, ctx.needs, ctx.backend
    )
    return _as_inputs(ctx, q, k, scale_tensor, out)


def _stats_backward(ctx: Any, d_pos: Tensor | None, d_rows: Tensor | None) -> tuple[Any, ...]:
    _refuse_double_backward()
    pos, rows = ctx.saved_tensors[3:]
    d = tails.Coefficients(
        torch.zeros_like(pos) if d_pos is None else d_pos, torch.zeros_like(rows) if d_rows is None else d_rows
    )
    return *_recompute(ctx, ctx.saved_tensors, d), *([None] * 4)


def _loss_backward(
    ctx: Any, d_loss: Tensor | None, d_nce: Tensor | None, d_penalty: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    _refuse_double_backward()
    *score_inputs, pos, rows, dq, dk, dscale = ctx.saved_tensors
    q, k, scale_tensor = score_inputs
    rest = [None] * 6
    if d_nce is None and d_penalty is None:
        if d_loss is None:
            return None, None, None, *rest
        stash = [_times(g, d_loss) if need else g for g, need in zip((dq, dk, dscale), ctx.needs, strict=True)]
        return *_as_inputs(ctx, q, k, scale_tensor, tuple(stash)), *rest
    # A reported part was differentiated on its own: the stash, at upstream 1 on the sum, cannot serve it.
    rule = tails.parse(ctx.tail)
    n, m = q.shape[0], k.shape[0]
    zero = torch.zeros((), dtype=pos.dtype, device=pos.device)
    on_loss = zero if d_loss is None else d_loss
    mean = 1.0 / pos.numel() if rule.reduction == "mean" else 1.0
    d_element = on_loss * rule.unit(pos.numel()) + (zero if d_nce is None else d_nce * mean)
    d_sum = on_loss + (zero if d_penalty is None else d_penalty)
    d = rule.coefficients(specs.parse(ctx.spec), pos, rows, d_element, d_sum, n * m)
    return *_recompute(ctx, (*score_inputs, pos, rows), d), *rest


def _times(stash: Tensor, upstream: Tensor) -> Tensor:
    """stash·upstream, in the stash's own memory unless the graph is kept for another backward."""
    traced = torch.compiler.is_compiling() or type(upstream) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return stash * upstream
    # `loss.backward()` has upstream 1, and multiplying would read and write every gradient once more: 20 % of the whole
    # call at N = 126, D = 2560. Only a CPU can look without waiting.
    if upstream.device.type == "cpu" and upstream.item() == 1.0:
        return stash
    return stash.mul_(upstream)


torch.library.register_autograd("fused_nce::stats", _stats_backward, setup_context=_setup, lib=_lib)
torch.library.register_autograd("fused_nce::loss", _loss_backward, setup_context=_setup, lib=_lib)


# ---- FLOP formulas: one score GEMM is u = 2·N·M·D -----------------------------------------------------------------


@register_flop_formula(torch.ops.fused_nce.stats)
def _stats_flop(q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * q_shape[0] * k_shape[0] * q_shape[1])


@register_flop_formula(torch.ops.fused_nce.grads)
def _grads_flop(q_shape: Any, k_shape: Any, *args: Any, **__: Any) -> int:
    return _stats_flop(q_shape, k_shape) * (1 + sum(args[-2][:2]))


@register_flop_formula(torch.ops.fused_nce.loss)
def _loss_flop(q_shape: Any, k_shape: Any, *args: Any, **__: Any) -> int:
    return _stats_flop(q_shape, k_shape) * (1 + sum(args[-2][:2]))
