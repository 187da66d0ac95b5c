"""The kernels beside the scores, bound by memory: they join the splits and gather the positives.

The positives are P columns of a row, so they are gathered, in float32: inside a tile they would cost every score an
address, and their gradient −σ(neg_lse − pos) is known only when the row is finished.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.flash.atoms import exp, image_of, log_sum, shift_of, slope_of, transform
from fused_nce.backends.flash.memory import SIZES, load_scale, load_tile, offsets


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
def partners(
    xs, n_x, n_y, p, x_first, y_first, X_PER_IMAGE: tl.constexpr, Y_PER_IMAGE: tl.constexpr, PARTNERS: tl.constexpr
):
    """The rows of y in the image of each x, from the p-th: (X, PARTNERS) indices, which of them there are, places."""
    place = p + tl.arange(0, PARTNERS)
    image = (image_of(xs, x_first, X_PER_IMAGE) - y_first).to(tl.int64)  # times its rows it may pass 2^31
    ys = image[:, None] * Y_PER_IMAGE + place[None, :]
    return ys, (place < Y_PER_IMAGE)[None, :] & (xs < n_x)[:, None] & (ys >= 0) & (ys < n_y), place


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
    N_C: tl.constexpr,
    ROWS_PER_IMAGE: tl.constexpr,
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
        rows, n, m, tl.program_id(1) * PARTNERS, x_first, 0, ROWS_PER_IMAGE, N_C, PARTNERS
    )
    r = tl.zeros((X, PARTNERS), tl.float32)
    for d0 in range(0, D, WIDTH):
        d = d0 + tl.arange(0, WIDTH)
        mine = load_tile(q, rows, n, stride_q, d0, D, WIDTH).to(tl.float32)
        r += tl.sum(mine[:, None, :] * gather(k, columns, paired, stride_k, d, D), 2)
    t, _ = transform(load_scale(scale, TENSOR_SCALE) * r, clip, inverse_clip, CLIP)
    tl.store(pos + offsets(rows, N_C)[:, None] + place[None, :], t, mask=paired)


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
    N_C: tl.constexpr,
    X_PER_IMAGE: tl.constexpr,
    Y_PER_IMAGE: tl.constexpr,
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
    for p in range(0, Y_PER_IMAGE, PARTNERS):
        ys, paired, place = partners(xs, n_x, n_y, p, x_first, y_first, X_PER_IMAGE, Y_PER_IMAGE, PARTNERS)
        if BY_COLUMN:  # noqa: SIM108
            positive = offsets(ys, N_C) + (xs % N_C)[:, None]
        else:
            positive = offsets(xs, N_C)[:, None] + place[None, :]
        w = tl.load(d_pos + positive, mask=paired, other=0.0)
        w = w * slope_of(tl.load(pos + positive, mask=paired, other=0.0), inverse_clip, CLIP)
        acc += tl.sum(w[:, :, None] * gather(y, ys, paired, stride_y, d, D), 1)
    tl.store(out + offsets(xs, D)[:, None] + d[None, :], acc * load_scale(scale, TENSOR_SCALE), mask=inside)
    if DOTS:
        mine = tl.load(x + offsets(xs, stride_x)[:, None] + d[None, :], mask=inside, other=0.0)
        tl.store(dots + offsets(part, n_x) + xs, tl.sum(mine.to(tl.float32) * acc, 1), mask=xs < n_x)
