"""How the walks are split, and the bytes that follow: by shape and limit alone, so that no card changes the formula."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fused_nce.backends.triton.form import Partials, Terms, Wanted
from fused_nce.core import first_contact
from fused_nce.core.spec import Bias, Spec

PROGRAMS = 264  # enough for two on each of an H100's 132 multiprocessors
BLOCK = 64  # rows that a program keeps, nominally
STEP = 256  # a split is a multiple of this many rows: of every tile in the table
SLICE = 512  # of D that a program's sums hold at most; wider rows have a program each
MIRROR = 256  # rows of a block whose symmetric scores are seen once, for rows and columns
MIRROR_FROM = 32 * MIRROR  # fewer rows fill the card better with all scores
MIRROR_PROGRAMS = 32 * PROGRAMS  # walks end at the diagonal: many short ones share the card evenly
BACK_PROGRAMS = 8 * PROGRAMS  # one on a multiprocessor: of many the last ones leave few idle
STRIP = 128  # rows of a strip of stored weights are a multiple of this: of every tile that has them
STRIP_WALK = 2 * STEP  # columns of a program that stores weights
MOST_STORED = 65535 * STRIP_WALK  # columns: of programs beside each other
OF_BOTH = {"neg_lse", "neg_max", "square"}  # statistics of rows that one pass for both sides has; the last of no column
WIDE = 256  # beyond this width sums of rows leave their tiles too thin: statistics of rows alone come that way too


class Split(NamedTuple):
    """`splits` programs walk `walk` rows each."""

    splits: int
    walk: int


def split(n_x: int, n_y: int, slices: int, numbers: int, limit_bytes: int, programs: int = PROGRAMS) -> Split:
    """Few rows to keep and many to walk through: enough splits to fill the card, as far as their sums may be held.

    Args:
        n_x: rows to keep.
        n_y: rows to walk through.
        slices: programs for each block of rows, beside each other on the card already.
        numbers: float32 numbers that a split leaves for each row.
        limit_bytes: for all of them.
        programs: wanted; more than the card holds, where their walks differ.
    """
    steps = -(-n_y // STEP)
    wanted = min(programs // (-(-n_x // BLOCK) * slices), limit_bytes // (4 * n_x * numbers), steps)
    walk = -(-steps // max(1, wanted)) * STEP
    return Split(-(-n_y // walk), walk)


def mirrored_bytes(n: int, lines: int, limit_bytes: int) -> int:
    """What the blocks of n rows leave for the columns of symmetric scores; 0 where all scores are seen instead."""
    found = 4 * lines * n * -(-n // MIRROR)
    partial = 4 * lines * n * split(n, n, 1, lines, limit_bytes, MIRROR_PROGRAMS).splits
    least = MIRROR if first_contact.large() else MIRROR_FROM  # fault: triton-mirror-untried
    return found if n >= least and found + partial <= limit_bytes else 0


def back_block(element_bytes: int) -> int:
    """Rows of a block that leaves statistics of its columns: those of its tile."""
    return 2 * STRIP if element_bytes < 4 else BLOCK


def back_bytes(n: int, m: int, lines: int, element_bytes: int, limit_bytes: int) -> int:
    """What blocks of n rows leave for the statistics of m columns; 0 where these take a pass of their own instead."""
    found = 4 * lines * m * -(-n // back_block(element_bytes))
    return found if found <= limit_bytes // 2 else 0


def both_split(n: int, m: int, lines: int, back: int, limit_bytes: int) -> Split:
    """Of the pass for both sides: its splits' statistics of rows have what the blocks leave of the limit."""
    return split(n, m, 1, lines, limit_bytes - back, BACK_PROGRAMS)


def padded(count: int) -> int:
    """Whole tiles of every size in the table."""
    return -(-count // STEP) * STEP


def strip_rows(n: int, m: int, d: int, element_bytes: int, limit_bytes: int) -> int:
    """Rows whose weights are stored together, as even strips as the limit allows; 0 where it has no room for any.

    Beside a row's weights there is its sum. 16-bit sums of columns, to which all strips add, are float32 until the
    last: where they are at most half of the limit, they share it; a sixteenth is left to what the tail computes.
    """
    sums = 4 * m * d if element_bytes < 4 else 0
    room = limit_bytes - limit_bytes // 16 - (sums if sums <= limit_bytes // 2 else 0)
    most = room // strip_bytes(1, m, d, element_bytes) // STRIP * STRIP
    if first_contact.large():  # fault: triton-strips-untried
        most = min(most, STRIP)  # several strips, the last one ragged
    if most == 0 or m > MOST_STORED:
        return 0
    strips = -(-n // most)
    return -(-n // (strips * STRIP)) * STRIP


def strip_bytes(rows: int, m: int, d: int, element_bytes: int) -> int:
    """Of their weights, and of the sums that these give them."""
    return rows * (element_bytes * padded(m) + 4 * d)


class Ways(NamedTuple):
    """What a call with statistics of columns takes, or one of WIDE rows."""

    at_once: bool = False  # one pass for all statistics, which keeps no sums; else one of each side
    strip: int = 0  # rows whose weights are stored together; 0: the scores once more for each gradient


def ways(
    spec: Spec, n: int, m: int, d: int, dtypes: tuple[torch.dtype, torch.dtype], shared: bool, limit_bytes: int
) -> Ways:
    """Those of a spec, shapes, q's and k's dtypes and a limit, on a card that has the tiles.

    float16 has no exponents to spare for stored weights; a bias wants their sums.
    """
    (dtype, other), limit = dtypes, limit_bytes
    if not _swept_both_ways(spec, d) or dtype != other:
        return Ways()
    lines = Partials.of(Wanted.of(spec.columns)).lines
    asked = set(spec.stats) <= OF_BOTH and set(spec.columns) <= OF_BOTH - {"square"}
    stores = not (shared or dtype == torch.float16 or isinstance(spec.transform, Bias))
    return Ways(
        asked and (not spec.columns or back_bytes(n, m, lines, dtype.itemsize, limit) > 0),
        strip_rows(n, m, d, dtype.itemsize, limit) if stores else 0,
    )


def _swept_both_ways(spec: Spec, d: int) -> bool:
    return bool(spec.columns) or d > WIDE  # fault: triton-wide-swept


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """The larger of both passes' partial sums, partial statistics, and the tail's coefficients and temporaries.

    Symmetric scores' statistics of columns count, where the blocks leave them; of both sides, and of wide rows, those
    and a strip's weights.
    One split needs no partial sums: the gradient is their place. A scale's gradient wanted alone costs one dq more, and
    inputs whose rows are not adjacent elements are copied, beyond this.
    """
    by_row, by_column = (Wanted.of(names) for names in (spec.stats, spec.columns))
    row_lines, column_lines = Partials.of(by_row).lines, Partials.of(by_column).lines
    slices = -(-d // SLICE)

    def held(n_x: int, n_y: int, slices: int, numbers: int) -> int:
        parts = split(n_x, n_y, slices, max(1, numbers), limit_bytes).splits
        return 4 * n_x * numbers * parts if parts > 1 or numbers < d else 0

    terms = 4 * (padded(n) * Terms.of(by_row, True).lines + padded(m) * Terms.of(by_column, False).lines)
    rows = max(held(n, m, slices, d), held(n, m, 1, row_lines), held(n, m, slices, d + row_lines))
    columns = max(held(m, n, slices, d), held(m, n, 1, column_lines))
    dots = 4 * max(n, m) * (-(-d // 16) + 2)
    tail = 4 * n * (4 * spec.n_pos + 3 * len(spec.stats) + 8) + 12 * m * len(spec.columns)
    if n == m and spec.drop_self and (mirrored := mirrored_bytes(n, row_lines, limit_bytes)):
        rows = max(rows, mirrored + 4 * n * row_lines * split(n, n, 1, row_lines, limit_bytes, MIRROR_PROGRAMS).splits)
    if _swept_both_ways(spec, d):  # fault: triton-wide-unplanned
        strip = strip_bytes(strip_rows(n, m, d, dtype_bytes, limit_bytes), m, d, dtype_bytes)
        back = back_bytes(n, m, column_lines, dtype_bytes, limit_bytes)
        parts = both_split(n, m, max(1, row_lines), back, limit_bytes).splits if back or not spec.columns else 0
        rows = max(rows, strip, back + 4 * n * row_lines * parts)
    return max(rows, columns) + dots + terms + tail + 4 * n * row_lines
