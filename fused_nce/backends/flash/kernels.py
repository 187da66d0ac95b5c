"""The kernels around one tile of scores that never leaves the chip.

| kernel | reads | gives |
|---|---|---|
| `rows_kernel` | q, k | partial row statistics and, in the same pass, Σ e^(t − shift)·slope·k, not yet normalised |
| `merge_kernel` | partial statistics | the row statistics |
| `positives_kernel` | q, k | the positives, (N, P) |
| `weights_kernel` | q, k, finished rows and dL/d rows | partial Σ w·y: the negatives and the penalty |
| `finish_kernel` | partial sums, positives, dL/d pos | a gradient: the sums in order, normalised, plus the positives' part |

The positives are P columns of a row, so they are gathered, in float32: inside the tile they would cost every score an
address, and their gradient −σ(neg_lse − pos) is known only when the row is finished. x is what a program keeps, y what
it walks through: rows and columns for dq, columns and rows for dk. A program walks one split of y; `finish_kernel`
adds the splits in their order. No atomics: same shapes, same bits.

Sizes (n, m, offset, splits) are never specialised: another batch does not recompile. D, the transform and the tile are
compiled in. Row offsets are 64-bit before the stride multiplies them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.flash.atoms import (
    LOG2E,
    add_exactly,
    exp,
    image_of,
    log_sum,
    own_mask,
    shift_of,
    slope_of,
    transform,
)

SIZES = ["n", "m", "n_x", "n_y", "x_first", "y_first", "walk", "splits"]


@triton.jit
def offsets(rows, stride):
    """Where each row starts, int64: rows·stride passes 2^31 long before either does."""
    return rows.to(tl.int64) * stride


@triton.jit
def load_tile(x, rows, count, stride, d0, D: tl.constexpr, WIDTH: tl.constexpr):
    """x[rows, d0 : d0 + WIDTH], 0 outside, (len(rows), WIDTH)."""
    d = d0 + tl.arange(0, WIDTH)
    inside = (rows < count)[:, None]
    if D % WIDTH != 0:
        inside = inside & (d < D)[None, :]
    return tl.load(x + offsets(rows, stride)[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def load_scale(scale, TENSOR_SCALE: tl.constexpr):
    """The scale: a number, or a tensor that the host never reads."""
    if TENSOR_SCALE:
        return tl.load(scale)
    else:
        return scale


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
    slice,
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
            return r, load_tile(y, ys, n_y, stride_y, slice * SLICE, D, SLICE)
    else:
        r = tl.zeros((xs.shape[0], ys.shape[0]), tl.float32)
        for d in range(0, D, CHUNK):
            part = load_tile(x, xs, n_x, stride_x, d, D, CHUNK)
            r = tl.dot(part, tl.trans(load_tile(y, ys, n_y, stride_y, d, D, CHUNK)), r, input_precision=PRECISION)
        return r, load_tile(y, ys, n_y, stride_y, slice * SLICE, D, SLICE)


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
    n_c,
    rows_per_image,
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
    block, split, slice = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = load_scale(scale, TENSOR_SCALE)
    rows = block * X + tl.arange(0, X)
    images = image_of(rows, rows_per_image, x_first)
    kept = load_tile(q, rows, n, stride_q, 0, D, CHUNK)
    top = tl.full((X,), float("-inf"), tl.float32)
    total = tl.zeros((X,), tl.float32)
    lost = tl.zeros((X,), tl.float32)
    square = tl.zeros((X,), tl.float32)
    if GRADIENT:
        acc = tl.zeros((X, SLICE), tl.float32)
    for j in range(split * walk, tl.minimum(split * walk + walk, m), Y):
        columns = j + tl.arange(0, Y)
        r, walked = score_tile(
            kept, q, k, rows, columns, n, m, stride_q, stride_k, slice, D, CHUNK, SLICE, PRECISION
        )
        s = factor * r
        t, slope = transform(s, clip, inverse_clip, CLIP)
        own = own_mask(images, image_of(columns, n_c, 0))
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
    inside = (rows < n) & (slice == 0)
    length = n.to(tl.int64)
    line = partial + split * (3 * length) + rows
    tl.store(line, total, mask=inside)
    tl.store(line + length, top, mask=inside)
    tl.store(line + 2 * length, square, mask=inside)
    if GRADIENT:
        store_sums(sums, acc, split, slice, rows, n, D, SLICE)


@triton.jit
def store_sums(sums, acc, split, slice, xs, count, D: tl.constexpr, SLICE: tl.constexpr):
    """acc to its place in (splits, count, D)."""
    d = slice * SLICE + tl.arange(0, SLICE)
    place = offsets(count.to(tl.int64) * split + xs, D)[:, None] + d[None, :]
    tl.store(sums + place, acc, mask=(xs < count)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    partial,  # (splits, 3, N): Σ e^(t − shift), max t, Σ s²
    out,  # (3, N): neg_lse, neg_max, square
    n,
    splits,
    SHIFTLESS: tl.constexpr,
    X: tl.constexpr,
):
    """The splits' statistics as one, in the order of the splits."""
    rows = tl.program_id(0) * X + tl.arange(0, X)
    inside = rows < n
    top = tl.full((X,), float("-inf"), tl.float32)
    total = tl.zeros((X,), tl.float32)
    square = tl.zeros((X,), tl.float32)
    line, length = partial + rows, n.to(tl.int64)
    for _ in range(splits):
        part = tl.load(line, mask=inside, other=0.0)
        peak = tl.load(line + length, mask=inside, other=0.0)
        square += tl.load(line + 2 * length, mask=inside, other=0.0)
        line += 3 * length
        seen = tl.maximum(top, peak)
        if SHIFTLESS:
            total += part
        else:
            total = total * exp(top - shift_of(seen)) + part * exp(peak - shift_of(seen))
        top = seen
    shift = tl.zeros((X,), tl.float32) if SHIFTLESS else shift_of(top)
    tl.store(out + rows, log_sum(total, shift), mask=inside)
    tl.store(out + length + rows, top, mask=inside)
    tl.store(out + 2 * length + rows, square, mask=inside)


@triton.jit
def partners(xs, n_x, n_y, p, x_first, y_first, x_per_image, y_per_image, PARTNERS: tl.constexpr):
    """The rows of y in the image of each x, from the p-th: (X, PARTNERS) indices, which of them there are, places."""
    place = p + tl.arange(0, PARTNERS)
    ys = (image_of(xs, x_per_image, x_first)[:, None] - y_first) * y_per_image + place[None, :]
    return ys, (place < y_per_image)[None, :] & (xs < n_x)[:, None] & (ys >= 0) & (ys < n_y), place


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
    pos,  # (N, P) out
    n,
    m,
    x_first,
    stride_q,
    stride_k,
    n_c,
    rows_per_image,
    D: tl.constexpr,
    CLIP: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    X: tl.constexpr,
    PARTNERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Transformed scores of PARTNERS positives of X rows."""
    rows = tl.program_id(0) * X + tl.arange(0, X)
    columns, paired, place = partners(
        rows, n, m, tl.program_id(1) * PARTNERS, x_first, 0, rows_per_image, n_c, PARTNERS
    )
    r = tl.zeros((X, PARTNERS), tl.float32)
    for d0 in range(0, D, WIDTH):
        d = d0 + tl.arange(0, WIDTH)
        mine = load_tile(q, rows, n, stride_q, d0, D, WIDTH).to(tl.float32)
        r += tl.sum(mine[:, None, :] * gather(k, columns, paired, stride_k, d, D), 2)
    t, _ = transform(load_scale(scale, TENSOR_SCALE) * r, clip, inverse_clip, CLIP)
    tl.store(pos + offsets(rows, n_c)[:, None] + place[None, :], t, mask=paired)


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
    x_per_image,
    y_per_image,
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
    block, split, slice = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = load_scale(scale, TENSOR_SCALE)
    xs = block * X + tl.arange(0, X)
    images = image_of(xs, x_per_image, x_first)
    kept = load_tile(x, xs, n_x, stride_x, 0, D, CHUNK)
    if not BY_COLUMN:
        lse, d_lse, d_sq = load_coefficients(neg_lse, d_neg_lse, d_square, xs, n_x, SQUARE)
        lse, d_lse, d_sq = lse[:, None], d_lse[:, None], d_sq[:, None]
    acc = tl.zeros((X, SLICE), tl.float32)
    for j in range(split * walk, tl.minimum(split * walk + walk, n_y), Y):
        ys = j + tl.arange(0, Y)
        r, walked = score_tile(kept, x, y, xs, ys, n_x, n_y, stride_x, stride_y, slice, D, CHUNK, SLICE, PRECISION)
        s = factor * r
        t, slope = transform(s, clip, inverse_clip, CLIP)
        if BY_COLUMN:
            lse, d_lse, d_sq = load_coefficients(neg_lse, d_neg_lse, d_square, ys, n_y, SQUARE)
            lse, d_lse, d_sq = lse[None, :], d_lse[None, :], d_sq[None, :]
        w = d_lse * (tl.exp2(t * LOG2E - lse) * slope)
        # Beyond n_y a row of zeros stands for y, but e^(0 − neg_lse) may be infinite.
        w = tl.where(own_mask(images, image_of(ys, y_per_image, y_first)) | (ys >= n_y)[None, :], 0.0, w)
        if SQUARE:
            w += d_sq * s
        acc = add_product(acc, w, walked, PRECISION)
    store_sums(sums, acc, split, slice, xs, n_x, D, SLICE)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    x,  # (n_x, D) q, or k where BY_COLUMN; read where DOTS
    y,  # (n_y, D) the other
    scale,  # a number, or a 0-d tensor
    inverse_clip,
    sums,  # (splits, n_x, D); may be `out` itself
    partial,  # (splits, 3, N), whose maxima the sums were shifted by, where NORMALISE
    neg_lse,  # (N,), read where NORMALISE
    d_neg_lse,  # (N,), read where NORMALISE
    pos,  # (N, P)
    d_pos,  # (N, P)
    out,  # (n_x, D) out: dL/dx
    dots,  # (blocks of D, n_x) out: ⟨x, dL/dx⟩ / scale, where DOTS
    n_x,
    n_y,
    x_first,
    y_first,
    splits,
    stride_x,
    stride_y,
    x_per_image,
    y_per_image,
    n_c,
    D: tl.constexpr,
    CLIP: tl.constexpr,
    SHIFTLESS: tl.constexpr,
    NORMALISE: tl.constexpr,  # the sums are Σ e^(t − shift)·slope·k: times dL/d neg_lse·e^(shift − neg_lse)
    BY_COLUMN: tl.constexpr,
    DOTS: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    X: tl.constexpr,
    PARTNERS: tl.constexpr,  # positives gathered at a time
    WIDTH: tl.constexpr,
):
    """dL/dx of one block: the splits in their order, and the positives, (X, PARTNERS, WIDTH) of y at a time."""
    block, part = tl.program_id(0), tl.program_id(1)
    xs = block * X + tl.arange(0, X)
    d = part * WIDTH + tl.arange(0, WIDTH)
    inside = (xs < n_x)[:, None] & (d < D)[None, :]
    acc = tl.zeros((X, WIDTH), tl.float32)
    if NORMALISE:
        lse = tl.load(neg_lse + xs, mask=xs < n_x, other=0.0)
        d_lse = tl.load(d_neg_lse + xs, mask=xs < n_x, other=0.0)
    length = n_x.to(tl.int64)
    place, top = sums + offsets(xs, D)[:, None] + d[None, :], partial + length + xs
    for _ in range(splits):
        term = tl.load(place, mask=inside, other=0.0)
        if NORMALISE:
            shift = tl.zeros((X,), tl.float32)
            if not SHIFTLESS:
                shift = shift_of(tl.load(top, mask=xs < n_x, other=0.0))
            share = tl.where(lse == float("-inf"), 0.0, exp(shift - lse))
            term = term * share[:, None] * d_lse[:, None]
        acc += term
        place, top = place + length * D, top + 3 * length
    for p in range(0, y_per_image, PARTNERS):
        ys, paired, place = partners(xs, n_x, n_y, p, x_first, y_first, x_per_image, y_per_image, PARTNERS)
        if BY_COLUMN:
            positive = offsets(ys, n_c) + (xs % n_c)[:, None]
        else:
            positive = offsets(xs, n_c)[:, None] + place[None, :]
        w = tl.load(d_pos + positive, mask=paired, other=0.0)
        w = w * slope_of(tl.load(pos + positive, mask=paired, other=0.0), inverse_clip, CLIP)
        acc += tl.sum(w[:, :, None] * gather(y, ys, paired, stride_y, d, D), 1)
    tl.store(out + offsets(xs, D)[:, None] + d[None, :], acc * load_scale(scale, TENSOR_SCALE), mask=inside)
    if DOTS:
        mine = tl.load(x + offsets(xs, stride_x)[:, None] + d[None, :], mask=inside, other=0.0)
        tl.store(dots + offsets(part, n_x) + xs, tl.sum(mine.to(tl.float32) * acc, 1), mask=xs < n_x)
