"""The torch definition of every atom: value, derivative, and how two partial results merge.

These are the oracle for the C++ twins in `csrc/atoms.h` (one parity test compares them) and the very functions that
the `reference` and `chunked` backends run. N rows, M columns, P positives a row; s raw score, t transformed, w = dL/ds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from fused_nce.core.spec import Bias, Block, Index, Labels, TanhClip, Transform

if TYPE_CHECKING:
    from fused_nce.core.problem import Problem

# ---- layouts ----------------------------------------------------------------------------------------------------


def image_of_rows(layout: Block, rows: range, offset: int, device: torch.device) -> Tensor:
    """The image that each row of `rows` belongs to, (len(rows),) int64."""
    index = torch.arange(rows.start, rows.stop, device=device)
    return index // layout.rows_per_image + offset


def row_ids(problem: Problem, rows: range) -> Tensor | None:
    """The id of each row, (len(rows),) int64; None where no column is a positive."""
    layout = problem.spec.layout
    if isinstance(layout, Block):
        return image_of_rows(layout, rows, problem.offset, problem.q.device)
    return None if problem.row_ids is None else problem.row_ids[rows.start : rows.stop]


def column_ids(problem: Problem, columns: range) -> Tensor:
    """The id of each column, (len(columns),) int64."""
    if isinstance(problem.spec.layout, Labels):
        return cast(Tensor, problem.column_ids)[columns.start : columns.stop]
    index = torch.arange(columns.start, columns.stop, device=problem.q.device)
    return index // problem.spec.layout.n_c if isinstance(problem.spec.layout, Block) else index


def self_columns(problem: Problem, rows: range) -> Tensor:
    """The column that each row itself is, (len(rows),) int64."""
    layout = problem.spec.layout
    shift = problem.offset * (layout.n_c if isinstance(layout, Block) else 1)
    return torch.arange(rows.start + shift, rows.stop + shift, device=problem.q.device)


def positive_columns(problem: Problem, rows: range) -> Tensor:
    """The columns of each row's positives where their number is fixed, (len(rows), P) int64."""
    layout = problem.spec.layout
    if isinstance(layout, Index):
        return cast(Tensor, problem.row_ids)[rows.start : rows.stop, None]
    layout = cast(Block, layout)
    first = image_of_rows(layout, rows, problem.offset, problem.q.device) * layout.n_c
    place = torch.arange(problem.spec.n_pos, device=first.device)
    if problem.spec.drop_self:  # the own place within the image is skipped
        place = place + (place >= (self_columns(problem, rows) - first)[:, None])
    return first[:, None] + place


def at_positives(problem: Problem, columns: Tensor | None) -> Tensor | None:
    """(S', M) column statistics as each positive sees them, (S', N, P)."""
    return None if columns is None else columns[:, positive_columns(problem, range(problem.n))]


class Sets(NamedTuple):
    """Which columns of a tile are in each row's sets, (N, m) bool."""

    pos: Tensor
    neg: Tensor
    all: Tensor


def sets(problem: Problem, rows: range, columns: range) -> Sets:
    """The sets of one tile."""
    ids = row_ids(problem, rows)
    own = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=problem.q.device)
    if ids is not None:
        own = ids[:, None] == column_ids(problem, columns)[None, :]
    kept = torch.ones_like(own)
    if problem.spec.drop_self:
        index = torch.arange(columns.start, columns.stop, device=own.device)
        kept = self_columns(problem, rows)[:, None] != index[None, :]
    return Sets(own & kept, ~own & kept, kept)


# ---- transforms -------------------------------------------------------------------------------------------------


# |t| < c, so e^t needs no shift while e^±c and its sum over 2^60 columns are normal float32 numbers: no max pass, and
# partial sums just add. Shifting by c, as by any constant, would round t − c: 16 u a term at c = 20 and t near 0.
SHIFTLESS_CLIP = 43.0


def transform_value(transform: Transform, s: Tensor, bias: float | Tensor = 0.0) -> Tensor:
    """t(s)."""
    if isinstance(transform, Bias):
        return s + bias
    return transform.c * torch.tanh(s / transform.c) if isinstance(transform, TanhClip) else s


def transform_slope(transform: Transform, t: Tensor) -> Tensor:
    """dt/ds, from the value t: no second tanh. dt/db of a bias is the same 1."""
    return 1 - (t / transform.c) ** 2 if isinstance(transform, TanhClip) else torch.ones_like(t)


# ---- statistics -------------------------------------------------------------------------------------------------


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z). Not `F.softplus`, which turns linear at 20 and is off by 2e-9 there."""
    return -torch.nn.functional.logsigmoid(-z)


Found = Mapping[str, Tensor]  # finished statistics by name, broadcasting against the scores


@dataclass(frozen=True)
class Statistic:
    """A reduction of one row's scores, or one column's.

    Attributes:
        over: `pos`, `neg` or `all`: a set of `Sets`.
        of: `t` (transformed scores) or `s` (raw: the penalty has to see what the clip saturates).
        empty: what a score outside the set becomes: it leaves the fold unchanged.
        fold: (scores, dim) to the statistic.
        merge: two partial results to one; column splits, chunks and ranks combine through it.
        weight: (scores, finished statistics) to d statistic / d score, or None where it is not differentiable.
        derive: the statistic from finished others; it has no fold of its own.
        reads: those others, which a spec must name beside it.
        poisoned: the fold would hide a score that is not finite.
    """

    over: str
    of: str
    empty: float
    fold: Callable[[Tensor, int], Tensor]
    merge: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Tensor, Found], Tensor] | None
    derive: Callable[[Found], Tensor] | None = None
    reads: tuple[str, ...] = ()
    poisoned: bool = False


def _lse(over: str) -> Statistic:
    """log Σ e^t."""
    name = f"{over}_lse"
    return Statistic(
        over=over,
        of="t",
        empty=float("-inf"),
        fold=torch.logsumexp,
        merge=torch.logaddexp,
        weight=lambda t, found: torch.exp(t - found[name]),
        poisoned=over == "neg",
    )


def _max(over: str) -> Statistic:
    """For ranking the positives; its gradient is undefined at ties, and no loss asks for it."""
    return Statistic(over=over, of="t", empty=float("-inf"), fold=torch.amax, merge=torch.maximum, weight=None)


def _sum(over: str, of: str, term: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor] | None) -> Statistic:
    """Σ term(x). `empty` is where the term vanishes: 0, or −inf for those that are a log of 1 + e^x."""
    return Statistic(
        over=over,
        of=of,
        empty=float("-inf") if term is softplus else 0.0,
        fold=lambda x, dim: term(x).sum(dim=dim),
        merge=torch.add,
        weight=None if slope is None else lambda x, _: slope(x),
        poisoned=term is softplus,
    )


def _gap(found: Found) -> Tensor:
    """pos_lse − mean pos; 0 for a row without positives."""
    count = found["pos_count"]
    return torch.where(count > 0, found["pos_lse"] - found["pos_sum"] / count, torch.zeros_like(count))


STATISTIC = {
    "neg_lse": _lse("neg"),
    "pos_lse": _lse("pos"),
    "neg_max": _max("neg"),
    "pos_max": _max("pos"),
    "square": _sum("all", "s", torch.square, lambda s: 2 * s),
    "neg_softplus": _sum("neg", "t", softplus, torch.sigmoid),
    "pos_sum": _sum("pos", "t", lambda t: t, torch.ones_like),
    "pos_count": Statistic(
        over="pos",
        of="t",
        empty=float("-inf"),
        fold=lambda t, dim: (t != float("-inf")).sum(dim=dim).to(t.dtype),
        merge=torch.add,
        weight=None,
    ),
    # One statistic, because its weight is small where those of its parts cancel: (1 − ν) − 1 keeps no digit of ν.
    "pos_gap": Statistic(
        over="pos",
        of="t",
        empty=0.0,
        fold=lambda t, dim: t.new_zeros(t.shape[1 - dim]),
        merge=torch.add,
        weight=lambda t, found: torch.exp(t - found["pos_lse"]) - 1 / found["pos_count"],
        derive=_gap,
        reads=("pos_lse", "pos_sum", "pos_count"),
    ),
}


def poison(s: Tensor, dim: int = 1) -> Tensor:
    """0 for a row (or, over dim 0, a column) of finite scores, NaN otherwise.

    tanh(±inf) = ±1, and a max drops a NaN: without this, a NaN or Inf in the features could leave a finite loss. Added
    to `neg_lse`, it reaches the row's loss and, through the weights, every gradient that the bad score belongs to.
    """
    return s.sum(dim=dim) * 0


# ---- tiles ------------------------------------------------------------------------------------------------------


def fold_tile(names: Sequence[str], s: Tensor, t: Tensor, of: Sets, dim: int = 1) -> Tensor:
    """Statistics of one tile of scores: of its rows (dim 1), (S, N), or of its columns (dim 0), (S, m).

    Args:
        names: the statistics.
        s: (N, m) raw scores.
        t: (N, m) transformed scores.
        of: each row's sets.
        dim: what is reduced.
    """
    found = []
    for name in names:
        stat = STATISTIC[name]
        x = s if stat.of == "s" else t
        value = stat.fold(x.masked_fill(~getattr(of, stat.over), stat.empty), dim)
        found.append(value + poison(s, dim) if stat.poisoned else value)
    return torch.stack(found)


def merge_two(names: Sequence[str], one: Tensor, two: Tensor) -> Tensor:
    """Two partial (S, N) statistics as one."""
    return torch.stack([STATISTIC[name].merge(x, y) for name, x, y in zip(names, one, two, strict=True)])


def merge_tiles(names: Sequence[str], parts: list[Tensor]) -> Tensor:
    """Partial (S, N) statistics as one, finished.

    In pairs of pairs: a thousand parts one after the other rounded neg_lse a thousand times, 14 times the error of one.
    """
    while len(parts) > 1:
        pairs = [merge_two(names, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    named = dict(zip(names, parts[0], strict=True))
    derived = {name: rule(named) for name in names if (rule := STATISTIC[name].derive) is not None}
    return torch.stack([derived.get(name, value) for name, value in named.items()]) if derived else parts[0]


def tile_weights(
    names: Sequence[str],
    s: Tensor,  # (N, m) raw scores
    t: Tensor,  # (N, m) transformed scores
    of: Sets,
    found: Tensor,  # (S, N) finished statistics of the rows, or (S, m) of the columns
    d: Tensor,  # the same shape, dL/d statistic
    dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """What the statistics contribute to (dL/dt, dL/ds beside it), each (N, m). The caller adds `pos`'s own part."""
    named = {name: row.unsqueeze(dim) for name, row in zip(names, found, strict=True)}
    w = {"t": torch.zeros_like(s), "s": torch.zeros_like(s)}
    for name, d_row in zip(names, d, strict=True):
        stat = STATISTIC[name]
        if stat.weight is not None:
            part = d_row.unsqueeze(dim) * stat.weight(s if stat.of == "s" else t, named)
            w[stat.of] += part.masked_fill(~getattr(of, stat.over), 0.0)
    return w["t"], w["s"]
