"""The two kernels that compute score tiles, which never leave the chip.

| kernel | reads | gives |
|---|---|---|
| `fold_kernel` | x, y | partial statistics of x and, in the same pass, Σ w·y where w does not need them finished |
| `weights_kernel` | x, y, finished statistics and dL/d them | partial Σ w·y of x as a row, as a column, or as both |

x is what a program keeps, y what it walks through: rows and columns for dq, columns and rows for dk. A program walks
one split of y and keeps one slice of D; `gather.py` adds the splits, several at a time, in a fixed
order. No atomics: same shapes, same bits. What a spec asks for is compiled in as FORM (`form.py`), its formulas are
`atoms.py`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.triton.atoms import (
    add_exactly,
    add_exponentials,
    among,
    is_near,
    load_terms,
    marks,
    own_places,
    sigmoid,
    softplus,
    sort_out,
    transform,
    weights_of,
)
from fused_nce.backends.triton.memory import SIZES, load_scale, load_term, load_tile, offsets, pitch_of, store_line


@triton.jit
def score_tile(
    kept,  # (X, CHUNK) the tile of x, where one chunk holds D
    x,
    y,
    xs,
    ys,
    n_x,
    n_y,
    stride_x,
    stride_y,
    part,
    FORM: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile's ⟨x_i, y_j⟩, (X, Y) float32, and the slice of y that its weights will multiply, (Y, SLICE)."""
    if D <= CHUNK:
        walked = load_tile(y, ys, n_y, stride_y, 0, D, CHUNK, FORM.mixed)
        r = tl.dot(kept, tl.trans(walked), input_precision=PRECISION)
        if SLICE == CHUNK:
            return r, walked
        else:
            return r, load_tile(y, ys, n_y, stride_y, part * SLICE, D, SLICE, FORM.mixed)
    else:
        r = tl.zeros((xs.shape[0], ys.shape[0]), tl.float32)
        for d in range(0, D, CHUNK):  # fault: triton-last-chunk
            mine = load_tile(x, xs, n_x, stride_x, d, D, CHUNK, FORM.mixed)
            other = load_tile(y, ys, n_y, stride_y, d, D, CHUNK, FORM.mixed)
            r = tl.dot(mine, tl.trans(other), r, input_precision=PRECISION)
        return r, load_tile(y, ys, n_y, stride_y, part * SLICE, D, SLICE, FORM.mixed)


@triton.jit
def add_product(sums, w, y, PRECISION: tl.constexpr):
    """sums + w y, w in y's precision.

    float16 goes through TF32: it holds every float16 exactly and has float32's range, so that no weight, however large
    its score or small its upstream gradient, leaves it.
    """
    if y.dtype == tl.float16:  # fault: triton-float16-weights
        return tl.dot(w, y.to(tl.float32), sums, input_precision="tf32")
    else:
        return tl.dot(w.to(y.dtype), y, sums, input_precision=PRECISION)


@triton.jit
def store_sums(sums, acc, split, part, xs, count, D: tl.constexpr, SLICE: tl.constexpr):
    """acc to its place in (splits, count, D)."""
    d = part * SLICE + tl.arange(0, SLICE)  # fault: triton-every-slice
    place = offsets(count.to(tl.int64) * split + xs, D)[:, None] + d[None, :]
    tl.store(sums + place, acc, mask=(xs < count)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def fold_kernel(
    x,  # (n_x, D) q, or k where BY_COLUMN
    y,  # (n_y, D) the other
    scale,  # a number, or a 0-d tensor
    clip,
    inverse_clip,
    bias,  # 0-d, read by its transform
    row_ids,  # (N,) int64, read by layouts that have them
    column_ids,  # (M,) int64, likewise
    ceilings,  # (N,), read where columns above them are no negatives
    partial,  # (splits, PARTIALS.lines, n_x) out
    sums,  # (splits, n_x, D) out: Σ w·y, where GRADIENT
    tallies,  # (splits, n_x) out: Σ w, where GRADIENT and there is a bias
    mirrored,  # (blocks of x, PARTIALS.lines, n_y) out: of each block its columns', where MIRRORED
    n_x,
    n_y,
    first,  # the image of row 0
    itself,  # the column that row 0 is
    walk,  # rows of y in a split
    stride_x,
    stride_y,
    FORM: tl.constexpr,
    PARTIALS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    GRADIENT: tl.constexpr,  # w = e^(t − shift) or σ(t), times the slope: dL/d statistic is one factor of the row
    MIRRORED: tl.constexpr,  # scores are symmetric: each is seen in the block above the diagonal, for row and column
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One block of x against one split of y; one SLICE of D where GRADIENT."""
    block, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = load_scale(scale, FORM.tensor_scale)
    xs = block * X + tl.arange(0, X)
    given = (row_ids, column_ids, ceilings, first, itself)
    x_marks = marks(xs, n_x, n_y, given, BY_COLUMN, FORM)
    places = own_places(block * X, X, given, BY_COLUMN, FORM)
    kept = load_tile(x, xs, n_x, stride_x, 0, D, CHUNK, FORM.mixed)
    none = tl.zeros((X,), tl.float32)
    neg_top = tl.full((X,), float("-inf"), tl.float32)
    pos_top = neg_top
    neg_sum, neg_lost, pos_sum, pos_lost, square, tally = none, none, none, none, none, none
    soft, soft_lost, total, total_lost, count = none, none, none, none, none
    neg_total, neg_total_lost, neg_count = none, none, none
    if GRADIENT:
        acc = tl.zeros((X, SLICE), tl.float32)
    begin = split * walk
    end = begin + tl.minimum(walk, n_y - begin)
    if MIRRORED:
        begin = tl.maximum(begin, block * X)  # fault: triton-seen-twice
        of_columns = mirrored + block.to(tl.int64) * (PARTIALS.lines * n_y.to(tl.int64))
    for j in range(begin, end, Y):
        ys = j + tl.arange(0, Y)
        r, walked = score_tile(kept, x, y, xs, ys, n_x, n_y, stride_x, stride_y, part, FORM, D, CHUNK, SLICE, PRECISION)
        s = factor * r
        t, slope = transform(s, clip, inverse_clip, bias, FORM)
        near = is_near(j, Y, n_y, places)
        t, pos, neg, every = sort_out(t, r, near, x_marks, ys, n_x, n_y, given, BY_COLUMN, FORM)
        if PARTIALS.neg_sum >= 0:
            w, neg_sum, neg_lost, neg_top, fade = add_exponentials(t, neg, neg_sum, neg_lost, neg_top, s, FORM)
            if MIRRORED:
                beyond = (ys < n_y) & (ys >= block * X + X)  # the diagonal block has both
                at = of_columns + ys
                store_line(at, tl.sum(w + 0.0 * s, 0), n_y.to(tl.int64), beyond, PARTIALS.neg_sum)
                store_line(at, tl.max(t, 0), n_y.to(tl.int64), beyond, PARTIALS.neg_top)
            if GRADIENT and not FORM.shiftless:
                acc, tally = acc * fade[:, None], tally * fade  # fault: triton-sums-keep
        elif PARTIALS.neg_top >= 0:
            neg_top = tl.maximum(neg_top, tl.max(t if FORM.by_place else tl.where(neg, t, float("-inf")), 1))
        if PARTIALS.softplus >= 0:
            part_sum = tl.sum(among(neg, softplus(t), FORM) + 0.0 * s, 1)  # softplus(−inf) would hide a bad score
            soft, soft_lost = add_exactly(soft, soft_lost, part_sum)
            if GRADIENT:
                w = among(neg, sigmoid(t), FORM)
        if PARTIALS.pos_sum >= 0:
            _, pos_sum, pos_lost, pos_top, _ = add_exponentials(t, pos, pos_sum, pos_lost, pos_top, 0.0, FORM)
        elif PARTIALS.pos_top >= 0:
            pos_top = tl.maximum(pos_top, tl.max(tl.where(pos, t, float("-inf")), 1))
        if PARTIALS.total >= 0:
            total, total_lost = add_exactly(total, total_lost, tl.sum(tl.where(pos, t, 0.0), 1))
        if PARTIALS.count >= 0:
            count += tl.sum(tl.where(pos, 1.0, 0.0), 1)
        if PARTIALS.neg_total >= 0:
            neg_total, neg_total_lost = add_exactly(neg_total, neg_total_lost, tl.sum(tl.where(neg, t, 0.0), 1))
        if PARTIALS.neg_count >= 0:
            neg_count += tl.sum(tl.where(neg, tl.full(t.shape, 1.0, tl.float32), 0.0), 1)
        if PARTIALS.square >= 0:
            squared = s * s
            if FORM.drop_self:
                squared = tl.where(every, squared, 0.0)
            square += tl.sum(squared, 1)
        if GRADIENT:
            if FORM.transform == "bias":
                tally += tl.sum(w, 1)  # fault: triton-bias-sum
            acc = add_product(acc, w * slope, walked, PRECISION)  # fault: triton-clip-slope
    inside = (xs < n_x) & (part == 0)
    length = n_x.to(tl.int64)
    lines = partial + split * (PARTIALS.lines * length) + xs
    store_line(lines, neg_sum, length, inside, PARTIALS.neg_sum)
    store_line(lines, neg_top, length, inside, PARTIALS.neg_top)
    store_line(lines, pos_sum, length, inside, PARTIALS.pos_sum)
    store_line(lines, pos_top, length, inside, PARTIALS.pos_top)
    store_line(lines, square, length, inside, PARTIALS.square)
    store_line(lines, soft, length, inside, PARTIALS.softplus)
    store_line(lines, total, length, inside, PARTIALS.total)
    store_line(lines, count, length, inside, PARTIALS.count)
    store_line(lines, neg_total, length, inside, PARTIALS.neg_total)
    store_line(lines, neg_count, length, inside, PARTIALS.neg_count)
    if GRADIENT:
        store_sums(sums, acc, split, part, xs, n_x, D, SLICE)
        if FORM.transform == "bias":
            tl.store(tallies + split * length + xs, tally, mask=inside)


@triton.jit
def role_weights(s, t, slope, of, row_terms, column_terms, ROW_AXIS: tl.constexpr, FORM: tl.constexpr):
    """w of a tile in one of x's roles, (X, Y): from its rows' terms, spread along ROW_AXIS, and its columns'."""
    ROWS: tl.constexpr = FORM.rows
    COLUMNS: tl.constexpr = FORM.columns
    w = weights_of(s, t, slope, of, row_terms, ROW_AXIS, FORM, ROWS)
    if FORM.two_way:  # fault: triton-column-statistics
        w += weights_of(s, t, slope, of, column_terms, 1 - ROW_AXIS, FORM, COLUMNS)
    return w


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    x,  # (n_x, D)
    y,  # (n_y, D)
    scale,  # a number, or a 0-d tensor
    clip,
    inverse_clip,
    bias,  # 0-d, read by its transform
    row_ids,  # (N,) int64, read by layouts that have them
    column_ids,  # (M,) int64, likewise
    ceilings,  # (N,), read where columns above them are no negatives
    row_lines,  # what `gather.terms_kernel` made of the rows' finished statistics and dL/d them
    column_lines,  # of the columns', where they have any
    sums,  # (splits, n_x, D) out: Σ w·y, without the positives that `gather.py` adds
    tallies,  # (splits, n_x) out: Σ dL/dt, where there is a bias
    n_x,
    n_y,
    first,  # the image of row 0
    itself,  # the column that row 0 is
    walk,  # rows of y in a split
    stride_x,
    stride_y,
    FORM: tl.constexpr,
    AS_ROW: tl.constexpr,  # x are rows, y columns: w_ij
    AS_COLUMN: tl.constexpr,  # x are columns, y rows: w_ji. Both, where one tensor is in both roles
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One block of x against one split of y, one SLICE of D: w = dL/ds from finished statistics."""
    ROWS: tl.constexpr = FORM.row_terms  # an attribute by itself is no argument in Triton 3.6
    COLUMNS: tl.constexpr = FORM.column_terms
    block, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = load_scale(scale, FORM.tensor_scale)
    xs = block * X + tl.arange(0, X)
    given = (row_ids, column_ids, ceilings, first, itself)
    places = own_places(block * X, X, given, not AS_ROW, FORM)
    if AS_ROW:
        row_marks = marks(xs, n_x, n_y, given, False, FORM)
        row_terms = load_terms(row_lines, xs, n_x, ROWS)
    if AS_COLUMN:
        column_marks = marks(xs, n_x, n_y, given, True, FORM)
        column_terms = load_terms(column_lines, xs, n_x, COLUMNS)
    kept = load_tile(x, xs, n_x, stride_x, 0, D, CHUNK, FORM.mixed)
    acc = tl.zeros((X, SLICE), tl.float32)
    tally = tl.zeros((X,), tl.float32)
    begin = split * walk
    for j in range(begin, begin + tl.minimum(walk, n_y - begin), Y):
        ys = j + tl.arange(0, Y)
        r, walked = score_tile(kept, x, y, xs, ys, n_x, n_y, stride_x, stride_y, part, FORM, D, CHUNK, SLICE, PRECISION)
        s = factor * r
        t, slope = transform(s, clip, inverse_clip, bias, FORM)
        near = is_near(j, Y, n_y, places)
        if AS_ROW:
            y_terms = load_terms(column_lines, ys, n_y, COLUMNS)
            u, pos, neg, every = sort_out(t, r, near, row_marks, ys, n_x, n_y, given, False, FORM)
            w = role_weights(s, u, slope, (pos, neg, every), row_terms, y_terms, 1, FORM)
        if AS_COLUMN:
            y_terms = load_terms(row_lines, ys, n_y, ROWS)
            if not (AS_ROW and FORM.by_place):  # else the negatives are those of the other role
                u, pos, neg, every = sort_out(t, r, near, column_marks, ys, n_x, n_y, given, True, FORM)
            back = role_weights(s, u, slope, (pos, neg, every), y_terms, column_terms, 0, FORM)
            if FORM.ids == "target":  # any number of rows may have a column as theirs: no gathering in a fixed order
                d_target = load_term(row_lines + ys, pitch_of(n_y), ROWS.d_target)
                back += tl.where(pos, d_target[None, :] * slope, 0.0)  # fault: triton-target-column
            w = w + back if AS_ROW else back  # fault: triton-one-two
        if FORM.transform == "bias":  # without a penalty dL/dt is dL/ds; the penalty is none of the bias's
            tally += tl.sum(w, 1)
        acc = add_product(acc, w, walked, PRECISION)
    store_sums(sums, acc, split, part, xs, n_x, D, SLICE)
    if FORM.transform == "bias":
        tl.store(tallies + n_x.to(tl.int64) * split + xs, tally, mask=(xs < n_x) & (part == 0))
