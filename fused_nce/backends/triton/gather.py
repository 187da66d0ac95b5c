"""The kernels that touch no score tile and are bound by memory: they merge the splits and gather the positives.

Where a row has a fixed number of positives they are gathered, in float32: inside a tile they would cost every score an
address, and their gradient −σ(neg_lse − pos) is known only when the row is finished.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.triton.atoms import (
    LOG2E,
    exp,
    ids_of_rows,
    log_sum,
    merge_exponentials,
    shift_of,
    slope_of,
    transform,
)
from fused_nce.backends.triton.memory import (
    SIZES,
    load_line,
    load_scale,
    load_tile,
    offsets,
    pitch_of,
    store_line,
)

AT_ONCE = tl.constexpr(16)  # parts of a merge whose loads are in flight together


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partial,  # (splits, PARTIALS.lines, n)
    mirrored,  # (n / MIRRORED, PARTIALS.lines, n): the same of columns, of each block of rows above their own
    out,  # (S, n): statistics where WANTED puts them
    n,
    splits,
    FORM: tl.constexpr,
    WANTED: tl.constexpr,
    PARTIALS: tl.constexpr,
    MIRRORED: tl.constexpr,  # rows of a block; 0 without
    X: tl.constexpr,
):
    """Merges the splits' partial statistics."""
    rows = tl.program_id(0) * X + tl.arange(0, X)
    _ = merged(partial, mirrored, out, rows, n, splits, FORM, WANTED, PARTIALS, MIRRORED, X)


@triton.jit
def merged(
    partial, mirrored, out, rows, n, splits,
    FORM: tl.constexpr, WANTED: tl.constexpr, PARTIALS: tl.constexpr, MIRRORED: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Stores X rows' statistics, splits in their order, then blocks above; (neg_lse, neg_max, square)."""
    inside = rows < n
    neg_sum = tl.zeros((X,), tl.float32)
    neg_top = tl.full((X,), float("-inf"), tl.float32)
    pos_sum, pos_top, square, soft, total, count = neg_sum, neg_top, neg_sum, neg_sum, neg_sum, neg_sum
    neg_total, neg_count = neg_sum, neg_sum
    length = n.to(tl.int64)
    for first in range(0, splits, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        mask = inside[None, :] & (some < splits)[:, None]  # fault: triton-only-first
        line = partial + offsets(some, PARTIALS.lines * length)[:, None] + rows[None, :]
        parts = load_line(line, length, mask, PARTIALS.neg_sum, 0.0)
        peaks = load_line(line, length, mask, PARTIALS.neg_top, float("-inf"))
        neg_sum, neg_top = merge_exponentials(neg_sum, neg_top, parts, peaks, FORM)
        parts = load_line(line, length, mask, PARTIALS.pos_sum, 0.0)
        peaks = load_line(line, length, mask, PARTIALS.pos_top, float("-inf"))
        pos_sum, pos_top = merge_exponentials(pos_sum, pos_top, parts, peaks, FORM)
        square += tl.sum(load_line(line, length, mask, PARTIALS.square, 0.0), 0)
        soft += tl.sum(load_line(line, length, mask, PARTIALS.softplus, 0.0), 0)
        total += tl.sum(load_line(line, length, mask, PARTIALS.total, 0.0), 0)
        count += tl.sum(load_line(line, length, mask, PARTIALS.count, 0.0), 0)
        neg_total += tl.sum(load_line(line, length, mask, PARTIALS.neg_total, 0.0), 0)
        neg_count += tl.sum(load_line(line, length, mask, PARTIALS.neg_count, 0.0), 0)
    if MIRRORED > 0:
        last = tl.program_id(0) * X + X - 1
        for first in range(0, last // MIRRORED, AT_ONCE):
            some = first + tl.arange(0, AT_ONCE)
            mask = inside[None, :] & (some[:, None] < (rows // MIRRORED)[None, :])
            line = mirrored + offsets(some, PARTIALS.lines * length)[:, None] + rows[None, :]
            parts = load_line(line, length, mask, PARTIALS.neg_sum, 0.0)  # fault: triton-columns-dropped
            peaks = load_line(line, length, mask, PARTIALS.neg_top, float("-inf"))
            neg_sum, neg_top = merge_exponentials(neg_sum, neg_top, parts, peaks, FORM)
    neg_shift, pos_shift = shift_of(neg_top), shift_of(pos_top)
    if FORM.shiftless:
        neg_shift, pos_shift = neg_shift * 0.0, pos_shift * 0.0
    pos_lse = log_sum(pos_sum, pos_shift)
    out += rows
    neg_lse = log_sum(neg_sum, neg_shift)
    store_line(out, neg_lse, length, inside, WANTED.neg_lse)
    store_line(out, neg_top, length, inside, WANTED.neg_max)
    store_line(out, pos_lse, length, inside, WANTED.pos_lse)
    store_line(out, pos_top, length, inside, WANTED.pos_max)
    store_line(out, square, length, inside, WANTED.square)
    store_line(out, soft, length, inside, WANTED.neg_softplus)
    store_line(out, total, length, inside, WANTED.pos_sum)
    store_line(out, count, length, inside, WANTED.pos_count)
    store_line(out, neg_total, length, inside, WANTED.neg_sum)
    store_line(out, neg_count, length, inside, WANTED.neg_count)
    gap = tl.where(count > 0.0, pos_lse - total / tl.maximum(count, 1.0), 0.0)
    store_line(out, gap, length, inside, WANTED.pos_gap)
    return neg_lse, neg_top, square


@triton.jit(do_not_specialize=SIZES)
def terms_kernel(
    found,  # (S, n) finished statistics of rows or columns
    d,  # (S, n) dL/d them
    d_pos,  # (N, 1), read where a row has a target
    terms,  # (TERMS.lines, n and padding) out
    n,
    SHIFTLESS: tl.constexpr,  # e^t is no larger than float32: the row has the rest
    WANTED: tl.constexpr,
    TERMS: tl.constexpr,
    X: tl.constexpr,
):
    """The numbers that the weights read, computed once a row instead of once a tile; 0 for the padding.

    An empty set, whose statistic is −inf, gets 0.
    """
    rows = tl.program_id(0) * X + tl.arange(0, X)
    inside, every = rows < n, rows >= 0
    length, pitch = n.to(tl.int64), pitch_of(n)
    found, d, out = found + rows, d + rows, terms + rows
    lse, slope = log_sum_terms(found, d, length, inside, WANTED.neg_lse)
    if SHIFTLESS:
        slope = slope * tl.exp2(-lse)
    store_line(out, lse, pitch, every, TERMS.neg_lse)
    store_line(out, slope, pitch, every, TERMS.d_neg_lse)
    lse, slope = log_sum_terms(found, d, length, inside, WANTED.pos_lse)
    store_line(out, lse, pitch, every, TERMS.pos_lse)
    store_line(out, slope, pitch, every, TERMS.d_pos_lse)
    store_line(out, load_line(d, length, inside, WANTED.neg_softplus, 0.0), pitch, every, TERMS.d_softplus)
    # fault: triton-half-penalty
    store_line(out, 2.0 * load_line(d, length, inside, WANTED.square, 0.0), pitch, every, TERMS.d_square)
    store_line(out, load_line(d, length, inside, WANTED.pos_sum, 0.0), pitch, every, TERMS.d_sum)
    store_line(out, load_line(d, length, inside, WANTED.neg_sum, 0.0), pitch, every, TERMS.d_neg_sum)
    store_line(out, load_line(d, length, inside, WANTED.pos_gap, 0.0), pitch, every, TERMS.d_gap)
    count = load_line(found, length, inside, WANTED.pos_count, 1.0)
    store_line(out, 1.0 / tl.maximum(count, 1.0), pitch, every, TERMS.share)
    if TERMS.d_target >= 0:
        store_line(out, tl.load(d_pos + rows, mask=inside, other=0.0), pitch, every, TERMS.d_target)


@triton.jit
def log_sum_terms(found, d, length, inside, LINE: tl.constexpr):
    """(log2(e)·lse, dL/d lse)."""
    lse = load_line(found, length, inside, LINE, 0.0)
    slope = load_line(d, length, inside, LINE, 0.0)
    empty = lse == float("-inf")
    return tl.where(empty, 0.0, lse * LOG2E), tl.where(empty, 0.0, slope)


@triton.jit
def partners_of_rows(rows, p, ids, first, itself, n, m, FORM: tl.constexpr, PARTNERS: tl.constexpr):
    """Each row's positives from the p-th: (X, PARTNERS) columns, which of them there are, and their places in P."""
    place = p + tl.arange(0, PARTNERS)[None, :]
    mine, myself = ids_of_rows(rows, ids, first, n, m, FORM), rows + itself
    columns = mine.to(tl.int64)[:, None] * FORM.n_c + place  # an image times its columns may pass 2^31
    there = (place < FORM.partners) & (rows < n)[:, None] & (columns >= 0) & (columns < m)
    slot = place + tl.zeros(columns.shape, tl.int32)
    if FORM.drop_self:
        there = there & (columns != myself[:, None])
        if FORM.ids == "image":  # the own place in the image is skipped
            slot = tl.where(columns > myself[:, None], slot - 1, slot)
    return columns, there, slot


@triton.jit
def partners_of_columns(columns, p, first, n, FORM: tl.constexpr, PARTNERS: tl.constexpr):
    """The rows of which each column is a positive, from the p-th of its image, and its place among theirs."""
    place = p + tl.arange(0, PARTNERS)[None, :]
    image = (columns // FORM.n_c - first).to(tl.int64)
    rows = image[:, None] * FORM.rows_per_image + place
    there = (place < FORM.rows_per_image) & (rows >= 0) & (rows < n)
    slot = (columns % FORM.n_c)[:, None] + tl.zeros(rows.shape, tl.int32)  # fault: triton-siblings-share
    if FORM.drop_self:  # images of as many rows as columns: the p-th row is the p-th column
        there = there & (slot != place)
        slot = tl.where(slot > place, slot - 1, slot)
    return rows, there, slot


@triton.jit
def gather(y, ys, paired, stride_y, d, D: tl.constexpr):
    """y[ys, d], float32, 0 where not `paired`, (X, PARTNERS, len(d))."""
    mask = paired[:, :, None] & (d < D)[None, None, :]
    return tl.load(y + offsets(ys, stride_y)[:, :, None] + d[None, None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def positives_kernel(
    q,  # (N, D)
    k,  # (M, D)
    scale,  # a number, or a 0-d tensor
    clip,
    inverse_clip,
    bias,  # 0-d, read by its transform
    row_ids,  # (N,) int64, read by layouts that have them
    pos,  # (N, P) out
    n,
    m,
    first,
    itself,
    stride_q,
    stride_k,
    FORM: tl.constexpr,
    D: tl.constexpr,
    X: tl.constexpr,
    PARTNERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Transformed scores of PARTNERS positives of X rows; NaN for a target that is no column, or the row itself."""
    rows = tl.program_id(0) * X + tl.arange(0, X)
    p = tl.program_id(1) * PARTNERS
    columns, paired, slot = partners_of_rows(rows, p, row_ids, first, itself, n, m, FORM, PARTNERS)
    r = tl.zeros((X, PARTNERS), tl.float32)
    for d0 in range(0, D, WIDTH):
        d = d0 + tl.arange(0, WIDTH)
        mine = load_tile(q, rows, n, stride_q, d0, D, WIDTH, True)
        r += tl.sum(mine[:, None, :] * gather(k, columns, paired, stride_k, d, D), 2)
    t, _ = transform(load_scale(scale, FORM.tensor_scale) * r, clip, inverse_clip, bias, FORM)
    written = paired
    if FORM.ids == "target":
        t = tl.where(paired, t, float("nan"))
        written = (rows < n)[:, None] & (slot < FORM.n_pos)
    tl.store(pos + offsets(rows, FORM.n_pos)[:, None] + slot, t, mask=written)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    x,  # (n_x, D); read where DOTS
    y,  # (n_y, D)
    scale,  # a number, or a 0-d tensor
    inverse_clip,
    row_ids,  # (N,) int64, read by layouts that have them
    sums,  # (splits, rows from `start` on, D); may be `out` itself
    tallies,  # (splits, n_x), read where there is a bias and DOTS
    partial,  # (splits, PARTIALS.lines, n_x), whose maxima the sums were shifted by, read where NORMALISE
    found,  # (S, N), read where NORMALISE
    d_rows,  # (S, N), likewise
    pos,  # (N, P)
    d_pos,  # (N, P)
    out,  # (n_x, D) out: dL/dx
    dots,  # (blocks of D, n_x) out: ⟨x, dL/dx⟩ / scale, where DOTS
    on_bias,  # (n_x,) out: Σ dL/dt, where DOTS and there is a bias
    n_x,
    n_y,
    first,
    itself,
    start,  # the first row of x that `sums` has
    splits,
    stride_x,
    stride_y,
    FORM: tl.constexpr,
    PARTIALS: tl.constexpr,
    NORMALISE: tl.constexpr,  # the sums are `fold_kernel`'s: a row's dL/d statistic is still to multiply them
    AS_ROW: tl.constexpr,  # as in `weights_kernel`
    AS_COLUMN: tl.constexpr,
    DOTS: tl.constexpr,
    D: tl.constexpr,
    X: tl.constexpr,
    PARTNERS: tl.constexpr,  # positives gathered at a time
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,  # added up at a time
):
    """dL/dx of one block: the splits, some at a time, and the positives, (X, PARTNERS, WIDTH) of y at a time."""
    block, part = tl.program_id(0), tl.program_id(1)
    mine = block * X + tl.arange(0, X)
    xs = start + mine
    d = part * WIDTH + tl.arange(0, WIDTH)
    own, inside = xs < n_x, (xs < n_x)[:, None] & (d < D)[None, :]
    acc = tl.zeros((X, WIDTH), tl.float32)
    tally = tl.zeros((X,), tl.float32)
    length = n_x.to(tl.int64)
    if NORMALISE:
        if FORM.rows.neg_lse >= 0:
            lse = load_line(found + xs, length, own, FORM.rows.neg_lse, 0.0)
            factor = load_line(d_rows + xs, length, own, FORM.rows.neg_lse, 0.0)
        else:
            factor = load_line(d_rows + xs, length, own, FORM.rows.neg_softplus, 0.0)
    place = sums + offsets(mine, D)[:, None] + d[None, :]
    for first_split in range(0, splits, SPLITS):  # fault: triton-first-splits
        some = first_split + tl.arange(0, SPLITS)
        there = (some < splits)[:, None] & own[None, :]  # fault: triton-only-first-split
        at = place[None, :, :] + offsets(some, length * D)[:, None, None]
        terms = tl.load(at, mask=there[:, :, None] & inside[None, :, :], other=0.0)  # (SPLITS, X, WIDTH)
        if NORMALISE:
            by = tl.where(there, factor[None, :], 0.0)
            if FORM.rows.neg_lse >= 0:
                shift = tl.zeros((SPLITS, X), tl.float32)
                if not FORM.shiftless:
                    line = partial + offsets(some, PARTIALS.lines * length)[:, None] + xs[None, :]
                    shift = shift_of(load_line(line, length, there, PARTIALS.neg_top, 0.0))
                share = exp(shift - lse[None, :])
                by = tl.where(there & (lse != float("-inf"))[None, :], share, 0.0) * by
            terms = terms * by[:, :, None]
        acc += tl.sum(terms, 0)
        if DOTS and FORM.transform == "bias":
            counts = tl.load(tallies + offsets(some, length)[:, None] + xs[None, :], mask=there, other=0.0)
            tally += tl.sum(counts * by if NORMALISE else counts, 0)
    if AS_ROW and FORM.partners > 0:
        for p in range(0, FORM.partners, PARTNERS):
            ys, paired, slot = partners_of_rows(xs, p, row_ids, first, itself, n_x, n_y, FORM, PARTNERS)
            at = offsets(xs, FORM.n_pos)[:, None] + slot
            more, counts = gathered(y, ys, paired, pos, d_pos, at, inverse_clip, stride_y, d, FORM, D)
            acc, tally = acc + more, tally + counts
    if AS_COLUMN and FORM.ids == "image":
        for p in range(0, FORM.rows_per_image, PARTNERS):
            ys, paired, slot = partners_of_columns(xs, p, first, n_y, FORM, PARTNERS)
            at = offsets(ys, FORM.n_pos) + slot
            more, counts = gathered(y, ys, paired, pos, d_pos, at, inverse_clip, stride_y, d, FORM, D)
            acc, tally = acc + more, tally + counts
    tl.store(out + offsets(xs, D)[:, None] + d[None, :], acc * load_scale(scale, FORM.tensor_scale), mask=inside)
    if DOTS:
        mine = tl.load(x + offsets(xs, stride_x)[:, None] + d[None, :], mask=inside, other=0.0)
        tl.store(dots + offsets(part, n_x) + xs, tl.sum(mine.to(tl.float32) * acc, 1), mask=own)
        if FORM.transform == "bias":
            tl.store(on_bias + xs, tally, mask=own & (part == 0))


@triton.jit
def gathered(y, ys, paired, pos, d_pos, at, inverse_clip, stride_y, d, FORM: tl.constexpr, D: tl.constexpr):
    """Σ over partners of dL/ds·y, (X, len(d)), and of dL/dt, (X,)."""
    on_t = tl.load(d_pos + at, mask=paired, other=0.0)
    w = on_t * slope_of(tl.load(pos + at, mask=paired, other=0.0), inverse_clip, FORM)
    return tl.sum(w[:, :, None] * gather(y, ys, paired, stride_y, d, D), 1), tl.sum(on_t, 1)
