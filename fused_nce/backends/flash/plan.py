"""How the walks are split, and the bytes that follow: by shape and limit alone, so that no card changes the formula."""

from __future__ import annotations

from typing import NamedTuple

STATISTICS = ("neg_lse", "neg_max", "square")  # in the order of the kernels' rows
PROGRAMS = 264  # enough for two on each of an H100's 132 multiprocessors
BLOCK = 64  # rows that a program keeps, nominally
STEP = 256  # a split is a multiple of this many rows: of every tile in the table


class Split(NamedTuple):
    """`parts` programs walk `walk` rows each."""

    parts: int
    walk: int


def split(n_x: int, n_y: int, d: int, limit_bytes: int) -> Split:
    """Few rows to keep and many to walk through: enough splits to fill the card, as far as their sums may be held."""
    steps = -(-n_y // STEP)
    wanted = min(PROGRAMS // -(-n_x // BLOCK), limit_bytes // (4 * n_x * d), steps)
    walk = -(-steps // max(1, wanted)) * STEP
    return Split(-(-n_y // walk), walk)


def workspace_bytes(n: int, m: int, d: int, positives: int, limit_bytes: int) -> int:
    """The larger of both passes' partial sums, partial statistics, and the tail's coefficients and temporaries.

    One split needs no partial sums: the gradient is their place. A scale's gradient wanted alone costs one dq more, and
    inputs whose rows are not adjacent elements are copied, beyond this.
    """
    by_row, by_column = split(n, m, d, limit_bytes).parts, split(m, n, d, limit_bytes).parts
    row_sums = 4 * n * d * by_row if by_row > 1 else 0
    column_sums = 4 * m * d * by_column if by_column > 1 else 0
    dots = 4 * max(n, m) * -(-d // 16)
    return max(row_sums, column_sums) + dots + 4 * n * (3 * by_row + 4 * positives + 8)
