"""The three ops: schema, body, fake kernel and autograd, each once, for every backend.

They are functional custom ops, not `autograd.Function`s: under `torch.compile` a Function has every output's gradient
materialised, and the branch that recomputes would always be taken. The choice of a backend, logging and warnings happen
in the bodies, where they break no graph.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_nce.core import atoms, checks, defaults, dispatch, tails, twice
from fused_nce.core import spec as specs
from fused_nce.core import upstream as upstreams
from fused_nce.core.cost import Call
from fused_nce.core.problem import Backend, Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Block, Index, Separate

LIBRARY = torch.library.Library("fused_nce", "FRAGMENT")
ROOTS = (os.path.dirname(file) for file in (torch.__file__, os.path.dirname(__file__)))
INSIDE = ("<eval_with_key>", *(os.path.join(root, "") for root in ROOTS))
"""How the names of files begin that are no caller's: of a traced graph, torch's and this package's."""


class Scores(NamedTuple):
    """The arguments with which every op begins, in the schema's order."""

    q: Tensor
    k: Tensor | None  # None is q: one gradient buffer for both roles
    scale_tensor: Tensor | None  # scale·scale_tensor multiplies the dot product
    bias: Tensor | None
    positives: Tensor | None  # raw scores
    row_ids: Tensor | None
    column_ids: Tensor | None
    ceilings: Tensor | None
    guide_q: Tensor | None
    guide_k: Tensor | None
    scale: float
    spec: str
    offset: int

    @property
    def keys(self) -> Tensor:
        """(M, D)."""
        return self.q if self.k is None else self.k

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What `needs` and the gradients speak of, in their order."""
        return self.q, self.k, self.scale_tensor, self.bias, self.positives

    def each(self, f: Callable[[Tensor], Tensor]) -> Scores:
        """With f of every tensor in its place."""
        tensors: dict[str, Any] = {name: f(x) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**tensors)


COUNT = len(Scores._fields)
TENSORS = Scores._fields.index("scale")  # come first
_SCORES = (
    "Tensor q, Tensor? k, Tensor? scale_tensor, Tensor? bias, Tensor? positives, Tensor? row_ids, Tensor? column_ids, "
    "Tensor? ceilings, Tensor? guide_q, Tensor? guide_k, float scale, str spec, SymInt offset"
)
_GRADIENTS = "Tensor dq, Tensor dk, Tensor dscale, Tensor dbias, Tensor dpositives"
# needs: gradient wanted of q, k, scale_tensor, bias, positives. backend "": choose. parts: nce and penalty are
# differentiable by themselves, for which q and k are kept; without, a key bank may change before the backward.
# report_groups: rows r, r + report_groups, … have a line of `report` of their own.
_SCHEMAS = {
    "stats": f"({_SCORES}, str backend) -> (Tensor pos, Tensor rows, Tensor columns)",
    "grads": f"({_SCORES}, Tensor pos, Tensor rows, Tensor columns, Tensor d_pos, Tensor d_rows, Tensor d_columns, "
    f"bool[] needs, str backend) -> ({_GRADIENTS})",
    "loss": f"({_SCORES}, str tail, bool[] needs, bool parts, int report_groups, str backend) -> (Tensor loss, "
    f"Tensor nce, Tensor penalty, Tensor report, Tensor pos, Tensor rows, Tensor columns, {_GRADIENTS})",
}
for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def wide_of(q: Tensor) -> torch.dtype:
    """What everything is accumulated in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def stash_of(x: Tensor) -> torch.dtype:
    """What the gradient of an input waits in: its own dtype, at no extra memory. At the upstream of a GradScaler,
    float16 would already have lost up to half of dk, so it waits in float32.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


# ---- bodies -----------------------------------------------------------------------------------------------------


def _problem(x: Scores, backend: str) -> Problem:
    """The backend's view: detached."""
    return _as_problem(x.each(Tensor.detach), backend)


def _as_problem(x: Scores, backend: str) -> Problem:
    """In the accumulation dtype where a number is one."""
    spec, wide = specs.parse(x.spec), wide_of(x.q)
    bias = 0.0 if x.bias is None else x.bias.to(wide)
    positives = None if x.positives is None else x.positives.to(wide, copy=True)  # `pos` is no input
    return Problem(
        x.q,
        x.keys,
        x.scale if x.scale_tensor is None else x.scale_tensor.to(wide) * x.scale,
        spec,
        x.offset,
        bias,
        None if positives is None else atoms.positive_value(spec.transform, positives, bias),
        x.row_ids,
        x.column_ids,
        shared=x.k is None,
        blocks=dispatch.blocks_of(backend),
        ceilings=x.ceilings,
        guide_q=x.guide_q,
        guide_k=x.guide_k,
    )


def _empty_columns(problem: Problem) -> Tensor:
    return problem.q.new_empty(0, problem.m, dtype=wide_of(problem.q))


def _finish(problem: Problem, x: Scores, out: Gradients, d_pos: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    """Gradients in the op's argument order; one that is not needed is an empty tensor of its own, as an op must not
    return a tensor twice.
    """
    none = problem.q.new_empty(0, dtype=wide_of(problem.q))
    dbias, dpositives = none, none.clone()
    if needs[3] and out.dbias is not None:
        dbias = out.dbias
    if isinstance(problem.spec.layout, Separate):
        through = d_pos * atoms.transform_slope(problem.spec.transform, cast(Tensor, problem.positives))
        dpositives = through if needs[4] else dpositives  # fault: separate-positives-without
        if needs[3] and out.dbias is not None:
            dbias = dbias + tails.fixed_sum(d_pos)
    dq = out.dq.to(stash_of(problem.q)) if needs[0] else none.clone()
    dk = out.dk.to(stash_of(problem.k)) if needs[1] and not problem.shared else none.clone()
    dscale = out.dscale * x.scale if needs[2] else none.clone()
    return dq, dk, dscale, dbias, dpositives


def prepared(x: Scores, backend: str, call: Call) -> tuple[Problem, str, Backend]:
    """The problem, checked, and what runs it."""
    problem = _problem(x, backend)
    if isinstance(problem.spec.layout, Index) and problem.q.device.type == "cpu":
        checks.check_targets(cast(Tensor, x.row_ids), problem.m, x.offset if problem.spec.drop_self else None)
    name, module = dispatch.backend_of(problem, backend, call)
    return problem, name, module


def _needs(needs: list[bool]) -> Needs:
    return Needs(needs[0], needs[1], needs[2] or needs[3])


def warn_without_negatives(problem: Problem) -> None:
    layout = problem.spec.layout
    own = layout.n_c if isinstance(layout, Block) else 0 if isinstance(layout, Separate) else 1
    if problem.n_columns == own:
        frame, level = sys._getframe(1), 2
        while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):  # Python 3.12 can skip
            frame, level = frame.f_back, level + 1
        text = "fused_nce: one image has no negatives; its nce is 0, and so is the gradient of it"
        warnings.warn(text, stacklevel=level)  # of the caller's line


def _stats(*args: Any) -> tuple[Tensor, ...]:
    x, (backend,) = Scores(*args[:COUNT]), args[COUNT:]
    problem, name, module = prepared(x, backend, Call("stats"))
    with torch.autocast(x.q.device.type, enabled=False), torch.profiler.record_function(f"fused_nce::stats[{name}]"):
        found = module.stats(problem)
    return found.pos, found.rows, _empty_columns(problem) if found.columns is None else found.columns


def _grads(*args: Any) -> tuple[Tensor, ...]:
    x, (pos, rows, columns, d_pos, d_rows, d_columns, needs, backend) = Scores(*args[:COUNT]), args[COUNT:]
    problem, name, module = prepared(x, backend, Call.of("grads", _needs(needs)))
    both = problem.spec.columns
    found = Statistics(pos, rows, columns if both else None)
    d = tails.Coefficients(d_pos.contiguous(), d_rows.contiguous(), d_columns.contiguous() if both else None)
    with torch.autocast(x.q.device.type, enabled=False), torch.profiler.record_function(f"fused_nce::grads[{name}]"):
        return _finish(problem, x, module.grads(problem, found, d, _needs(needs)), d_pos, needs)


def _loss(*args: Any) -> tuple[Tensor, ...]:
    x, (tail, needs, _, report_groups, backend) = Scores(*args[:COUNT]), args[COUNT:]
    rule, wanted = tails.parse(tail), _needs(needs)
    problem, name, module = prepared(x, backend, Call.of("loss", wanted, bool(rule.penalty)))
    warn_without_negatives(problem)
    spec = problem.spec
    none = problem.q.new_empty(0, dtype=wide_of(x.q))
    out = Gradients(none, none, none)
    with torch.autocast(x.q.device.type, enabled=False), torch.profiler.record_function(f"fused_nce::loss[{name}]"):
        twice_over = bool(spec.columns) and not module.BOTH_WAYS
        if twice_over:
            found = module.stats(problem)
        else:
            found, out = module.loss(problem, rule, wanted)
        values = module.summary([problem], [rule], [found], [report_groups])
        d_pos = found.pos
        if (twice_over and any(wanted)) or needs[3] or needs[4]:
            d = module.slopes(problem, rule, found, rule.unit(problem.n * rule.per_row(spec)), 1.0)
            d_pos = d.d_pos
            if twice_over and any(wanted):
                out = module.grads(problem, found, d, wanted)
        gradients = _finish(problem, x, out, d_pos, needs)
    columns = _empty_columns(problem) if found.columns is None else found.columns
    return *values, found.pos, found.rows, columns, *gradients  # fault: stash-cast-inputs


for _name, _body in (("stats", _stats), ("grads", _grads), ("loss", _loss)):
    torch.library.impl(f"fused_nce::{_name}", "CompositeExplicitAutograd", _body, lib=LIBRARY)


# ---- fake kernels -----------------------------------------------------------------------------------------------


def _fake_stats(*args: Any) -> tuple[Tensor, ...]:
    x = Scores(*args[:COUNT])
    spec, n, wide = specs.parse(x.spec), x.q.shape[0], wide_of(x.q)
    sizes = (n, spec.n_widths * spec.n_pos), (spec.n_widths * len(spec.stats), n), (len(spec.columns), x.keys.shape[0])
    return tuple(x.q.new_empty(size, dtype=wide) for size in sizes)


def _fake_gradients(x: Scores, needs: list[bool]) -> tuple[Tensor, ...]:
    wide = wide_of(x.q)
    return tuple(
        x.q.new_empty(0, dtype=wide)
        if leaf is None or not need
        else x.q.new_empty(leaf.shape, dtype=stash_of(leaf) if leaf is x.q or leaf is x.k else wide)
        for leaf, need in zip(x.differentiable, needs, strict=True)
    )


def _fake_grads(*args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(Scores(*args[:COUNT]), args[-2])


def _fake_loss(*args: Any) -> tuple[Tensor, ...]:
    x, (tail, needs, _, report_groups, _) = Scores(*args[:COUNT]), args[COUNT:]
    pos, rows, columns = _fake_stats(*args)
    rule = tails.parse(tail)
    elements = (x.q.shape[0], rule.per_row(specs.parse(x.spec))) if rule.reduction == "none" else ()
    shapes = (), elements, (), (report_groups, len(rule.REPORT))
    return *(pos.new_empty(shape) for shape in shapes), pos, rows, columns, *_fake_gradients(x, needs)


for _name, _fake in (("stats", _fake_stats), ("grads", _fake_grads), ("loss", _fake_loss)):
    torch.library.register_fake(f"fused_nce::{_name}", _fake, lib=LIBRARY)


# ---- autograd ---------------------------------------------------------------------------------------------------


def _with_graph(ctx: Any, tail: tails.Tail | None, *upstream: Tensor | None) -> list[Any]:
    """The backward under create_graph=True, of inputs that are views of themselves: none is a function of another."""
    twice.check_asked_for(ctx.backend, tail is None or ctx.parts)
    x = Scores(*ctx.saved_tensors[:TENSORS], *ctx.rest).each(lambda y: y.view_as(y))  # fault: double-backward-along
    with checks.uncast(x.q):
        problem = _as_problem(x, ctx.backend)
        found = twice.statistics(problem)
        outputs = found if tail is None else twice.loss(problem, tail, found)
        return _padded(twice.gradients(outputs, upstream, x.differentiable, ctx.needs))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward rule needs: the score inputs and the statistics, or the stash alone."""
    ctx.set_materialize_grads(False)
    x = Scores(*inputs[:COUNT])
    ctx.rest, ctx.backend = (x.scale, x.spec, x.offset), inputs[-1]
    ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in x.differentiable]
    ctx.needs = [leaf is not None and leaf.requires_grad for leaf in x.differentiable]
    if len(output) == 3:
        ctx.save_for_backward(*x[:TENSORS], *output)
        return
    ctx.tail, ctx.needs, ctx.parts = inputs[COUNT : COUNT + 3]
    ctx.mark_non_differentiable(*output[3 if ctx.parts else 1 :])
    ctx.save_for_backward(*(output[7:] if not ctx.parts else (*x[:TENSORS], *output[4:])))


def _as_inputs(ctx: Any, found: tuple[Tensor, ...]) -> list[Any]:
    """The gradients of the op's tensors in their dtypes, None where not wanted."""
    return _padded([g.to(dtype) if need else None for g, dtype, need in zip(found, ctx.dtypes, ctx.needs, strict=True)])


def _padded(found: list[Tensor | None]) -> list[Tensor | None]:
    """With None for the op's other tensors: ids, ceilings, guides."""
    return [*found, *([None] * (TENSORS - len(found)))]


def _recompute(ctx: Any, x: Scores, found: tuple[Tensor, ...], d: tails.Coefficients) -> list[Any]:
    """Gradients from coefficients: the scores once more, then one GEMM a gradient."""
    d_columns = torch.zeros_like(found[2]) if d.d_columns is None else d.d_columns
    return _as_inputs(ctx, torch.ops.fused_nce.grads(*x, *found, d.d_pos, d.d_rows, d_columns, ctx.needs, ctx.backend))


def _stats_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        return *_with_graph(ctx, None, *upstream), *([None] * 4)
    upstreams.refuse_batched(*upstream)
    saved = ctx.saved_tensors
    x, found = Scores(*saved[:TENSORS], *ctx.rest), saved[TENSORS:]
    d = [torch.zeros_like(y) if g is None else g for g, y in zip(upstream, found, strict=True)]
    return *_recompute(ctx, x, found, tails.Coefficients(*d)), *([None] * 4)


def _loss_backward(
    ctx: Any, d_loss: Tensor | None, d_nce: Tensor | None, d_penalty: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    rest = [None] * 8
    if torch.is_grad_enabled():  # fault: double-backward-dropped
        return *_with_graph(ctx, tails.parse(ctx.tail), d_loss, d_nce, d_penalty), *rest
    saved = ctx.saved_tensors
    if d_nce is None and d_penalty is None:
        if d_loss is None:
            return *([None] * TENSORS), *rest
        # fault: upstream-gradient-ignored
        stash = tuple(upstreams.times(g, d_loss) if need else g for g, need in zip(saved[-5:], ctx.needs, strict=True))
        return *_as_inputs(ctx, stash), *rest
    # A reported part was differentiated on its own: the stash, at upstream 1 on the sum, cannot serve it.
    x, found = Scores(*saved[:TENSORS], *ctx.rest), saved[TENSORS : TENSORS + 3]
    return *_recompute(ctx, x, found, coefficients_of(x, ctx.tail, ctx.backend, found, d_loss, d_nce, d_penalty)), *rest


def coefficients_of(
    x: Scores,
    tail: str,
    backend: str,
    found: tuple[Tensor, ...],  # pos, rows, columns
    d_loss: Tensor | None,
    d_nce: Tensor | None,
    d_penalty: Tensor | None,
) -> tails.Coefficients:
    """dL/d statistic, where the reported parts of a loss have upstream gradients of their own."""
    upstreams.refuse_batched(d_loss, d_nce, d_penalty)
    pos, rows, columns = found
    rule, problem = tails.parse(tail), _problem(x, backend)
    spec, n_elements = problem.spec, problem.n * rule.per_row(problem.spec)
    zero = torch.zeros((), dtype=pos.dtype, device=pos.device)
    on_loss = zero if d_loss is None else d_loss
    mean = rule.weight / n_elements if rule.reduction == "mean" else rule.weight
    # fault: upstream-row-0, upstream-mean-not
    d_element = on_loss * rule.unit(n_elements) + (zero if d_nce is None else d_nce * mean)
    d_sum = on_loss + (zero if d_penalty is None else d_penalty)  # fault: lambda-not-scaled
    known = Statistics(pos, rows, columns if spec.columns else None)
    return defaults.slopes(problem, rule, known, d_element, d_sum)  # in torch: a compiler traces this


torch.library.register_autograd("fused_nce::stats", _stats_backward, setup_context=_setup, lib=LIBRARY)
torch.library.register_autograd("fused_nce::loss", _loss_backward, setup_context=_setup, lib=LIBRARY)
