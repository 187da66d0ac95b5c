"""The passes for statistics of both sides, and for wide rows: all statistics from the same tiles, and stored weights.

| kernel | reads | gives |
|---|---|---|
| `both_kernel` | q, k | partial statistics of rows, and of each block of rows those of columns, where they have any |
| `strip_kernel` | q, k, finished statistics and dL/d them | w of a strip of rows for cuBLAS, in their precision |

Neither keeps a sum, whose registers leave a tile too thin for the tensor cores at large D: it is as large as the
product that makes its scores wants it, and what is made of them is made of a part of the columns at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_nce.backends.triton.atoms import (
    LOG2E,
    add_exactly,
    exp,
    is_near,
    load_terms,
    marks,
    own_places,
    shift_of,
    sort_out,
    transform,
)
from fused_nce.backends.triton.kernels import role_weights, score_tile
from fused_nce.backends.triton.memory import SIZES, load_scale, load_term, load_tile, offsets, pitch_of, store_line


@triton.jit
def quarters(r):
    """(X, Y) as four (X, Y / 4), side by side."""
    left, right = halves(r)
    first, second = halves(left)
    third, fourth = halves(right)
    return first, second, third, fourth


@triton.jit
def eighths(r):
    left, right = halves(r)
    first, second, third, fourth = quarters(left)
    fifth, sixth, seventh, eighth = quarters(right)  # fault: triton-eighths
    return first, second, third, fourth, fifth, sixth, seventh, eighth


@triton.jit
def halves(r):
    return tl.split(tl.permute(tl.reshape(r, (r.shape[0], 2, r.shape[1] // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=SIZES)
def both_kernel(
    x,  # (n_x, D) rows
    y,  # (n_y, D) columns
    scale,  # a number, or a 0-d tensor
    clip,
    inverse_clip,
    bias,  # 0-d, read by its transform
    row_ids,  # (N,) int64, read by layouts that have them
    column_ids,  # (M,) int64, likewise
    ceilings,
    partial,  # (splits, PARTIALS.lines, n_x) out
    blocks,  # (blocks of x, BACK.lines, n_y) out
    n_x,
    n_y,
    first,  # the image of row 0
    itself,  # the column that row 0 is
    walk,  # columns of a split
    stride_x,
    stride_y,
    FORM: tl.constexpr,
    PARTIALS: tl.constexpr,
    BACK: tl.constexpr,  # of columns
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One block of rows against one split of the columns, of which it meets each once."""
    PARTS: tl.constexpr = 8 if FORM.transform == "tanh_clip" else 4  # a clip takes more registers
    block, split = tl.program_id(0), tl.program_id(1)
    factor = load_scale(scale, FORM.tensor_scale)
    xs = block * X + tl.arange(0, X)
    given = (row_ids, column_ids, ceilings, first, itself)
    row_marks = marks(xs, n_x, n_y, given, False, FORM)
    places = own_places(block * X, X, given, False, FORM)
    kept = load_tile(x, xs, n_x, stride_x, 0, D, CHUNK, FORM.mixed)
    of_columns = blocks + block.to(tl.int64) * (BACK.lines * n_y.to(tl.int64))
    none = tl.zeros((X,), tl.float32)
    found = (none, none, tl.full((X,), float("-inf"), tl.float32), none)
    begin = split * walk
    for j in range(begin, begin + tl.minimum(walk, n_y - begin), Y):
        r, _ = score_tile(
            kept, x, y, xs, j + tl.arange(0, Y), n_x, n_y, stride_x, stride_y, 0, FORM, D, CHUNK, SLICE, PRECISION
        )
        parts = eighths(r) if PARTS == 8 else quarters(r)
        for part in tl.static_range(PARTS):
            found = fold_part(
                parts[part], j + part * (Y // PARTS), found, factor, clip, inverse_clip, bias, xs, row_marks, places,
                n_x, n_y, given, block * X + X > n_x, of_columns, PARTIALS, BACK, FORM,
            )  # fmt: skip
    total, _, top, square = found
    inside, length = xs < n_x, n_x.to(tl.int64)
    lines = partial + split * (PARTIALS.lines * length) + xs
    store_line(lines, total, length, inside, PARTIALS.neg_sum)
    store_line(lines, top, length, inside, PARTIALS.neg_top)
    store_line(lines, square, length, inside, PARTIALS.square)


@triton.jit
def fold_part(
    r, j, found, factor, clip, inverse_clip, bias, xs, row_marks, places, n_x, n_y, given, ragged, of_columns,
    PARTIALS: tl.constexpr, BACK: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """What rows have found so far, with these columns; what the rows leave of each of the columns is stored.

    A column's shift is its own: a row's may be anything beside it.
    """
    total, lost, top, square = found
    WIDTH: tl.constexpr = r.shape[1]
    ys = j + tl.arange(0, WIDTH)
    s = factor * r
    t, _ = transform(s, clip, inverse_clip, bias, FORM)
    t, _, neg, every = sort_out(t, r, is_near(j, WIDTH, n_y, places), row_marks, ys, n_x, n_y, given, False, FORM)
    if not FORM.by_place:
        t = tl.where(neg, t, float("-inf"))
    if PARTIALS.square >= 0:
        squared = s * s
        if FORM.drop_self:
            squared = tl.where(every, squared, 0.0)
        square += tl.sum(squared, 1)
    t += 0.0 * s  # NaN beside a bad score, whichever set it is in  # fault: triton-both-nan-hidden
    seen = tl.maximum(top, tl.max(t, 1))
    if FORM.shiftless:
        e = tl.exp2(t * LOG2E)
    else:
        shift = shift_of(seen)
        e = tl.exp2(t * LOG2E - (shift * LOG2E)[:, None])
        fade = exp(top - shift)
        total, lost = total * fade, lost * fade  # fault: triton-both-fade
    total, lost = add_exactly(total, lost, tl.sum(e, 1))
    if ragged:
        t = tl.where((xs < n_x)[:, None], t, float("-inf"))  # fault: triton-rows-beyond
    peak = tl.max(t, 0)
    shift = (shift_of(peak) * LOG2E)[None, :]
    e = tl.exp2(t * LOG2E if FORM.shiftless else t * LOG2E - shift)  # fault: triton-column-shift
    at, there, length = of_columns + ys, ys < n_y, n_y.to(tl.int64)
    store_line(at, tl.sum(e, 0), length, there, BACK.neg_sum)
    store_line(at, peak, length, there, BACK.neg_top)
    return total, lost, seen, square


@triton.jit(do_not_specialize=SIZES)
def strip_kernel(
    x,  # (n_x, D) rows
    y,  # (n_y, D) columns
    scale,  # a number, or a 0-d tensor
    clip,
    inverse_clip,
    bias,  # 0-d, read by its transform
    row_ids,  # (N,) int64, read by layouts that have them
    column_ids,  # (M,) int64, likewise
    ceilings,
    row_lines,  # as in `weights_kernel`
    column_lines,
    stored,  # (rows of a strip, pitch_of(n_y)) out: w, without the positives that `gather.py` adds
    n_x,
    n_y,
    first,  # the image of row 0
    itself,  # the column that row 0 is
    start,  # the strip's first row
    walk,  # columns of a program
    stride_x,
    stride_y,
    FORM: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    X: tl.constexpr,
    Y: tl.constexpr,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """One block of a strip's rows against some columns: w = dL/ds from finished statistics.

    A strip has room for whole tiles, so no store needs a mask; nobody reads what is beyond the last row or column.
    """
    ROWS: tl.constexpr = FORM.row_terms
    block, split = tl.program_id(0), tl.program_id(1)
    factor = load_scale(scale, FORM.tensor_scale)
    mine = block * X + tl.arange(0, X)
    xs = start + mine  # fault: triton-strip-first
    given = (row_ids, column_ids, ceilings, first, itself)
    row_marks = marks(xs, n_x, n_y, given, False, FORM)
    places = own_places(start + block * X, X, given, False, FORM)
    row_terms = load_terms(row_lines, xs, n_x, ROWS)
    d_target = load_term(row_lines + xs, pitch_of(n_x), ROWS.d_target)
    kept = load_tile(x, xs, n_x, stride_x, 0, D, CHUNK, FORM.mixed)
    at = stored + offsets(mine, pitch_of(n_y))
    begin = split * walk
    for j in range(begin, begin + tl.minimum(walk, n_y - begin), Y):
        r, _ = score_tile(
            kept, x, y, xs, j + tl.arange(0, Y), n_x, n_y, stride_x, stride_y, 0, FORM, D, CHUNK, SLICE, PRECISION
        )
        sides = halves(r)
        for part in tl.static_range(8):
            parts = quarters(sides[part // 4])
            store_part(
                parts[part % 4], tl.multiple_of(j + part * (Y // 8), Y // 8), at, factor, clip, inverse_clip, bias,
                row_marks, places, row_terms, d_target, column_lines, n_x, n_y, given, FORM,
            )  # fmt: skip


@triton.jit
def store_part(
    r, j, at, factor, clip, inverse_clip, bias, row_marks, places, row_terms, d_target, column_lines, n_x, n_y, given,
    FORM: tl.constexpr,
):  # fmt: skip
    """The weights of some columns to their places."""
    COLUMNS: tl.constexpr = FORM.column_terms
    WIDTH: tl.constexpr = r.shape[1]
    ys = j + tl.arange(0, WIDTH)
    s = factor * r
    t, slope = transform(s, clip, inverse_clip, bias, FORM)
    column_terms = load_terms(column_lines, ys, n_y, COLUMNS)
    near = is_near(j, WIDTH, n_y, places)
    t, pos, neg, every = sort_out(t, r, near, row_marks, ys, n_x, n_y, given, False, FORM)
    w = role_weights(s, t, slope, (pos, neg, every), row_terms, column_terms, 1, FORM)
    if FORM.ids == "target":  # for its column, to which any number of rows may give
        w += tl.where(pos, d_target[:, None] * slope, 0.0)  # fault: triton-strip-target
    tl.store(at[:, None] + ys[None, :], w.to(at.dtype.element_ty))


def multiply(w: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
    """out = w·y, or added to it; out is float32, in which cuBLAS adds up whatever w and y are."""
    if w.dtype == out.dtype:
        torch.addmm(out, w, y, beta=int(add), out=out)
    elif w.is_cuda:
        torch.addmm(out, w, y, torch.float32, beta=int(add), out=out)
    else:  # of 16 bits, which torch has on a GPU alone
        torch.addmm(out, w.float(), y.float(), beta=int(add), out=out)
