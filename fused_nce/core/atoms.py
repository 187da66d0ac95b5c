"""The torch definition of every atom: value, derivative, and how two partial results merge.

These are the oracle for the C++ twins in `csrc/atoms.h` (one parity test compares them) and the very functions that
the `reference` and `chunked` backends run. N rows, M columns, P positives a row; s raw score, t transformed, w = dL/ds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_nce.core.spec import Block, Identity, Spec, TanhClip

# ---- layouts ----------------------------------------------------------------------------------------------------


def image_of_rows(layout: Block, rows: range, offset: int, device: torch.device) -> Tensor:
    """The image that each row of `rows` belongs to, (len(rows),) int64."""
    index = torch.arange(rows.start, rows.stop, device=device)
    return index // layout.rows_per_image + offset


def own_mask(layout: Block, rows: range, columns: range, offset: int, device: torch.device) -> Tensor:
    """True where a column belongs to the row's own image, (len(rows), len(columns)) bool."""
    images = torch.arange(columns.start, columns.stop, device=device) // layout.n_c
    return image_of_rows(layout, rows, offset, device)[:, None] == images[None, :]


# ---- transforms -------------------------------------------------------------------------------------------------


# |t| < c, so e^t needs no shift while e^±c and its sum over 2^60 columns are normal float32 numbers: no max pass, and
# partial sums just add. Shifting by c, as by any constant, would round t − c: 16 u a term at c = 20 and t near 0.
SHIFTLESS_CLIP = 43.0


def transform_value(transform: Identity | TanhClip, s: Tensor) -> Tensor:
    """t(s)."""
    return transform.c * torch.tanh(s / transform.c) if isinstance(transform, TanhClip) else s


def transform_slope(transform: Identity | TanhClip, t: Tensor) -> Tensor:
    """dt/ds, from the value t: no second tanh."""
    return 1 - (t / transform.c) ** 2 if isinstance(transform, TanhClip) else torch.ones_like(t)


# ---- row statistics ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistic:
    """A reduction of one row's scores.

    Attributes:
        over: `neg` (columns of other images) or `all`.
        of: `t` (transformed scores) or `s` (raw: the penalty has to see what the clip saturates).
        fold: (N, m) scores, those outside `over` already set to `empty`, to (N,).
        empty: the value that leaves a fold unchanged.
        merge: two partial results to one; column splits, chunks and ranks combine through it.
        weight: (scores, statistic as (N, 1)) to d statistic / d score, or None where it is not differentiable.
    """

    over: str
    of: str
    empty: float
    fold: Callable[[Tensor], Tensor]
    merge: Callable[[Tensor, Tensor], Tensor]
    weight: Callable[[Tensor, Tensor], Tensor] | None


STATISTIC = {
    "neg_lse": Statistic(
        over="neg",
        of="t",
        empty=float("-inf"),
        fold=lambda t: torch.logsumexp(t, dim=1),
        merge=torch.logaddexp,
        weight=lambda t, lse: torch.exp(t - lse),
    ),
    # For ranking the positives; its gradient is undefined at ties, and no loss asks for it.
    "neg_max": Statistic(
        over="neg", of="t", empty=float("-inf"), fold=lambda t: t.amax(dim=1), merge=torch.maximum, weight=None
    ),
    "square": Statistic(
        over="all",
        of="s",
        empty=0.0,
        fold=lambda s: s.square().sum(dim=1),
        merge=torch.add,
        weight=lambda s, _: 2 * s,
    ),
}


def poison(s: Tensor) -> Tensor:
    """0 for a row of finite scores, NaN otherwise, (N,).

    tanh(±inf) = ±1, and a max drops a NaN: without this, a NaN or Inf in the features could leave a finite loss. Added
    to `neg_lse`, it reaches the row's loss and, through the weights, every gradient that the bad score belongs to.
    """
    return s.sum(dim=1) * 0


# ---- elementwise pieces of the tails ----------------------------------------------------------------------------


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z). Not `F.softplus`, which turns linear at 20 and is off by 2e-9 there."""
    return -torch.nn.functional.logsigmoid(-z)


def fold_tile(spec: Spec, s: Tensor, t: Tensor, own: Tensor) -> Tensor:
    """The spec's row statistics of one tile of scores, (S, N).

    Args:
        spec: names the statistics.
        s: (N, m) raw scores.
        t: (N, m) transformed scores.
        own: (N, m) bool, the row's own image.
    """
    rows = []
    for name in spec.stats:
        stat = STATISTIC[name]
        x = s if stat.of == "s" else t
        value = stat.fold(x.masked_fill(own, stat.empty) if stat.over == "neg" else x)
        rows.append(value + poison(s) if name == "neg_lse" else value)
    return torch.stack(rows)


def merge_tiles(spec: Spec, parts: list[Tensor]) -> Tensor:
    """Partial (S, N) statistics as one.

    In pairs of pairs: a thousand parts one after the other rounded neg_lse a thousand times, 14 times the error of one.
    """
    while len(parts) > 1:
        pairs = [
            torch.stack([STATISTIC[name].merge(x, y) for name, x, y in zip(spec.stats, a, b, strict=True)])
            for a, b in zip(parts[::2], parts[1::2], strict=False)
        ]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def tile_weights(
    spec: Spec,
    s: Tensor,  # (N, m) raw scores
    t: Tensor,  # (N, m) transformed scores
    own: Tensor,  # (N, m) bool, the row's own image
    rows: Tensor,  # (S, N) finished statistics
    d_rows: Tensor,  # (S, N) dL/d statistic
) -> Tensor:
    """What the statistics contribute to w = dL/ds of one tile, (N, m); the caller adds the positives' own part."""
    slope = transform_slope(spec.transform, t)
    w = torch.zeros_like(s)
    for name, row, d_row in zip(spec.stats, rows, d_rows, strict=True):
        stat = STATISTIC[name]
        if stat.weight is None:
            continue
        part = d_row[:, None] * stat.weight(s if stat.of == "s" else t, row[:, None])
        if stat.of == "t":
            part = part * slope
        w = w + (part.masked_fill(own, 0.0) if stat.over == "neg" else part)
    return w
