"""A row's candidates from several blocks of scores: how text embedders choose their negatives, on the one engine.

Row i has a positive, query i with its key, of score p_i, and negatives from up to six blocks of scores. A block is a
problem of the engine of which `neg_lse` is read, log Σ e^t over the row's negatives there, and of no block more than a
tile is held. What the blocks give is joined in plain torch on (N,) vectors: softplus(lse of all negatives − p_i).

| what | is |
|---|---|
| directions `q2k`, `k2q`, `q2q`, `k2k` | blocks of other rows and columns; a row itself is the diagonal of `Block(1)` |
| ids | the layout `Labels`: columns of the row's id are no negatives |
| own hard negatives, the positive | (N, H) and (N,) dot products of rows |
| hard negatives of other rows | the negatives of `Block(H)` |
| margin, guide | the engine's filters |
| hardness, t = s + α·stopgrad(r) | the engine's transform of that name |
| a bias a column | more dimensions: ⟨(q, 1), (k, b / scale)⟩ |
| label smoothing | the statistics `neg_sum` and `neg_count` |
| debiasing, row weights | the tail |
| several positives, soft targets | `losses/targets.py`: the layout `Several`, and their scores by `gathered_scores` |
| prefixes | `Spec.prefixes`: every (N,) here is (K, N); with a bias a column one call each |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.atoms import positive_value, transform_value
from fused_nce.core.engine import as_matmul, loss_of, tile_stats
from fused_nce.core.gathered import gathered_scores
from fused_nce.core.group import Group, peers
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.problem import ASIDE
from fused_nce.core.spec import Block, Index, Labels, Layout, Separate, Several, Spec, cached
from fused_nce.core.statistics import deficit, poison, softplus
from fused_nce.core.tails import bad, fixed_sum
from fused_nce.losses import candidates
from fused_nce.losses.candidates import Batch, Rules
from fused_nce.losses.common import log_count, normalized, widened
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.targets import Targets


@dataclass(frozen=True)
class _Negatives:
    """Of one block, by row."""

    lse: Tensor  # (N,)
    top: Tensor  # (N,) the highest, detached
    total: Tensor | None  # (N,) Σ t, where label smoothing reads it
    count: float | Tensor  # of them; (N,) where ids or filters decide
    hardness: float = 0.0  # α
    pos: Tensor | None = None  # (N,) t of the row's own key, where it is the block's one positive


@dataclass(frozen=True)
class _Positives:
    """Of each row; one alone is all of it, but the count."""

    lse: Tensor  # (N,)
    mean: Tensor  # (N,), by the targets' weights
    total: Tensor  # (N,) Σ t
    top: Tensor  # (N,) the highest
    count: float | Tensor = 1.0
    gap: Tensor | None = None  # (N,) lse − mean; None where they are the same


def contrast(
    x: Batch,
    scale: float | Tensor,
    rules: Rules,
    prefixes: Sequence[int] = (),
    weights: Sequence[float] = (),
    *,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """The loss, or the weighted sum of those of the prefixes. `scale` is a number or a 0-d tensor."""
    out = None if x.column_bias is None else x.column_bias.detach() == float("-inf")
    given = x = x if out is None else _less_weightless(x, out)
    if x.column_bias is not None and out is not None:
        x = _with_bias(x, x.column_bias, out, scale, rules)
    blocks = _Blocks(x, scale, rules, prefixes, group, backend)
    found = {direction: blocks.negatives(direction) for direction in rules.directions}
    p = blocks.positives(found["q2k"][0].pos if "q2k" in found and out is None else None, given)
    if out is not None:
        p = _left_out(p, x, out)
    if rules.joint:
        every = [negatives for each in found.values() for negatives in each]
        times = max(1, len({"q2k", "k2q"}.intersection(rules.directions)))  # fault: joint-positive-once
        losses = _row_loss(p, every, times, scale, rules)
    else:
        parts = [_row_loss(p, each, 1, scale, rules) for each in found.values()]
        losses = torch.stack(parts).mean(dim=0)
    if prefixes:
        losses = torch.stack([weight * each for weight, each in zip(weights, losses, strict=True)]).sum(dim=0)
    size = 1 if (everyone := peers(group)) is None else everyone.size
    n: int | Tensor = losses.shape[0]
    if x.row_weights is not None:
        w = widened(x.row_weights)
        total = fixed_sum(w)
        if everyone is not None:
            from fused_nce.core.distributed.collectives import gather

            total = fixed_sum(gather([total[None]], everyone, {"N": losses.shape[0]})[0])
        losses, n = losses * w, total / size
    if rules.reduction == "sum":
        loss = nce = fixed_sum(losses) * size
    else:
        loss = fixed_sum(losses) / n
        nce = losses if rules.reduction == "none" else loss
    with torch.no_grad():
        top = torch.stack([negatives.top for each in found.values() for negatives in each]).amax(dim=0)
        lse = _lse([negatives.lse for negatives in next(iter(found.values()))])
        if out is not None:  # the sum of columns left out alone
            lse = lse.masked_fill((lse < -FAR * FAR / 2 * scale) & out.any(), float("-inf"))
        means = p.mean, p.top > top, lse
        each_width = zip(prefixes, *means, strict=True) if prefixes else [(None, *means)]
        stats = {name: y for each in each_width for name, y in _report(*each).items()}
        stats = reported(stats, rules.hardness or rules.own_hardness)
    return NCEOutput(loss, nce, torch.zeros_like(loss), stats)


def _less_weightless(x: Batch, out: Tensor) -> Batch:
    """A target of weight 0 whose column the bias leaves out is no column of the row."""
    if x.several is None:
        return x
    indices, weights, _ = x.several
    gone = out[indices.clamp(min=0)] & (weights == 0)
    return x._replace(several=x.several._replace(indices=indices.masked_fill(gone, -1)))


def _left_out(p: _Positives, x: Batch, out: Tensor) -> _Positives:
    """With −∞ where the bias leaves out a row's own key, or one of its keys that has a weight."""
    if x.several is None:
        lse = p.lse.masked_fill(out[candidates.own(x)], float("-inf"))  # fault: bias-own-key-left-out
        return _Positives(lse, lse, lse, lse)
    gone = (out[x.several.indices.clamp(min=0)] & (x.several.weights > 0)).any(dim=1)
    inf = float("inf")
    return replace(p, mean=p.mean.masked_fill(gone, -inf), gap=cast(Tensor, p.gap).masked_fill(gone, inf))


def _report(width: int | None, p: Tensor, first: Tensor, lse: Tensor) -> dict[str, Tensor]:
    end, n = "" if width is None else f"_{width}", p.shape[0]
    means = {"top1": first.to(p.dtype), "pos_mean": p, "neg_lse_mean": lse}
    return {name + end: (fixed_sum(y) / n).detach() for name, y in means.items()}


def reported(report: dict[str, Tensor], hardness: float) -> dict[str, Tensor]:
    """The loss of weighed negatives bounds no information, and no chance is its measure; nor is a top-1 among them."""
    if not hardness:
        return report
    return {name: y for name, y in report.items() if not name.startswith(("nce", "mi_bound", "top1"))}


def contrast_prefixes(
    x: Batch,
    scale: float | Tensor,
    rules: Rules,
    prefixes: tuple[int, ...],
    weights: tuple[float, ...],
    *,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """Σ weight·loss of the operands' first columns, each width normalised on its own (Kusupati et al. 2022).

    Queries among keys, filtered or not, are one sweep that their gradients leave with; with more, a sweep a direction.
    """
    how: dict[str, Any] = {"group": group, "backend": backend}
    if x.column_bias is not None:
        each_width = []
        for width, weight in zip(prefixes, weights, strict=True):
            q, k, *h = (normalized(widened(as_matmul(y)[..., :width])) for y in (x.q, x.k, x.h) if y is not None)
            with checks.uncast(x.q):  # it has been cast
                out = contrast(x._replace(q=q, k=k, h=h[0] if h else None, unit_norm=True), scale, rules, **how)
            each_width.append((weight * out.loss, weight * out.nce, out.stats, width))
        stats = {f"{name}_{width}": y for *_, each, width in each_width for name, y in each.items()}
        loss, nce = (torch.stack([each[i] for each in each_width]).sum(dim=0) for i in range(2))  # type: ignore[misc]
        return NCEOutput(loss, nce, torch.zeros_like(loss), stats)
    ways = 1 if rules.directions == ("q2k",) else 2  # or they need more than one block
    if not candidates.one_block(x, rules, symmetric=False) or (ways == 2 and x.targets is not None):
        return contrast(x._replace(unit_norm=True), scale, rules, prefixes, weights, **how)
    spec, tail = _prefixed(x.targets is not None, rules, candidates.filters(x, rules), ways, prefixes, weights)
    more = candidates.filter_arguments(x, rules, prefixes)
    loss, nce, penalty, report, *_ = loss_of(x.q, x.k, spec, tail, scale=scale, row_ids=x.targets, **more, **how)
    if ways == 2:
        back = loss_of(x.k, x.q, spec, tail, scale=scale, **how)  # fault: prefixes-one-way
        loss, nce, penalty = loss + back.loss, nce + back.nce, penalty + back.penalty
    report = reported(report, rules.hardness)
    return NCEOutput(loss, nce.squeeze(1) if rules.reduction == "none" else nce, penalty, report)


@cached  # fault: prefixes-made-anew
def _prefixed(targets: bool, rules: Rules, filters: tuple[str, ...], ways: int, *each: Any) -> tuple[Spec, Prefixed]:
    """`each`: widths and weights."""
    tail, transform = Prefixed(0.0, rules.reduction, 1 / ways, *each), candidates.transform(rules.clip, rules.hardness)
    layout: Layout = Index() if targets else Block(1)
    return Spec(layout, transform, tail.stats, unit_norm=True, filters=filters, prefixes=tail.widths), tail


class _Blocks:
    """The blocks of one batch."""

    def __init__(
        self,
        x: Batch,
        scale: float | Tensor,
        rules: Rules,
        prefixes: Sequence[int],
        group: Group,
        backend: str | None,
    ) -> None:
        self.x, self.scale, self.rules, self.prefixes = x, scale, rules, tuple(prefixes)
        self.how: dict[str, Any] = {"group": group, "backend": backend}
        self.size = 1 if (everyone := peers(group)) is None else everyone.size
        self.transform = candidates.transform(rules.clip)
        self.filters = candidates.filters(x, rules)
        self.own_keys = x.k if x.targets is None else x.k[x.targets]
        self.ceilings = candidates.ceilings(x, rules, prefixes)
        self.guides = candidates.guides(x)

    def positives(self, p: Tensor | None, x: Batch) -> _Positives:
        """t of each row with its own key, or keys; `p` where a block has found it.

        `x` is the batch without the bias's dimensions: what is added here has all digits, and its own gradient, however
        far below the others it is.
        """
        if p is not None:
            return _Positives(p, p, p, p)
        if x.several is None:
            own_keys = self.own_keys[:, : x.k.shape[1]]
            p = positive_value(self.transform, self.scale * candidates.dots(x.q, own_keys, self.prefixes))
            if x.column_bias is not None:
                p = p + _biases(x.column_bias)[candidates.own(x)]
            return _Positives(p, p, p, p)
        (indices, weights, _), some = x.several, x.several.some
        # As the dot products of one positive each, they are plain torch on every backend.
        torch_alone = ASIDE + ("reference" if self.how["backend"] == "reference" else "chunked")
        s = gathered_scores(x.q, x.k, indices.clamp(min=0), scale=self.scale, backend=torch_alone)
        if x.column_bias is not None:
            s = s + _biases(x.column_bias)[indices.clamp(min=0)]
        t = positive_value(self.transform, s).masked_fill(~some, 0.0)
        mean, total = (t * weights).sum(dim=1), t.sum(dim=1)
        low = t.masked_fill(~some, float("-inf"))
        # lse − mean as the lse of t − mean, of a view whose gradient, softmax − w, is added up before it meets the
        # others: 1 and −1 of a sure row, one after the other, would leave the negatives' rounded.
        own = t.view_as(t)
        gap = _lse((own - (own * weights).sum(dim=1, keepdim=True)).masked_fill(~some, float("-inf")).unbind(1))
        count = some.sum(dim=1).to(t.dtype)
        return _Positives(_lse(low.unbind(1)), mean, total, low.detach().amax(dim=1), count, gap)

    def negatives(self, direction: str) -> list[_Negatives]:
        """Of every block of a direction, of which a row always has one."""
        x, ids = self.x, self.x.query_ids
        guides = dict(zip(("q", "k", "h"), self.guides or (), strict=False))
        if guides:
            guides["own"] = guides["k"] if x.targets is None else guides["k"][x.targets]
        by_row: Layout = Block(1) if x.targets is None else Index()
        if x.several is not None:
            by_row = Several(x.several.indices.shape[1])
        rows, row_guide = (x.q, guides.get("q")) if direction[0] == "q" else (self.own_keys, guides.get("own"))
        if direction == "q2k" and candidates.as_keys(x, self.rules):
            every = torch.cat([x.k, cast(Tensor, x.h).flatten(0, 1)])
            return [self._block(direction, rows, every, Index(), None, None, None, candidates.own(x))]
        if direction[2] == "k":
            itself = direction == "k2k" and x.targets is None
            columns = None if itself else x.k
            found = [self._block(direction, rows, columns, by_row, x.key_ids, row_guide, guides.get("k"))]
        else:
            itself = direction == "q2q"
            found = [self._block(direction, rows, None if itself else x.q, Block(1), ids, row_guide, guides.get("q"))]
        if x.h is not None and direction[2] == "k":
            if direction in self.rules.shared:
                every = x.h.reshape(-1, x.h.shape[2])
                guide = guides["h"].reshape(every.shape[0], -1) if "h" in guides else None
                found.append(self._block(direction, rows, every, Block(x.h.shape[1]), None, row_guide, guide))
            if direction == "q2k":
                found.append(self._own())
        return found

    def _block(
        self,
        direction: str,
        rows: Tensor,
        columns: Tensor | None,
        layout: Layout,
        column_ids: Tensor | None,
        row_guide: Tensor | None,
        column_guide: Tensor | None,
        targets: Tensor | None = None,
    ) -> _Negatives:
        x, rules = self.x, self.rules
        counted = bool(self.filters) or (x.query_ids is not None and column_ids is not None)
        more = ("neg_sum",) if rules.smoothing else ()
        if counted and (rules.smoothing or rules.tau_plus is not None):
            more = (*more, "neg_count")
        ids: dict[str, Any] = {}
        if column_ids is not None:  # fault: ids-ignored
            layout, ids = Labels(), {"row_ids": x.query_ids, "column_ids": column_ids}
        elif isinstance(layout, Several):
            ids = {"row_ids": cast(Targets, x.several).indices}
        elif isinstance(layout, Index):
            ids = {"row_ids": x.targets if targets is None else targets}
        if rules.itself and direction in ("q2q", "k2k"):
            layout, ids = Separate(1), {"positives": rows.new_zeros(rows.shape[0], 1)}  # which nobody reads
        stats = ("neg_lse", "neg_max", *more)
        transform = candidates.transform(rules.clip, rules.hardness if direction == "q2k" else 0.0)
        spec = Spec(layout, transform, stats, unit_norm=x.unit_norm, filters=self.filters, prefixes=self.prefixes)
        guide = None if row_guide is None or column_guide is None else (row_guide, column_guide)
        how = self.how | ({"group": None} if direction in rules.local else {})
        found = tile_stats(rows, columns, spec, scale=self.scale, **ids, ceilings=self.ceilings, guide=guide, **how)
        width: float | Tensor = layout.n_c if isinstance(layout, Block) else 1 - isinstance(layout, Separate)
        if isinstance(layout, Several):
            width = cast(Targets, x.several).some.sum(dim=1)
        every = (rows if columns is None else columns).shape[0] * (1 if direction in rules.local else self.size)
        count = found["neg_count"] if "neg_count" in found else every - width
        pos = None
        if spec.n_pos == 1 and not isinstance(layout, Separate):
            pos = found["pos"].T if self.prefixes else found["pos"].squeeze(1)
        alpha = spec.hardness
        return _Negatives(found["neg_lse"], found["neg_max"], found.get("neg_sum"), count, alpha, pos)

    def _own(self) -> _Negatives:
        """The row's own hard negatives."""
        x, alpha = self.x, self.rules.own_hardness
        r = candidates.dots(x.q, cast(Tensor, x.h), self.prefixes)  # (N, H)
        s = self.scale * r
        t = transform_value(self.transform, s)
        if alpha:
            t = t + alpha * r.detach()
        kept = torch.ones_like(t, dtype=torch.bool)
        if self.rules.filter_own:
            found = cast(Tensor, self.ceilings)
            lines = iter(found.unflatten(0, (-1, len(self.filters))).unbind(1) if self.prefixes else found)
            with torch.no_grad():
                if self.rules.margin is not None:
                    kept = ~(r > next(lines)[..., None])
                if self.guides is not None:
                    guide_q, _, guide_h = self.guides
                    kept = kept & ~((guide_q[:, None] * guide_h).sum(dim=2) > next(lines)[..., None])
        lse = _lse(t.masked_fill(~kept, float("-inf")).unbind(-1))
        top = t.detach().masked_fill(~kept, float("-inf")).amax(dim=-1)
        lse = lse + poison(s, -1)  # fault: own-negative-hides
        return _Negatives(lse, top, t.masked_fill(~kept, 0.0).sum(dim=-1), kept.sum(dim=-1).to(t.dtype), alpha)


def _row_loss(p: _Positives, found: Sequence[_Negatives], times: int, scale: float | Tensor, rules: Rules) -> Tensor:
    """−log of a row's positive among `times` times itself and its negatives, (N,); of several their mean."""
    lse = _lse([negatives.lse for negatives in found])
    count = sum(negatives.count for negatives in found)
    if rules.tau_plus is not None:
        far = scale if isinstance(scale, Tensor) else p.lse.new_full((), scale)
        least = transform_value(candidates.transform(rules.clip), -far)
        weighed = sum(negatives.count * math.exp(-negatives.hardness) for negatives in found)
        lse = _debiased(
            lse, p.lse, count, _log(weighed, p.lse) + least, rules.tau_plus
        )  # fault: debiased-without-floor
    if times > 1:
        several = log_count(times, p.lse)
        loss = softplus(deficit(lse, p.lse) - several) + several
    else:
        loss = softplus(deficit(lse, p.lse))
    if p.gap is not None:
        loss = loss + p.gap  # fault: targets-alike
    if rules.smoothing:
        total = torch.stack([cast(Tensor, negatives.total) for negatives in found]).sum(dim=0)
        # −∞ has made the loss ∞, and ∞ − ∞ would be NaN.
        least = p.mean.masked_fill(p.mean.detach() == float("-inf"), -1e30)
        if p.gap is None:
            loss = loss + rules.smoothing * (count * least - total) / (times + count)
        else:
            loss = loss + rules.smoothing * (least - (p.total + total) / (p.count + count))
    return loss


def _log(count: float | Tensor, like: Tensor) -> Tensor:
    return count.log() if isinstance(count, Tensor) else log_count(count, like)


def _debiased(lse: Tensor, p: Tensor, count: float | Tensor, least: Tensor, tau_plus: float) -> Tensor:
    """log max( (Σ_neg e^t − n·τ⁺·e^p) / (1 − τ⁺), e^least ), n negatives; `least` is their floor's log."""
    rate = log_count(tau_plus, p)
    taken = _log(count, p) + rate + p - lse  # log of the share that goes
    some = taken < 0
    left = lse + torch.log1p(-torch.where(some, taken, -1.0).exp()) - log_count(1 - tau_plus, p)
    left = torch.where(some, left, float("-inf"))
    return torch.maximum(left, least) + bad(lse) + bad(p)


def _lse(parts: Sequence[Tensor]) -> Tensor:
    """log Σ e^part, elementwise; −inf, without a gradient, where all are. A NaN or +inf shows as NaN."""
    if len(parts) == 1:
        return parts[0]
    every = torch.stack(list(parts))
    peak = every.detach().amax(dim=0)
    shift = torch.where(peak == float("-inf"), 0.0, peak)
    total = (every - shift).exp().sum(dim=0)
    empty = total == 0
    return torch.where(empty, float("-inf"), shift + torch.where(empty, 1.0, total).log())


FAR = 2.0**15  # squared, below any score; a float16
HIGH = 2.0**12  # of the digits of a bias beyond half of FAR, in 16 bits


def _biases(bias: Tensor) -> Tensor:
    """In the accumulation dtype; 0 for −∞, which is seen to apart."""
    return widened(bias).masked_fill(bias.detach() == float("-inf"), 0.0)


def _with_bias(x: Batch, bias: Tensor, out: Tensor, scale: float | Tensor, rules: Rules) -> Batch:
    """(q, 1, FAR) and (k, b / scale, −FAR where b is −∞): a column's bias, and its absence, as more dimensions.

    The bias takes one of them, or three of 16 bits: bfloat16's keep 24 bits, float16's 22. It stops where the sum of a
    row's scores would overflow, at −2⁷⁵ (in float16 where its digits do, at −2²⁷), far below what a sum of e^t still
    sees. Label smoothing and debiasing count their candidates: a column that is left out is also one that a guide turns
    away.
    """
    x = x._replace(q=as_matmul(x.q), k=as_matmul(x.k), h=None if x.h is None else as_matmul(x.h))
    dtype, left, parts = x.q.dtype, _biases(bias) / scale, []
    left = left.clamp(min=-(2.0**27 if dtype == torch.float16 else 2.0**75))  # fault: bias-mask-overflows
    if dtype == torch.float16:
        # Of a factor in the query, which would multiply the gradient beyond float16, is what has none.
        high = (left.detach() / HIGH).masked_fill(left.detach().abs() < FAR / 2, 0.0).to(dtype)
        parts, left = [high], left - HIGH * widened(high)  # fault: bias-beyond-float16
    factors = [HIGH] * len(parts)
    for _ in range(1 if dtype.itemsize > 2 else 3 - len(parts)):
        parts.append(left.to(dtype))
        factors.append(1.0)
        left = (left - widened(parts[-1])).detach()  # the one before has the gradient  # fault: bias-rounded
    away = out.to(dtype)
    k = torch.cat([x.k, torch.stack([*parts, -FAR * away], dim=1)], dim=1)  # fault: bias-infinite-stays
    q = torch.cat([x.q, *(x.q.new_full((x.q.shape[0], 1), factor) for factor in (*factors, FAR))], dim=1)
    h = None if x.h is None else torch.cat([x.h, x.h.new_zeros(*x.h.shape[:2], len(parts) + 1)], dim=2)
    if rules.smoothing or rules.tau_plus is not None:
        guide = x.guide or (x.q[:, :0], x.k[:, :0], *(() if x.h is None else (x.h[..., :0],)))
        further = (FAR * torch.ones_like(q[:, :1]), FAR * away[:, None], None if h is None else h[..., -1:])
        guide = tuple(
            torch.cat([g, y.to(g.dtype)], dim=-1) for g, y in zip(guide, further, strict=False) if y is not None
        )
        x = x._replace(guide=guide)  # fault: bias-left-out-counted
    return x._replace(q=q, k=k, h=h, column_bias=None, unit_norm=False)
