"""The torch definition of every atom: value, derivative, and how two partial results merge.

These are the oracle for the C++ twins in `csrc/atoms.h` (one parity test compares them) and the very functions that
the `reference` and `chunked` backends run. N rows, M columns, P positives a row; s raw score, t transformed, w = dL/ds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fused_nce.core.spec import (
    Bias,
    Block,
    Dist,
    Hardness,
    Identity,
    Index,
    Labels,
    Several,
    SqDist,
    TanhClip,
    Transform,
)
from fused_nce.core.statistics import STATISTIC, Scores, Sets

if TYPE_CHECKING:
    from fused_nce.core.problem import Problem

# ---- layouts ----------------------------------------------------------------------------------------------------


def image_of_rows(layout: Block, rows: range, offset: int, device: torch.device) -> Tensor:
    """The image that each row of `rows` belongs to, (len(rows),) int64."""
    index = torch.arange(rows.start, rows.stop, device=device)
    return index // layout.rows_per_image + offset  # fault: offset-ignored, rows_per_image-off-one


def row_ids(problem: Problem, rows: range) -> Tensor | None:
    """The id of each row, (len(rows),) int64; None where no column is a positive."""
    layout = problem.spec.layout
    if isinstance(layout, Block):
        return image_of_rows(layout, rows, problem.offset, problem.q.device)
    if problem.row_ids is None or isinstance(layout, Several):
        return None
    return problem.row_ids[rows.start : rows.stop]


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


def left_out(problem: Problem, rows: range, columns: range, r: Tensor, room: Tensor | None = None) -> Tensor | None:
    """What the filters, or the layout `Several`, take out of a tile's negatives, (N, m) bool; None without either.

    Args:
        problem: with its ceilings and, for `guide`, its guides.
        rows: of the tile.
        columns: of the tile.
        r: (N, m) its dot products.
        room: (N, m), for those of the guides.
    """
    found: Tensor | None = None
    if isinstance(problem.spec.layout, Several):
        place = cast(Tensor, problem.row_ids)[rows.start : rows.stop] - columns.start
        place = torch.where((place >= 0) & (place < len(columns)), place, len(columns))
        room_for_none = torch.zeros(len(rows), len(columns) + 1, dtype=torch.bool, device=place.device)
        found = room_for_none.scatter_(1, place, True)[:, :-1]  # fault: several-panels
    for name, ceilings in zip(problem.spec.filters, () if problem.ceilings is None else problem.ceilings, strict=True):
        heights = r
        if name == "guide":
            guide_q, guide_k = cast(Tensor, problem.guide_q), cast(Tensor, problem.guide_k)
            heights = torch.mm(guide_q[rows.start : rows.stop], guide_k[columns.start : columns.stop].T, out=room)
        above = heights > ceilings[rows.start : rows.stop, None]  # a NaN stays, and shows
        found = above if found is None else found.logical_or_(above)  # fault: filters-both
    return found


def sets(problem: Problem, rows: range, columns: range, r: Tensor) -> Sets:
    """The sets of one tile of dot products r, (N, m)."""
    ids = row_ids(problem, rows)
    own = torch.zeros(len(rows), len(columns), dtype=torch.bool, device=problem.q.device)
    if ids is not None:
        own = ids[:, None] == column_ids(problem, columns)[None, :]
    kept = torch.ones_like(own)
    if problem.spec.drop_self:
        index = torch.arange(columns.start, columns.stop, device=own.device)
        kept = self_columns(problem, rows)[:, None] != index[None, :]
    out = left_out(problem, rows, columns, r)
    found = Sets(own & kept, ~own & kept, kept)  # fault: row-itself-among
    return found if out is None else found._replace(neg=found.neg & ~out)


# ---- transforms -------------------------------------------------------------------------------------------------


# |t| < c, so e^t needs no shift while e^±c and its sum over 2^60 columns are normal float32 numbers: no max pass, and
# partial sums just add. Shifting by c, as by any constant, would round t − c: 16 u a term at c = 20 and t near 0.
SHIFTLESS_CLIP = 43.0


def shiftless(problem: Problem) -> bool:
    """Scores lie so near 0 that e^t needs no shift: by a clip, or by the norms of rows and a scale that is a number."""
    clip, scale = problem.spec.clip, problem.scale
    if clip is None and problem.spec.unit_norm and isinstance(problem.spec.transform, (Identity, Hardness)):
        # fault: shiftless-without-hardness
        clip = None if isinstance(scale, Tensor) else abs(scale) + problem.spec.hardness
    return clip is not None and clip <= SHIFTLESS_CLIP


def to_half_distances(r: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(N, m) dot products of q and k to raw scores −½‖q − k‖², in place.

    What rounding leaves above 0 is 0. As a score's, the gradient is W k in q, less Σ_j w_ij·q_i: see `less_itself`.
    """
    norms = (x.square().sum(dim=1) for x in (q, k))
    rows, columns = (norm.mul_(0.5) for norm in norms)
    return r.sub_(rows[:, None]).sub_(columns).clamp_(max=0)


def less_itself(dx: Tensor, w: Tensor, x: Tensor, dim: int, factor: float | Tensor = 1.0) -> None:
    """Subtract factor·Σw·x from a gradient in place: d −½‖q − k‖² / dq is k − q, where d ⟨q,k⟩ / dq is k.

    Args:
        dx: (N, D) gradient of the rows (dim 1), or (m, D) of the columns (dim 0).
        w: (N, m) dL/ds.
        x: the rows or columns.
        dim: what w is summed over.
        factor: the score's scale.
    """
    dx.addcmul_((w.sum(dim=dim) * factor)[:, None], x, value=-1)


def transform_value(transform: Transform, s: Tensor, bias: float | Tensor = 0.0) -> Tensor:
    """t(s); of hardness, what a positive has: s."""
    if isinstance(transform, Bias):
        return s + bias
    if isinstance(transform, SqDist):
        return 2 * s
    if isinstance(transform, Dist):
        at_zero = s == 0  # where the root has no slope, and an infinite one would become NaN behind a mask
        return -torch.sqrt((-2 * s).masked_fill(at_zero, 1.0)).masked_fill(at_zero, 0.0)
    return transform.c * torch.tanh(s / transform.c) if isinstance(transform, TanhClip) else s


def transformed(problem: Problem, s: Tensor, r: Tensor, of: Sets) -> Tensor:
    """t of a tile, (N, m): of its scores, its dot products and its sets."""
    t, hardness = transform_value(problem.spec.transform, s, problem.bias), problem.spec.hardness
    # fault: reference-hard-positive, hardness-moves-gradient
    return t + (hardness * r.detach()).masked_fill(of.pos, 0.0) if hardness else t


def positive_value(transform: Transform, s: Tensor, bias: float | Tensor = 0.0) -> Tensor:
    """t(s) of a positive that is no column: a clip would hide that it is not finite."""
    t = transform_value(transform, s, bias)
    return t + 0 * s if isinstance(transform, TanhClip) else t


def transform_slope(transform: Transform, t: Tensor) -> Tensor:
    """dt/ds, from the value t: no second tanh. dt/db of a bias is the same 1."""
    if isinstance(transform, SqDist):
        return torch.full_like(t, 2.0)
    if isinstance(transform, Dist):
        return torch.where(t == 0, t, -1 / t)  # fault: infinite-slope-distance
    return 1 - (t / transform.c) ** 2 if isinstance(transform, TanhClip) else torch.ones_like(t)


# ---- tiles ------------------------------------------------------------------------------------------------------


def fold_tile(names: Sequence[str], x: Scores, dim: int = 1) -> Tensor:
    """Statistics of one tile of scores: of its rows (dim 1), (S, N), or of its columns (dim 0), (S, m)."""
    return torch.stack([STATISTIC[name].value(x, dim) for name in names])


def merge_two(names: Sequence[str], one: Tensor, two: Tensor) -> Tensor:
    """Two partial (S, N) statistics as one.

    Raises:
        TypeError: for one that needs whole rows.
    """
    if one.shape[0] > len(names):  # of several prefixes
        halves = (x.split(len(names)) for x in (one, two))
        return torch.cat([merge_two(names, a, b) for a, b in zip(*halves, strict=True)])
    parts = [dict(zip(names, part, strict=True)) for part in (one, two)]
    rules = [STATISTIC[name].merge for name in names]
    if None in rules:
        raise TypeError(f"statistics: got two parts of {names[rules.index(None)]}, need whole rows")
    return torch.stack([rule(*parts) for rule in rules if rule is not None])


def merge_tiles(names: Sequence[str], parts: list[Tensor]) -> Tensor:
    """Partial (S, N) statistics as one, finished.

    In pairs of pairs: a thousand parts one after the other rounded neg_lse a thousand times, 14 times the error of one.
    """
    while len(parts) > 1:
        pairs = [merge_two(names, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[2 * len(pairs) :]
    if parts[0].shape[0] > len(names):
        return torch.cat([merge_tiles(names, [part]) for part in parts[0].split(len(names))])
    named = dict(zip(names, parts[0], strict=True))
    derived = {name: rule(named) for name in names if (rule := STATISTIC[name].derive) is not None}
    return torch.stack([derived.get(name, value) for name, value in named.items()]) if derived else parts[0]


class Merger:
    """Partial statistics, pushed one by one and merged in pairs of pairs; log2 of them are held."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.levels: list[Tensor | None] = []

    def push(self, part: Tensor) -> None:
        """Add one, (S, ·)."""
        for level, waiting in enumerate(self.levels):
            if waiting is None:
                self.levels[level] = part
                return
            part, self.levels[level] = merge_two(self.names, waiting, part), None  # fault: strips-column-statistics
        self.levels.append(part)

    def result(self) -> Tensor:
        """All of them as one, finished."""
        left = [part for part in reversed(self.levels) if part is not None]
        return merge_tiles(self.names, left)


def tile_weights(
    names: Sequence[str],
    x: Scores,
    found: Tensor,  # (S, N) finished statistics of the rows, or (S, m) of the columns
    d: Tensor,  # the same shape, dL/d statistic
    dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """What the statistics contribute to (dL/dt, dL/ds beside it), each (N, m). The caller adds `pos`'s own part."""
    named = {name: row.unsqueeze(dim) for name, row in zip(names, found, strict=True)}
    w = {"t": torch.zeros_like(x.s), "s": torch.zeros_like(x.s)}
    for name, d_row in zip(names, d, strict=True):
        stat = STATISTIC[name]
        slope = stat.slope(x, named)
        if slope is not None:
            w[stat.of] += d_row.unsqueeze(dim) * slope
    return w["t"], w["s"]
