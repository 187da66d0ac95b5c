"""The op `losses`: several problems of one width whose losses are added up, as AMDIM's scales are.

Where problems are small, launches are what they cost, and a backend may share them. Positives, statistics and gradients
of all problems are flat tensors, cut by the shapes: one pass meets the upstream gradient for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_nce.core import spec as specs
from fused_nce.core import tails, twice, upstream
from fused_nce.core.cost import Call
from fused_nce.core.ops import LIBRARY, Scores, coefficients_of, prepared, stash_of, warn_without_negatives, wide_of
from fused_nce.core.problem import Needs, Problem, Statistics
from fused_nce.core.spec import Block, Spec


class Losses(NamedTuple):
    """The arguments of the op, in the schema's order."""

    q: list[Tensor]  # (N, D) each
    k: list[Tensor]  # (M, D) each
    scale_tensor: Tensor | None
    scale: float
    spec: list[str]  # blocks of columns that share transform and statistics
    tail: list[str]  # nce, of one reduction that is a number
    offset: list[int]
    report_groups: list[int]
    needs: list[bool]  # of q and k of each problem in turn, then of scale_tensor
    backend: str

    @property
    def scores(self) -> list[Scores]:
        """Each problem as the other ops have it."""
        each = zip(self.q, self.k, self.spec, self.offset, strict=True)
        return [
            Scores(q, k, self.scale_tensor, None, None, None, None, None, None, None, self.scale, spec, offset)
            for q, k, spec, offset in each
        ]

    @property
    def leaves(self) -> list[Tensor]:
        """q and k of each problem in turn."""
        return [x for pair in zip(self.q, self.k, strict=True) for x in pair]

    @property
    def sizes(self) -> list[int]:
        """Elements of the stash that each leaf's gradient has."""
        wanted = zip(self.leaves, self.needs, strict=False)
        return [x.numel() if need else 0 for x, need in wanted]

    def needs_of(self, i: int) -> Needs:
        """What is wanted of problem i."""
        q, k = self.needs[2 * i : 2 * i + 2]
        return Needs(q, k, self.needs[-1])

    def cut(self, stash: Tensor) -> list[Tensor]:
        """The leaves' gradients in the stash; no elements where there is none."""
        parts = zip(stash.split(self.sizes), self.leaves, self.needs, strict=False)
        return [part.view(x.shape) if need else part for part, x, need in parts]

    def statistics(self, pos: Tensor, rows: Tensor) -> list[Statistics]:
        """Each problem's, of the flat ones."""
        n = [q.shape[0] for q in self.q]
        widths = [specs.parse(spec).n_pos for spec in self.spec]
        flat = pos.split([a * b for a, b in zip(n, widths, strict=True)])
        lines = rows.split(n, dim=1)
        return [Statistics(x.view(-1, p), y) for x, p, y in zip(flat, widths, lines, strict=True)]


LIBRARY.define(
    "losses(Tensor[] q, Tensor[] k, Tensor? scale_tensor, float scale, str[] spec, str[] tail, SymInt[] offset, "
    "int[] report_groups, bool[] needs, str backend) -> (Tensor loss, Tensor nce, Tensor penalty, Tensor report, "
    "Tensor pos, Tensor rows, Tensor stash, Tensor dscale)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _body(*args: Any) -> tuple[Tensor, ...]:
    x = Losses(*args)
    rules = [tails.parse(tail) for tail in x.tail]
    calls = [Call.of("loss", x.needs_of(i), bool(rule.penalty)) for i, rule in enumerate(rules)]
    found = (prepared(each, x.backend, call) for each, call in zip(x.scores, calls, strict=True))
    problems, _, modules = zip(*found, strict=True)
    for problem in problems:
        warn_without_negatives(problem)
    stash = x.q[0].new_empty(sum(x.sizes), dtype=stash_of(x.q[0]))
    run = (modules[0].losses if len(set(modules)) == 1 else None) or _one_after_another(modules)
    with torch.autocast(stash.device.type, enabled=False), torch.profiler.record_function("fused_nce::losses"):
        pos, rows, dscale = run(problems, rules, x.cut(stash), x.needs[-1])
        known = x.statistics(pos, rows)
        values = modules[0].summary(problems, rules, known, x.report_groups)
    dscale = dscale.sum() * x.scale if x.needs[-1] else dscale.new_empty(0)
    return *values, pos, rows, stash, dscale


def _one_after_another(modules: Sequence[Any]) -> Any:
    """A backend's `losses`, by the `loss` of each problem's own."""

    def run(
        problems: Sequence[Problem], rules: Sequence[tails.Tail], places: Sequence[Tensor], need_scale: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        found, dscale = [], []
        for i, (problem, rule, module) in enumerate(zip(problems, rules, modules, strict=True)):
            dq, dk = places[2 * i : 2 * i + 2]
            statistics, out = module.loss(problem, rule, Needs(dq.numel() > 0, dk.numel() > 0, need_scale))
            found.append(statistics)
            dscale.append(out.dscale)
            for place, gradient in ((dq, out.dq), (dk, out.dk)):
                if place.numel():
                    place.copy_(gradient)
        pos = torch.cat([x.pos.reshape(-1) for x in found])
        return pos, torch.cat([x.rows for x in found], dim=1), torch.stack(dscale) if need_scale else pos.new_empty(0)

    return run


def _fake(*args: Any) -> tuple[Tensor, ...]:
    x = Losses(*args)
    wide, first = wide_of(x.q[0]), x.q[0]
    parsed = [specs.parse(spec) for spec in x.spec]
    pos = sum(q.shape[0] * spec.n_pos for q, spec in zip(x.q, parsed, strict=True))
    rows = (len(parsed[0].stats), sum(q.shape[0] for q in x.q))
    shapes = (), (), (), (sum(x.report_groups), len(tails.Nce.REPORT)), (pos,), rows
    stash = first.new_empty(sum(x.sizes), dtype=stash_of(first))
    dscale = () if x.needs[-1] else (0,)
    return *(first.new_empty(shape, dtype=wide) for shape in shapes), stash, first.new_empty(dscale, dtype=wide)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    x = Losses(*inputs)
    ctx.count, ctx.rest, ctx.dtype = len(x.q), inputs[3:], x.q[0].dtype
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(*x.q, *x.k, x.scale_tensor, *output[4:])


def _backward(
    ctx: Any, d_loss: Tensor | None, d_nce: Tensor | None, d_penalty: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    saved, n = ctx.saved_tensors, ctx.count
    *inputs, scale_tensor, pos, rows, stash, dscale = saved
    x = Losses(inputs[:n], inputs[n:], scale_tensor, *ctx.rest)
    if torch.is_grad_enabled():
        twice.check_asked_for(x.backend, inputs_kept=False)
    found: list[Tensor | None] = [None] * (2 * n)
    d_scale = None
    if d_nce is not None or d_penalty is not None:
        # A reported part was differentiated on its own: the stash, at upstream 1 on the sum, cannot serve it.
        found, d_scale = _recompute(x, x.statistics(pos, rows), (d_loss, d_nce, d_penalty))
    elif d_loss is not None:
        cut = x.cut(upstream.times(stash, d_loss))
        found = [g.to(ctx.dtype) if need else None for g, need in zip(cut, x.needs, strict=False)]
        d_scale = upstream.times(dscale, d_loss) if x.needs[-1] else None
    if d_scale is not None and scale_tensor is not None:
        d_scale = d_scale.to(scale_tensor.dtype)
    return found[0::2], found[1::2], d_scale, *([None] * 7)


def _recompute(
    x: Losses, statistics: Sequence[Statistics], d: tuple[Tensor | None, ...]
) -> tuple[list[Tensor | None], Tensor | None]:
    """The scores of each problem once more."""
    found: list[Tensor | None] = []
    d_scale: Tensor | None = None
    for i, (scores, each) in enumerate(zip(x.scores, statistics, strict=True)):
        known = (each.pos, each.rows.contiguous(), each.rows.new_empty(0, scores.keys.shape[0]))
        on = coefficients_of(scores, x.tail[i], x.backend, known, *d)
        needs = [*x.needs[2 * i : 2 * i + 2], x.needs[-1], False, False]
        out = torch.ops.fused_nce.grads(*scores, *known, on.d_pos, on.d_rows, known[2], needs, x.backend)
        pairs = zip(out, needs[:2], strict=False)
        found += [g.to(scores.q.dtype) if need else None for g, need in pairs]
        if x.needs[-1]:
            d_scale = out[2] if d_scale is None else d_scale + out[2]
    return found, d_scale


torch.library.impl("fused_nce::losses", "CompositeExplicitAutograd", _body, lib=LIBRARY)
torch.library.register_fake("fused_nce::losses", _fake, lib=LIBRARY)
torch.library.register_autograd("fused_nce::losses", _backward, setup_context=_setup, lib=LIBRARY)


def can_share(scores: Sequence[Scores], spec_of: Sequence[Spec], tail_of: Sequence[tails.Tail]) -> bool:
    """Whether problems are alike enough for the op, in all but their shapes."""
    first, q, rule = spec_of[0], scores[0].q, tail_of[0]
    return all(
        isinstance(spec.layout, Block)
        and not (spec.drop_self or spec.columns or spec.hardness)
        and (spec.transform, spec.stats) == (first.transform, first.stats)
        and type(tail) is tails.Nce
        and tail.reduction == rule.reduction != "none"
        and (x.q.dtype, x.q.device, x.keys.dtype) == (q.dtype, q.device, q.dtype)
        and x.bias is None
        for x, spec, tail in zip(scores, spec_of, tail_of, strict=True)
    )
