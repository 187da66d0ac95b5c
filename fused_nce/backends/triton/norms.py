"""Rows brought to norm 1 before the scores, with the scores of keys of their own, and the gradient's way back.

A row of zeros stays one; a norm beyond float32 is NaN, as x / ∞ would be zeros like any others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.triton.memory import SIZES, load_scale, load_tile, offsets

LEAST_NORM = tl.constexpr(1e-12)  # a row below it is divided by it


@triton.jit
def divisor_of(norm):
    """What a row is divided by."""
    return tl.where(norm < LEAST_NORM, LEAST_NORM, norm)


@triton.jit
def unit_at(x, rows, count, stride, d0, divisor, D: tl.constexpr, WIDTH: tl.constexpr):
    """What rows are in the scores: divided, and rounded to the inputs' type. float32, (X, WIDTH)."""
    unit = load_tile(x, rows, count, stride, d0, D, WIDTH, True) / divisor[:, None]
    return unit.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def store_rows(out, value, rows, count, stride, d0, D: tl.constexpr, WIDTH: tl.constexpr):
    """value to out[rows, d0 : d0 + WIDTH], in its type."""
    d = d0 + tl.arange(0, WIDTH)
    inside = (rows < count)[:, None] & (d < D)[None, :]
    tl.store(out + offsets(rows, stride)[:, None] + d[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def unit_rows(
    x, unit, norms, rows, count, stride, unit_stride, WRITE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Norms of rows and, where WRITE, the rows divided by them; the divisors."""
    square = tl.zeros(rows.shape, tl.float32)
    for d0 in range(0, D, WIDTH):
        part = load_tile(x, rows, count, stride, d0, D, WIDTH, True)
        square += tl.sum(part * part, 1)
    root = tl.sqrt_rn(square)
    norm = root + 0.0 * root  # fault: triton-norm-overflows
    tl.store(norms + rows, norm, mask=rows < count)
    divisor = divisor_of(norm)
    if WRITE:
        for d0 in range(0, D, WIDTH):
            value = unit_at(x, rows, count, stride, d0, divisor, D, WIDTH)
            store_rows(unit, value, rows, count, unit_stride, d0, D, WIDTH)
    return divisor


@triton.jit(do_not_specialize=SIZES)
def unit_kernel(
    q,  # (n, D)
    k,  # (m, D), or the (n, D) own keys
    unit_q,  # (n, D) out, `unit_stride` apart, as unit_k
    unit_k,  # (m, D) out, but for own keys
    q_norms,  # (n,) out
    k_norms,  # (m,), or (n,) of own keys, out
    positives,  # (n,) out: the scores of own keys; with a scale tensor n more, before the scale
    scale,  # a number, or a 0-d tensor
    n,
    m,
    stride_q,
    stride_k,
    unit_stride,
    TENSOR_SCALE: tl.constexpr,
    OWN: tl.constexpr,  # k has a key of each row
    D: tl.constexpr,
    X: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """X rows of q and of their keys; or X rows of q, or of k after all of q."""
    rows = tl.program_id(0) * X + tl.arange(0, X)
    if OWN:
        of_q = unit_rows(q, unit_q, q_norms, rows, n, stride_q, unit_stride, True, D, WIDTH)
        of_k = unit_rows(k, k, k_norms, rows, n, stride_k, stride_k, False, D, WIDTH)
        product = tl.zeros((X,), tl.float32)
        for d0 in range(0, D, WIDTH):
            mine = unit_at(q, rows, n, stride_q, d0, of_q, D, WIDTH)
            product += tl.sum(mine * unit_at(k, rows, n, stride_k, d0, of_k, D, WIDTH), 1)
        tl.store(positives + rows, load_scale(scale, TENSOR_SCALE) * product, mask=rows < n)
        if TENSOR_SCALE:
            tl.store(positives + n + rows, product, mask=rows < n)
    else:
        before = tl.cdiv(n, X)
        if tl.program_id(0) < before:
            _ = unit_rows(q, unit_q, q_norms, rows, n, stride_q, unit_stride, True, D, WIDTH)
        else:
            _ = unit_rows(k, unit_k, k_norms, rows - before * X, m, stride_k, unit_stride, True, D, WIDTH)


@triton.jit
def gradient_at(
    g, own, own_divisor, d_score, rows, count, stride_g, stride_own, d0,
    OWN: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dL/d unit rows, with what their own keys add to it."""
    found = load_tile(g, rows, count, stride_g, d0, D, WIDTH, True)
    if OWN:
        found += d_score[:, None] * unit_at(own, rows, count, stride_own, d0, own_divisor, D, WIDTH)
    return found


@triton.jit
def through_rows(
    x, norms, g, out, own, own_norms, d_pos, scale, upstream, rows, count, stride_x, stride_g, stride_own,
    NORMALISE: tl.constexpr, OWN: tl.constexpr, TENSOR_SCALE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """upstream·(g − u ⟨u, g⟩) / norm, of u = x / norm; upstream·g without NORMALISE."""
    inside, by = rows < count, tl.load(upstream)
    own_divisor, d_score = rows, rows
    if OWN:
        own_divisor = divisor_of(tl.load(own_norms + rows, mask=inside, other=1.0))
        d_score = tl.load(d_pos + rows, mask=inside, other=0.0)
        d_score = d_score * load_scale(scale, TENSOR_SCALE)  # fault: triton-own-gradient
    if NORMALISE:
        norm = tl.load(norms + rows, mask=inside, other=1.0)
        divisor, along = divisor_of(norm), tl.zeros(rows.shape, tl.float32)
        for d0 in range(0, D, WIDTH):
            u = load_tile(x, rows, count, stride_x, d0, D, WIDTH, True) / divisor[:, None]
            along += tl.sum(
                u * gradient_at(g, own, own_divisor, d_score, rows, count, stride_g, stride_own, d0, OWN, D, WIDTH), 1
            )
        along = tl.where(norm < LEAST_NORM, 0.0, along)
    for d0 in range(0, D, WIDTH):
        value = gradient_at(g, own, own_divisor, d_score, rows, count, stride_g, stride_own, d0, OWN, D, WIDTH)
        if NORMALISE:
            u = load_tile(x, rows, count, stride_x, d0, D, WIDTH, True) / divisor[:, None]
            value = (value - u * along[:, None]) / divisor[:, None]  # fault: triton-through-norm
        store_rows(out, by * value, rows, count, D, d0, D, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def through_kernel(
    q,  # (n, D), as given; of no rows where no gradient is wanted, as k
    k,  # (m, D)
    q_norms,  # (n,)
    k_norms,  # (m,)
    on_q,  # (n, D) dL/d what was in the scores, at upstream 1, `stride_g` apart
    on_k,  # (m, D)
    out_q,  # (n, D) out
    out_k,  # (m, D) out
    own,  # (n, D) own keys
    own_norms,  # (n,)
    d_pos,  # (n,) dL/d score of the own key
    scale,  # a number, or a 0-d tensor
    upstream,  # 0-d
    n,
    m,
    stride_q,
    stride_k,
    stride_g,
    stride_own,
    NORMALISE: tl.constexpr,
    OWN: tl.constexpr,
    TENSOR_SCALE: tl.constexpr,
    D: tl.constexpr,
    X: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """X rows of q, or of k after all of q."""
    rows, before = tl.program_id(0) * X + tl.arange(0, X), tl.cdiv(n, X)
    if tl.program_id(0) < before:
        through_rows(
            q, q_norms, on_q, out_q, own, own_norms, d_pos, scale, upstream, rows, n, stride_q, stride_g, stride_own,
            NORMALISE, OWN, TENSOR_SCALE, D, WIDTH,
        )  # fmt: skip
    else:
        through_rows(
            k, k_norms, on_k, out_k, k, k_norms, k_norms, scale, upstream, rows - before * X, m, stride_k, stride_g,
            stride_k, NORMALISE, False, TENSOR_SCALE, D, WIDTH,
        )  # fmt: skip
