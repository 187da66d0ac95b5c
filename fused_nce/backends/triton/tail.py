"""The nce tail in the launch that merges the splits: its coefficients, and the numbers that a loss reports.

The formulas are those of `core/tails.Nce`, which torch computes in forty small launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.triton.atoms import sigmoid, softplus
from fused_nce.backends.triton.gather import merged
from fused_nce.backends.triton.memory import SIZES, offsets, store_line

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
            tl.sum(element, 0), tl.sum(bound, 0), tl.sum(value, 0), tl.sum(first, 0),
            tl.sum(tl.where(inside, lse, 0.0), 0), tl.sum(tl.where(inside, square, 0.0), 0),
            loss, nce, penalty, report, n, weight, square_weight, chance, log_images, POSITIVES, MEAN,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def summary_kernel(
    sums,  # (6, programs)
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
):
    """The numbers of the loss, from all programs of `close_kernel`."""
    report_numbers(
        sum_of(sums, 0, programs), sum_of(sums, 1, programs), sum_of(sums, 2, programs), sum_of(sums, 3, programs),
        sum_of(sums, 4, programs), sum_of(sums, 5, programs),
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
    element, bound, value, first, lse, square, loss, nce, penalty, report, n, weight, square_weight, chance,
    log_images, POSITIVES: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """In the order of `core/tails.Nce.REPORT`; a weight of 0 leaves the penalty out: 0·∞ would hide a finite loss."""
    count = n.to(tl.float32) * POSITIVES
    reduced = weight * (element / count if MEAN else element)
    punished = tl.where(square_weight > 0.0, square * square_weight, 0.0)
    tl.store(loss, reduced + punished)
    tl.store(nce, reduced)
    tl.store(penalty, punished)
    tl.store(report, first / count)
    tl.store(report + 1, value / count)
    tl.store(report + 2, lse / n.to(tl.float32))
    tl.store(report + 3, element / count - chance)
    tl.store(report + 4, log_images - bound / count)
