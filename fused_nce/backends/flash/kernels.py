"""The two kernels around one tile of scores that never leaves the chip.

| kernel | reads | gives |
|---|---|---|
| `rows_kernel` | q, k | partial row statistics and, in the same pass, Σ e^(t − shift)·slope·k, not yet normalised |
| `weights_kernel` | q, k, finished rows and dL/d rows | partial Σ w·y: the negatives and the penalty |

x is what a program keeps, y what it walks through: rows and columns for dq, columns and rows for dk. A program walks
one split of y and keeps one slice of D; `gather.py` adds the splits in their order. No atomics: same shapes, same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.flash.atoms import LOG2E, add_exactly, exp, image_of, own_mask, shift_of, transform
from fused_nce.backends.flash.memory import SIZES, load_scale, load_tile, offsets


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
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile's ⟨x_i, y_j⟩, (X, Y) float32, and the slice of y that its weights will multiply, (Y, SLICE)."""
    if D <= CHUNK:
        walked = load_tile(y, ys, n_y, stride_y, 0, D, CHUNK)
        r = tl.dot(kept, tl.trans(walked), input_precision=PRECISION)
        if SLICE == CHUNK:
            return r, walked
        else:
            return r, load_tile(y, ys, n_y, stride_y, part * SLICE, D, SLICE)
    else:
        r = tl.zeros((xs.shape[0], ys.shape[0]), tl.float32)
        for d in range(0, D, CHUNK):
            mine = load_tile(x, xs, n_x, stride_x, d, D, CHUNK)
            r = tl.dot(mine, tl.trans(load_tile(y, ys, n_y, stride_y, d, D, CHUNK)), r, input_precision=PRECISION)
        return r, load_tile(y, ys, n_y, stride_y, part * SLICE, D, SLICE)


@triton.jit
def add_product(sums, w, y, PRECISION: tl.constexpr):
    """sums + w y, w in y's precision.

    float16 goes through TF32: it holds every float16 exactly and has float32's range, so that no weight, however large
    its score or small its upstream gradient, leaves it.
    """
    if y.dtype == tl.float16:
        return tl.dot(w, y.to(tl.float32), sums, input_precision="tf32")
    else:
        return tl.dot(w.to(y.dtype), y, sums, input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def rows_kernel(
    q,  # (N, D)
    k,  # (M, D)
    scale,  # a number, or a 0-d tensor
    clip,
    inverse_clip,
    partial,  # (splits, 3, N) out: Σ e^(t − shift), max t, Σ s²
    sums,  # (splits, N, D) out: Σ e^(t − shift)·slope·k, where GRADIENT
    n,
    m,
    x_first,  # the image of row 0
    walk,  # columns of a split
    stride_q,
    stride_k,
    N_C: tl.constexpr,
    ROWS_PER_IMAGE: tl.constexpr,
    D: tl.constexpr,
    CLIP: tl.constexpr,
    SHIFTLESS: tl.constexpr,  # e^t needs no shift: the clip bounds it
    GRADIENT: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One block of rows against one split of the columns; one SLICE of D where GRADIENT."""
    block, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = load_scale(scale, TENSOR_SCALE)
    rows = block * X + tl.arange(0, X)
    images = image_of(rows, x_first, ROWS_PER_IMAGE)
    kept = load_tile(q, rows, n, stride_q, 0, D, CHUNK)
    top = tl.full((X,), float("-inf"), tl.float32)
    total = tl.zeros((X,), tl.float32)
    lost = tl.zeros((X,), tl.float32)
    square = tl.zeros((X,), tl.float32)
    if GRADIENT:
        acc = tl.zeros((X, SLICE), tl.float32)
    first = split * walk
    for j in range(first, first + tl.minimum(walk, m - first), Y):
        columns = j + tl.arange(0, Y)
        r, walked = score_tile(kept, q, k, rows, columns, n, m, stride_q, stride_k, part, D, CHUNK, SLICE, PRECISION)
        s = factor * r
        t, slope = transform(s, clip, inverse_clip, CLIP)
        own = own_mask(images, image_of(columns, 0, N_C))
        negative = tl.where(own | (columns >= m)[None, :], float("-inf"), t)
        seen = tl.maximum(top, tl.max(negative, 1))
        if SHIFTLESS:
            e = tl.exp2(negative * LOG2E)
        else:
            shift = shift_of(seen)
            e = tl.exp2((negative - shift[:, None]) * LOG2E)
            fade = exp(top - shift)
            total, lost = total * fade, lost * fade
            if GRADIENT:
                acc = acc * fade[:, None]
        top = seen
        # tanh(±inf) = ±1 and e^−inf = 0 would hide a bad score: 0·s makes it NaN, the positives' too.
        total, lost = add_exactly(total, lost, tl.sum(e + 0.0 * s, 1))
        square += tl.sum(s * s, 1)
        if GRADIENT:
            acc = add_product(acc, e * slope, walked, PRECISION)
    inside = (rows < n) & (part == 0)
    length = n.to(tl.int64)
    line = partial + split * (3 * length) + rows
    tl.store(line, total, mask=inside)
    tl.store(line + length, top, mask=inside)
    tl.store(line + 2 * length, square, mask=inside)
    if GRADIENT:
        store_sums(sums, acc, split, part, rows, n, D, SLICE)


@triton.jit
def store_sums(sums, acc, split, part, xs, count, D: tl.constexpr, SLICE: tl.constexpr):
    """acc to its place in (splits, count, D)."""
    d = part * SLICE + tl.arange(0, SLICE)
    place = offsets(count.to(tl.int64) * split + xs, D)[:, None] + d[None, :]
    tl.store(sums + place, acc, mask=(xs < count)[:, None] & (d < D)[None, :])


@triton.jit
def load_coefficients(neg_lse, d_neg_lse, d_square, rows, n, SQUARE: tl.constexpr):
    """Of each row: log2(e)·neg_lse, dL/d neg_lse, 2·dL/d square. A row without negatives has nothing to weigh."""
    lse = tl.load(neg_lse + rows, mask=rows < n, other=0.0)
    d_lse = tl.load(d_neg_lse + rows, mask=rows < n, other=0.0)
    empty = lse == float("-inf")
    d_sq = 2.0 * tl.load(d_square + rows, mask=rows < n, other=0.0) if SQUARE else lse
    return tl.where(empty, 0.0, lse * LOG2E), tl.where(empty, 0.0, d_lse), d_sq


@triton.jit(do_not_specialize=SIZES)
def weights_kernel(
    x,  # (n_x, D) q, or k where BY_COLUMN
    y,  # (n_y, D) the other
    scale,  # a number, or a 0-d tensor
    clip,
    inverse_clip,
    neg_lse,  # (N,)
    d_neg_lse,  # (N,)
    d_square,  # (N,), read where SQUARE
    sums,  # (splits, n_x, D) out: Σ w·y over the negatives and the penalty
    n_x,
    n_y,
    x_first,  # the image of x's row 0
    y_first,
    walk,  # rows of y in a split
    stride_x,
    stride_y,
    X_PER_IMAGE: tl.constexpr,
    Y_PER_IMAGE: tl.constexpr,
    D: tl.constexpr,
    CLIP: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    SQUARE: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One block of x against one split of y, one SLICE of D: w = dL/ds from finished rows."""
    block, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = load_scale(scale, TENSOR_SCALE)
    xs = block * X + tl.arange(0, X)
    images = image_of(xs, x_first, X_PER_IMAGE)
    kept = load_tile(x, xs, n_x, stride_x, 0, D, CHUNK)
    if not BY_COLUMN:
        lse, d_lse, d_sq = load_coefficients(neg_lse, d_neg_lse, d_square, xs, n_x, SQUARE)
        lse, d_lse, d_sq = lse[:, None], d_lse[:, None], d_sq[:, None]
    acc = tl.zeros((X, SLICE), tl.float32)
    first = split * walk
    for j in range(first, first + tl.minimum(walk, n_y - first), Y):
        ys = j + tl.arange(0, Y)
        r, walked = score_tile(kept, x, y, xs, ys, n_x, n_y, stride_x, stride_y, part, D, CHUNK, SLICE, PRECISION)
        s = factor * r
        t, slope = transform(s, clip, inverse_clip, CLIP)
        if BY_COLUMN:
            lse, d_lse, d_sq = load_coefficients(neg_lse, d_neg_lse, d_square, ys, n_y, SQUARE)
            lse, d_lse, d_sq = lse[None, :], d_lse[None, :], d_sq[None, :]
        w = d_lse * (tl.exp2(t * LOG2E - lse) * slope)
        # Beyond n_y a row of zeros stands for y, but e^(0 − neg_lse) may be infinite.
        w = tl.where(own_mask(images, image_of(ys, y_first, Y_PER_IMAGE)) | (ys >= n_y)[None, :], 0.0, w)
        if SQUARE:
            w += d_sq * s
        acc = add_product(acc, w, walked, PRECISION)
    store_sums(sums, acc, split, part, xs, n_x, D, SLICE)
