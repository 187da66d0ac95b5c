"""The nce tail in the launch that merges the splits: its coefficients, and the numbers that a loss reports.

The formulas are those of `core/tails.Nce`, which torch computes in forty small launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.triton.atoms import sigmoid, softplus
from fused_nce.backends.triton.gather import merged, partners_of_columns, partners_of_rows
from fused_nce.backends.triton.memory import SIZES, load_line, offsets, store_line

LANES = tl.constexpr(128)  # programs whose sums are added at once


@triton.jit(do_not_specialize=SIZES)
def close_kernel(
    partial,  # as `merge_kernel`
    mirrored,
    out,  # (S, n)
    pos,  # (n, POSITIVES)
    d_pos,  # (n, POSITIVES) out: dL/d pos at upstream 1
    d_rows,  # (S, n) out: dL/d neg_lse and, where it is wanted, square; nothing else
    elements,  # (n, POSITIVES) out: weight·nce, where ELEMENTS
    sums,  # (6, programs) out
    loss,  # 0-d out, as those below, where one program has all rows
    nce,
    penalty,
    report,  # (5,) out
    n,
    splits,
    unit,  # dL/d element
    weight,  # of an element
    square_weight,  # λ / scores
    chance,  # log(1 + (n_k − 1)·n_c)
    log_images,  # log n_k
    log_positives,  # log n_c
    FORM: tl.constexpr,
    WANTED: tl.constexpr,
    PARTIALS: tl.constexpr,
    MIRRORED: tl.constexpr,
    POSITIVES: tl.constexpr,
    PARTNERS: tl.constexpr,  # of them at a time
    MEAN: tl.constexpr,  # of the elements; else their sum
    ELEMENTS: tl.constexpr,
    ALONE: tl.constexpr,
    X: tl.constexpr,
):
    """`merge_kernel`, and of the same rows what the tail makes of them."""
    rows = tl.program_id(0) * X + tl.arange(0, X)
    inside, length = rows < n, n.to(tl.int64)
    lse, top, square = merged(partial, mirrored, out, rows, n, splits, FORM, WANTED, PARTIALS, MIRRORED, X)
    none = tl.zeros((X,), tl.float32)
    element, bound, value, first, slope = none, none, none, none, none
    for p0 in range(0, POSITIVES, PARTNERS):
        p = p0 + tl.arange(0, PARTNERS)
        at = offsets(rows, POSITIVES)[:, None] + p[None, :]
        there = inside[:, None] & (p < POSITIVES)[None, :]
        t = tl.load(pos + at, mask=there, other=0.0)
        behind = lse[:, None] - (t + 0.0 * tl.maximum(t, 0.0))
        share = tl.where(there, sigmoid(behind) * unit, 0.0)
        tl.store(d_pos + at, -share, mask=there)
        slope += tl.sum(share, 1)
        one = softplus(behind)
        if ELEMENTS:
            tl.store(elements + at, weight * one, mask=there)
        element += tl.sum(tl.where(there, one, 0.0), 1)
        bound += tl.sum(tl.where(there, softplus(behind - log_positives), 0.0), 1)
        value += tl.sum(t, 1)
        first += tl.sum(tl.where(there & (t > top[:, None]), 1.0, 0.0), 1)
    store_line(d_rows + rows, slope, length, inside, WANTED.neg_lse)
    store_line(d_rows + rows, none + square_weight, length, inside, WANTED.square)
    programs = tl.num_programs(0)
    place = sums + tl.program_id(0)
    tl.store(place, tl.sum(element, 0))
    tl.store(place + programs, tl.sum(bound, 0))
    tl.store(place + 2 * programs, tl.sum(value, 0))
    tl.store(place + 3 * programs, tl.sum(first, 0))
    tl.store(place + 4 * programs, tl.sum(tl.where(inside, lse, 0.0), 0))
    tl.store(place + 5 * programs, tl.sum(tl.where(inside, square, 0.0), 0))
    if ALONE:
        report_numbers(
            tl.sum(element, 0), tl.sum(element, 0), tl.sum(bound, 0), tl.sum(value, 0), tl.sum(first, 0),
            tl.sum(tl.where(inside, lse, 0.0), 0), tl.sum(tl.where(inside, square, 0.0), 0),
            loss, nce, penalty, report, n, weight, square_weight, chance, log_images, POSITIVES, MEAN,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def close_both_kernel(
    found,  # (S, n) statistics of rows
    back,  # (S', m) of columns
    pos,  # (n, POSITIVES)
    d_pos,  # (n, POSITIVES) out: dL/d pos at upstream 1
    d_rows,  # (S, n) out, as in `close_kernel`
    d_columns,  # (S', m) out: dL/d neg_lse of columns; nothing else
    elements,  # (n, POSITIVES) out: weight·nce, where ELEMENTS
    sums,  # (7, programs) out: as in `close_kernel`, then the rows' own elements
    row_ids,  # read by layouts that have them
    n,
    m,
    first,
    itself,
    programs,  # of rows; those of columns follow
    unit,  # dL/d element
    weight,
    square_weight,
    log_positives,
    FORM: tl.constexpr,
    POSITIVES: tl.constexpr,
    PARTNERS: tl.constexpr,  # positives, or rows of a column's image, at a time
    ELEMENTS: tl.constexpr,
    X: tl.constexpr,
):
    """The nce tail of finished rows and columns: an element is the mean of both directions."""
    block, half = tl.program_id(0), 0.5 * unit  # fault: triton-both-ways-whole
    if block < programs:
        close_rows(
            found, back, pos, d_pos, d_rows, elements, sums, row_ids, n, m, first, itself, block, programs, half,
            weight, square_weight, log_positives, FORM, POSITIVES, PARTNERS, ELEMENTS, X,
        )  # fmt: skip
    else:
        close_columns(back, pos, d_columns, n, m, first, block - programs, half, FORM, POSITIVES, PARTNERS, X)


@triton.jit
def close_rows(
    found, back, pos, d_pos, d_rows, elements, sums, row_ids, n, m, first, itself, block, programs, half, weight,
    square_weight, log_positives, FORM: tl.constexpr, POSITIVES: tl.constexpr, PARTNERS: tl.constexpr,
    ELEMENTS: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Elements, dL/d positives and dL/d statistics of X rows, and what they add to the loss's numbers."""
    ROWS: tl.constexpr = FORM.rows
    COLUMNS: tl.constexpr = FORM.columns
    none = tl.zeros((X,), tl.float32)
    rows = block * X + tl.arange(0, X)
    inside, length = rows < n, n.to(tl.int64)
    lse = load_line(found + rows, length, inside, ROWS.neg_lse, 0.0)
    top = load_line(found + rows, length, inside, ROWS.neg_max, 0.0)
    square = load_line(found + rows, length, inside, ROWS.square, 0.0)
    element, own, bound, value, above, slope = none, none, none, none, none, none
    for p in range(0, FORM.partners, PARTNERS):
        columns, there, slot = partners_of_rows(rows, p, row_ids, first, itself, n, m, FORM, PARTNERS)
        at = offsets(rows, POSITIVES)[:, None] + slot
        t = tl.load(pos + at, mask=there, other=0.0)
        lost = t + 0.0 * tl.maximum(t, 0.0)
        behind = lse[:, None] - lost
        back_lse = tl.load(back + COLUMNS.neg_lse * m.to(tl.int64) + columns, mask=there, other=0.0)
        share, other = sigmoid(behind) * half, sigmoid(back_lse - lost) * half
        tl.store(d_pos + at, -share - other, mask=there)
        slope += tl.sum(tl.where(there, share, 0.0), 1)
        one = softplus(behind)
        both = 0.5 * (one + softplus(back_lse - lost))
        if ELEMENTS:
            tl.store(elements + at, weight * both, mask=there)
        element += tl.sum(tl.where(there, both, 0.0), 1)
        own += tl.sum(tl.where(there, one, 0.0), 1)
        bound += tl.sum(tl.where(there, softplus(behind - log_positives), 0.0), 1)
        value += tl.sum(t, 1)
        above += tl.sum(tl.where(there & (t > top[:, None]), 1.0, 0.0), 1)
    store_line(d_rows + rows, slope, length, inside, ROWS.neg_lse)
    store_line(d_rows + rows, none + square_weight, length, inside, ROWS.square)
    place = sums + block
    tl.store(place, tl.sum(element, 0))
    tl.store(place + programs, tl.sum(bound, 0))
    tl.store(place + 2 * programs, tl.sum(value, 0))
    tl.store(place + 3 * programs, tl.sum(above, 0))
    tl.store(place + 4 * programs, tl.sum(lse, 0))
    tl.store(place + 5 * programs, tl.sum(square, 0))
    tl.store(place + 6 * programs, tl.sum(own, 0))


@triton.jit
def close_columns(
    back, pos, d_columns, n, m, first, block, half,
    FORM: tl.constexpr, POSITIVES: tl.constexpr, PARTNERS: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """dL/d neg_lse of X columns: over the rows whose positive each is."""
    COLUMNS: tl.constexpr = FORM.columns
    columns = block * X + tl.arange(0, X)
    inside, length = columns < m, m.to(tl.int64)
    lse = load_line(back + columns, length, inside, COLUMNS.neg_lse, 0.0)
    slope = tl.zeros((X,), tl.float32)
    for p in range(0, FORM.rows_per_image, PARTNERS):
        rows, there, slot = partners_of_columns(columns, p, first, n, FORM, PARTNERS)
        t = tl.load(pos + offsets(rows, POSITIVES) + slot, mask=there, other=0.0)
        share = sigmoid(lse[:, None] - (t + 0.0 * tl.maximum(t, 0.0))) * half
        slope += tl.sum(tl.where(there, share, 0.0), 1)  # fault: triton-columns-slope
    store_line(d_columns + columns, slope, length, inside, COLUMNS.neg_lse)


@triton.jit(do_not_specialize=SIZES)
def summary_kernel(
    sums,  # (6, programs), or more: `OWN`
    loss,
    nce,
    penalty,
    report,
    n,
    programs,
    weight,
    square_weight,
    chance,
    log_images,
    POSITIVES: tl.constexpr,
    MEAN: tl.constexpr,
    OWN: tl.constexpr,  # the line with the rows' own elements, of which the report tells
):
    """The numbers of the loss, from all programs of `close_kernel`."""
    report_numbers(
        sum_of(sums, 0, programs), sum_of(sums, OWN, programs), sum_of(sums, 1, programs), sum_of(sums, 2, programs),
        sum_of(sums, 3, programs), sum_of(sums, 4, programs), sum_of(sums, 5, programs),
        loss, nce, penalty, report, n, weight, square_weight, chance, log_images, POSITIVES, MEAN,
    )  # fmt: skip


@triton.jit
def sum_of(sums, line, programs):
    """One line of (6, programs)."""
    found = tl.zeros((LANES,), tl.float32)
    for first in range(0, programs, LANES):
        at = first + tl.arange(0, LANES)
        found += tl.load(sums + line * programs + at, mask=at < programs, other=0.0)  # fault: triton-first-program
    return tl.sum(found, 0)


@triton.jit
def report_numbers(
    element, own, bound, value, first, lse, square, loss, nce, penalty, report, n, weight, square_weight, chance,
    log_images, POSITIVES: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """In the order of `core/tails.Nce.REPORT`; `own` elements are the rows' without the columns'.

    A weight of 0 leaves the penalty out: 0·∞ would hide a finite loss.
    """
    count = n.to(tl.float32) * POSITIVES
    reduced = weight * (element / count if MEAN else element)
    punished = tl.where(square_weight > 0.0, square * square_weight, 0.0)
    tl.store(loss, reduced + punished)
    tl.store(nce, reduced)
    tl.store(penalty, punished)
    tl.store(report, first / count)
    tl.store(report + 1, value / count)
    tl.store(report + 2, lse / n.to(tl.float32))
    tl.store(report + 3, own / count - chance)
    tl.store(report + 4, log_images - bound / count)
