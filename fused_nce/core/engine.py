"""The engine's two entries: differentiable statistics for any torch tail, and a loss and its gradients in one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fused_nce.core import batch, checks, dispatch
from fused_nce.core import flop as _flop  # noqa: F401  (the ops' formulas)
from fused_nce.core.group import Group, Peers, peers
from fused_nce.core.ops import Scores  # and defines torch.ops.fused_nce
from fused_nce.core.parts import no_number
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.spec import Block, Index, Labels, Spec
from fused_nce.core.statistics import STATISTIC
from fused_nce.core.tails import REDUCTIONS, Nce, Tail


@no_number
class LossParts(NamedTuple):
    """What one sweep gives. `loss`, `nce` and `penalty` are differentiable; the rest is detached, for logging."""

    loss: Tensor  # 0-d
    nce: Tensor  # 0-d, or the elements, (N, P) or (N, 1), under reduction="none"
    penalty: Tensor  # 0-d
    report: dict[str, Tensor]  # the tail's `REPORT`, 0-d each, or (report_groups,)
    pos: Tensor  # (N, P) transformed scores of the positives
    rows: dict[str, Tensor]  # (N,) each, the spec's statistics


class Swept(NamedTuple):
    """`LossParts`, its statistics in one tensor."""

    loss: Tensor
    nce: Tensor
    penalty: Tensor
    report: dict[str, Tensor]
    pos: Tensor
    rows: Tensor  # (S, N)


class Term(NamedTuple):
    """One of the problems that `tile_losses` adds up, as `tile_loss` takes them."""

    q: Tensor  # (N, D)
    k: Tensor  # (M, D)
    spec: Spec
    tail: Tail
    offset: int = 0
    report_groups: int = 1


class LossSum(NamedTuple):
    """Of several problems. `loss`, `nce` and `penalty` are 0-d and differentiable, `report` is detached."""

    loss: Tensor
    nce: Tensor
    penalty: Tensor
    report: Tensor  # (all their report_groups, len(tail.REPORT))


# On these, problems of so few scores in all that the L2 holds them (csrc/cuda/plan.h) go into one op: their launches
# would take longer than their work.
LAUNCHES_COUNT_ON = ("cuda",)
FEW_SCORES = 8 << 20


def tile_stats(
    q: Tensor,  # (N, D) queries
    k: Tensor | None,  # (M, D) keys; None: q
    spec: Spec,
    *,
    scale: float | Tensor = 1.0,
    offset: int = 0,
    bias: float | Tensor | None = None,
    positives: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    ceilings: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    group: Group = None,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Statistics of the scores s = scale·⟨q_i, k_j⟩, differentiable in q, k, tensor `scale` and `bias`, and positives.

    Costs one score GEMM, and three more in a backward that wants both gradients. What has no gradient comes detached:
    maxima, undefined at ties, and counts.

    Args:
        q: (N, D).
        k: (M, D), for `Block` whole images of `n_c` columns; None is q, with one gradient for both roles.
        spec: layout, transform and the statistics wanted.
        scale: factor of the dot product, any finite number; a 0-d tensor is learnable.
        offset: the image of row 0; under `drop_self`, in other layouts than `Block`, the column that row 0 is.
        bias: of the `Bias` transform; a 0-d tensor is learnable.
        positives: (N, P) raw scores, of `Separate`.
        row_ids: (N,) int64, the targets of `Index` or the rows' `Labels`.
        column_ids: (M,) int64, the columns' `Labels`; None with k=None is `row_ids`.
        ceilings: (F, N), a line for each of `spec.filters`, in the accumulation dtype: a column whose dot product (for
            `guide`, whose guides' dot product) is above the row's leaves the negatives.
        guide: (N, G) and (M, G), of the filter `guide`, in the accumulation dtype.
        group: the processes whose keys are columns too; row ids and offset are among this process's own.
        backend: a name of `fused_nce.backends()`, or None to choose.

    Returns:
        `pos` (N, P), (N,) each of `spec.stats`, (M,) each of `spec.columns` as `column_` and its name; float32 (float64
        for float64 inputs). With K prefixes `pos` is (N, K·P) and each statistic (K, N).

    Raises:
        ValueError, TypeError: naming the argument, the value seen and the value needed.

    Example:
        ```
        from fused_nce.core.spec import Block, Spec
        rows = tile_stats(torch.randn(8, 16), torch.randn(8, 16), Spec(Block(1)), scale=0.1)
        margin = (rows["neg_lse"] - rows["pos"].squeeze(1)).relu().mean()
        ```
    """
    scores = _prepare(q, k, spec, scale, offset, bias, positives, row_ids, column_ids, ceilings, guide)
    everyone = peers(group)
    if everyone is not None:
        from fused_nce.core.distributed import remote, ring

        if everyone.ring:
            backend = ring.code(everyone, backend or "", spec)
        elif spec.columns:
            raise ValueError(f"group: got columns {spec.columns}, whose rows lie on other processes, need ring=True")
        else:
            (scores,) = remote.spread(scores, spec, everyone)
    pos, rows, columns = torch.ops.fused_nce.stats(*scores, backend or "")
    named = dict(zip(spec.stats, by_statistic(spec, rows), strict=True))
    named |= {f"column_{name}": x for name, x in zip(spec.columns, columns.unbind(0), strict=True)}
    for name, x in named.items():
        if STATISTIC[name.removeprefix("column_")].weight is None:
            named[name] = x.detach()
    return {"pos": pos, **named}


def tile_loss(
    q: Tensor,  # (N, D) queries
    k: Tensor | None,  # (M, D) keys; None: q
    spec: Spec,
    tail: Tail,
    *,
    scale: float | Tensor = 1.0,
    offset: int = 0,
    bias: float | Tensor | None = None,
    positives: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    ceilings: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    parts: bool = True,
    report_groups: int = 1,
    group: Group = None,
    backend: str | None = None,
) -> LossParts:
    """The tail's loss, its gradients leaving with the forward: three GEMMs, two where one side wants no gradient.

    `nce` and `penalty` stay differentiable apart from `loss`; a backward that reaches them recomputes the scores.
    Column statistics, which every weight needs, cost one GEMM more; with a `group`, three.

    With a `group`, rows meet the keys of all its processes. Each process has its own rows' loss, under "sum" times the
    number of processes: the mean over the processes is one process's on the whole batch, and so is, under DDP, every
    gradient. Losses must enter what is differentiated with the same factor on every process.

    Args:
        q: (N, D).
        k: (M, D), or None; as in `tile_stats`.
        spec: its statistics must be those that the tail reads, at least.
        tail: from statistics to the loss.
        scale: factor of the dot product, any finite number; a 0-d tensor is learnable.
        offset: as in `tile_stats`.
        bias: of the `Bias` transform; a 0-d tensor is learnable.
        positives: (N, P) raw scores, of `Separate`.
        row_ids: (N,) int64, as in `tile_stats`.
        column_ids: (M,) int64, as in `tile_stats`.
        ceilings: (F, N), as in `tile_stats`.
        guide: (N, G) and (M, G), as in `tile_stats`.
        parts: False where `loss` alone is differentiated: q and k are not kept, a bank may change before the backward.
        report_groups: interleaved groups of rows; row i belongs to group i mod `report_groups`. Each has a line of the
            report of its own.
        group: as in `tile_stats`.
        backend: a name of `fused_nce.backends()`, or None to choose.

    Raises:
        ValueError, TypeError: naming the argument, the value seen and the value needed.

    Example:
        ```
        from fused_nce.core import spec, tails
        one = spec.Spec(spec.Block(1))
        tile_loss(torch.randn(8, 16), torch.randn(8, 16), one, tails.Nce(), scale=0.1).loss
        ```
    """
    _check_tail(spec, tail)
    q, k = as_matmul(q), k if k is None else as_matmul(k)
    if k is None and isinstance(spec.layout, Labels) and column_ids is None:
        column_ids = row_ids
    given = {"bias": bias, "positives": positives, "row_ids": row_ids, "column_ids": column_ids}
    filters: dict[str, Any] = {"ceilings": ceilings, "guide": guide}
    checks.check_scores(q, k, spec, scale, offset, **given, **filters)  # type: ignore[arg-type]
    report_groups = checks.checked_int("report_groups", report_groups)
    if report_groups < 1 or q.shape[0] % report_groups:
        raise ValueError(f"report_groups: got {report_groups} for N = {q.shape[0]} rows, need a divisor of them")
    out = loss_of(
        *(q, k, spec, tail),
        scale=scale,
        offset=offset,
        bias=bias,
        positives=positives,
        row_ids=row_ids,
        column_ids=column_ids,
        ceilings=ceilings,
        guide=guide,
        parts=parts,
        report_groups=report_groups,
        group=group,
        backend=backend,
    )
    rows = dict(zip(spec.stats, by_statistic(spec, out.rows), strict=True))
    return LossParts(out.loss, out.nce, out.penalty, out.report, out.pos, rows)


def by_statistic(spec: Spec, rows: Tensor) -> tuple[Tensor, ...]:
    """(N,) of each statistic; with prefixes (K, N)."""
    return rows.unflatten(0, (spec.n_widths, -1)).unbind(1) if spec.prefixes else rows.unbind(0)


def loss_of(
    q: Tensor,  # (N, D)
    k: Tensor | None,  # (M, D)
    spec: Spec,
    tail: Tail,
    *,
    scale: float | Tensor = 1.0,
    offset: int = 0,
    bias: float | Tensor | None = None,
    positives: Tensor | None = None,
    own_keys: Tensor | None = None,  # (N, D), no gradient
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    ceilings: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    normalize: bool = False,
    twins: bool = False,
    parts: bool = True,
    report_groups: int = 1,
    group: Group = None,
    backend: str | None = None,
) -> Swept:
    """`tile_loss` for a loss that has checked its arguments, by the names that its caller knows.

    A plain call (eager, no group, no transform) is one function of the backend; every other is an op of `core/ops.py`.

    Beside the arguments of `tile_loss` there are `own_keys`, (N, D), of `Separate`: a key a row, whose score is its
    positive; `normalize`: rows of q and k (of `own_keys` instead of k where they are given) get norm 1 first; and
    `twins`: q and k are two views, (N, D), whose rows side by side are one tensor in both roles.
    """
    if k is None and column_ids is None and isinstance(spec.layout, Labels):
        column_ids = row_ids
    factor, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    if bias is not None and not isinstance(bias, Tensor):
        bias = q.new_full((), float(bias), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if group is None and not spec.filters and not torch.compiler.is_compiling():
        leaves = (q, k, tensor, bias, positives, own_keys, row_ids, column_ids)
        options = factor, offset, normalize, parts, report_groups, backend or ""
        found = dispatch.whole_loss(spec, tail, leaves, *options, True) if twins else None
        if found is None:
            q, k = (_together(q, k), None) if twins else (q, k)
            found = dispatch.whole_loss(spec, tail, (q, k, *leaves[2:]), *options)
        if found is not None:
            return Swept(*found)
    elif twins:
        q, k = _together(q, k), None
    if normalize:
        q = normalized(q)
        k, own_keys = (k, normalized(own_keys)) if own_keys is not None else (k if k is None else normalized(k), None)
    if own_keys is not None:
        with checks.uncast(q):
            positives = scale * (widened(q) * widened(own_keys)).sum(dim=1, keepdim=True)
    q, k = as_matmul(q), k if k is None else as_matmul(k)
    for name, x in {"q": q, "k": k, "scale": scale, "bias": bias, "positives": positives}.items():
        checks.check_no_transform(name, x)
    guide_q, guide_k = guide or (None, None)
    ids = (row_ids, column_ids)
    scores = Scores(q, k, tensor, bias, positives, *ids, ceilings, guide_q, guide_k, factor, spec.code, offset)
    everyone = peers(group)
    if everyone is None:
        return _sweep(scores, spec, tail, parts, report_groups, backend)
    return _sweeps(scores, spec, tail, parts, report_groups, everyone, backend)


def _together(view0: Tensor, view1: Tensor | None) -> Tensor:
    """(2N, D), twins side by side."""
    return torch.stack((view0, cast(Tensor, view1)), dim=1).flatten(0, 1)


def widened(x: Tensor) -> Tensor:
    """x in the dtype that everything is accumulated in: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalized(x: Tensor) -> Tensor:
    """Rows of unit norm, in x's dtype; the norm in float32 at least, NaN if beyond it. A zero row stays zero."""
    wide = widened(x)
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    norm = norm + 0 * norm  # x / ∞ would be zeros like any others  # fault: norm-overflows
    return (wide / norm.clamp(min=1e-12)).to(x.dtype)


def tile_losses(
    terms: Sequence[Term], *, scale: float | Tensor = 1.0, group: Group = None, backend: str | None = None
) -> LossSum:
    """The sum of several `tile_loss`es, whose tails' numbers have one meaning.

    On a GPU, small ones share their launches; the values are those of the sum.

    Args:
        terms: the problems.
        scale: factor of every dot product, any finite number; a 0-d tensor is learnable.
        group: as in `tile_loss`.
        backend: a name of `fused_nce.backends()`, or None to choose.

    Raises:
        ValueError, TypeError: naming the argument, the value seen and the value needed.
    """
    few = sum(p.q.shape[0] * p.k.shape[0] for p in terms) <= FEW_SCORES
    if few and len(terms) > 1 and group is None and terms[0].q.device.type in LAUNCHES_COUNT_ON:
        scores = []
        for p in terms:
            _check_tail(p.spec, p.tail)
            scores.append(_prepare(p.q, p.k, p.spec, scale, p.offset, None, None, None, None))
        if backend in (None, "cuda") and batch.can_share(scores, [p.spec for p in terms], [p.tail for p in terms]):
            return _shared(scores, terms, backend)
    found, lines = [], []
    for p in terms:
        out = tile_loss(
            p.q,
            p.k,
            p.spec,
            p.tail,
            scale=scale,
            offset=p.offset,
            report_groups=p.report_groups,
            group=group,
            backend=backend,
        )
        found.append((out.loss, out.nce, out.penalty))
        lines.append(torch.stack([x.reshape(p.report_groups) for x in out.report.values()], dim=1))
    # Each summed by itself, so that an unused one has upstream gradient None: a 0 would compute the scores again.
    loss, nce, penalty = (torch.stack(each).sum() for each in zip(*found, strict=True))
    return LossSum(loss, nce, penalty, torch.cat(lines))


def _shared(scores: Sequence[Scores], terms: Sequence[Term], backend: str | None) -> LossSum:
    """One call of the op for all."""
    leaves = [*(x for each in scores for x in (each.q, each.k)), scores[0].scale_tensor]
    found = torch.ops.fused_nce.losses(
        [each.q for each in scores],
        [each.keys for each in scores],
        *(scores[0].scale_tensor, scores[0].scale),
        [each.spec for each in scores],
        [p.tail.code for p in terms],
        [p.offset for p in terms],
        [p.report_groups for p in terms],
        _needs(leaves),
        backend or "",
    )
    return LossSum(*found[:4])


def _sweep(x: Scores, spec: Spec, tail: Tail, parts: bool, report_groups: int, backend: str | None) -> Swept:
    """One call of the op."""
    loss, nce, penalty, report, pos, rows, *_ = torch.ops.fused_nce.loss(
        *x, tail.code, _needs(x.differentiable), parts, report_groups, backend or ""
    )
    lines = (report[0] if report_groups == 1 else report.T).unbind(0)
    return Swept(loss, nce, penalty, dict(zip(tail.REPORT, lines, strict=True)), pos, rows)


def _needs(leaves: Sequence[Tensor | None]) -> list[bool]:
    """Whose gradients the op works out."""
    graph = torch.is_grad_enabled()  # fault: gradient-work-under
    return [graph and x is not None and _wants_gradient(x) for x in leaves]  # fault: frozen-side-pays


def _wants_gradient(x: Tensor) -> bool:
    """A tensor inside `torch.vmap` says no, though what it is a batch of may be differentiated outside."""
    if not torch._C._functorch.is_batchedtensor(x):
        return x.requires_grad
    # A graph being traced cannot look: better a gradient too many than one dropped.
    return torch.compiler.is_compiling() or _wants_gradient(torch._C._functorch.get_unwrapped(x))


def _sweeps(
    x: Scores, spec: Spec, tail: Tail, parts: bool, report_groups: int, everyone: Peers, backend: str | None
) -> Swept:
    """This process's part of the loss of all: its rows; with column statistics, half of it from its keys as rows."""
    from fused_nce.core.distributed import remote, ring

    if tail.reduction == "sum":
        tail = replace(tail, weight=tail.weight * everyone.size)
    if everyone.ring:
        return _sweep(x, spec, tail, parts, report_groups, ring.code(everyone, backend or "", spec))
    both = bool(spec.columns)
    tail = replace(tail, weight=tail.weight / 2) if both else tail
    scores = remote.spread(x, spec, everyone, tail.code)
    there = _sweep(scores[0], spec, tail, parts, report_groups, backend)
    if not both:
        return there
    back = _sweep(scores[1], spec, replace(tail, penalty=0.0), parts, 1, backend)
    nce = remote.back_at(spec, back.nce, x) if tail.reduction == "none" else back.nce
    return there._replace(loss=there.loss + back.loss, nce=there.nce + nce)


def as_matmul(x: Tensor) -> Tensor:
    """x as `matmul` would take it: under autocast in its dtype, differentiably. What is no tensor stays for checks."""
    if not isinstance(x, Tensor) or x.dtype not in checks.CASTABLE or not checks.is_cast(x):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check_tail(spec: Spec, tail: Tail) -> None:
    """A tail that finds in the spec what it reads."""
    if not set(tail.stats) <= set(spec.stats):
        raise ValueError(f"spec: got statistics {spec.stats}, need all of {tail.stats} for a loss")
    checks.check_choice("tail.reduction", tail.reduction, REDUCTIONS)
    checks.check_number("tail.penalty", tail.penalty, at_least=0)
    checks.check_number("tail.weight", tail.weight)
    if (tail.widths if isinstance(tail, Prefixed) else ()) != spec.prefixes:
        raise ValueError(f"tail: got {tail.code} with prefixes {spec.prefixes}, need Prefixed of those widths")
    if tail.penalty and spec.prefixes:
        raise ValueError(f"tail.penalty: got {tail.penalty} with prefixes {spec.prefixes}, need 0")
    if tail.READS_POS and isinstance(spec.layout, Labels):
        raise ValueError(f"spec: got the layout {spec.layout.code}, need one with a fixed number of positives")
    if tail.READS_POS and spec.drop_self and spec.n_pos < 1:
        raise ValueError(f"spec: got {spec.code}, which leaves a row no positive, need at least one for {tail.NAME}")
    two_way = isinstance(tail, Nce) and isinstance(spec.layout, (Block, Index)) and "neg_lse" in spec.columns
    if spec.columns and not two_way:
        raise ValueError(f"spec: got columns {spec.columns} with {tail.NAME}, need neg_lse, nce, and Block or Index")


def _prepare(
    q: Tensor,
    k: Tensor | None,
    spec: Spec,
    scale: float | Tensor,
    offset: int,
    bias: float | Tensor | None,
    positives: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    ceilings: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
) -> Scores:
    """Checked inputs in the ops' order, cast as `matmul` would under autocast (differentiably)."""
    q, k = as_matmul(q), k if k is None else as_matmul(k)
    if k is None and isinstance(spec.layout, Labels) and column_ids is None:
        column_ids = row_ids
    given: dict[str, Any] = {
        "positives": positives,
        "row_ids": row_ids,
        "column_ids": column_ids,
        "ceilings": ceilings,
        "guide": guide,
    }
    checks.check_scores(q, k, spec, scale, offset, bias=bias, **given)
    factor, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    if bias is not None and not isinstance(bias, Tensor):
        bias = q.new_full((), float(bias), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    guide_q, guide_k = guide or (None, None)
    ids = (row_ids, column_ids)
    return Scores(q, k, tensor, bias, positives, *ids, ceilings, guide_q, guide_k, factor, spec.code, offset)
