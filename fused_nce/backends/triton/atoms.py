"""The formulas of `core/statistics.py` and of the transforms as Triton functions; a parity test compares both.

float32 throughout. Exponentials go through `ex2`, the one that the hardware has; `tanh.approx` is never used: its error
of 2^-11 is a thousand times the budget. FORM is a `form.Form`, WANTED one of its two `form.Wanted`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.triton.memory import load_term, pitch_of

LOG2E = tl.constexpr(1.4426950408889634)


# ---- layouts: column j is a positive of row i iff their ids are equal -------------------------------------------


@triton.jit
def marks_of_rows(rows, ids, first, itself, ceilings, n, m, FORM: tl.constexpr):
    """(id, the column that it is itself, its ceiling) of each row."""
    ceiling = tl.load(ceilings + rows, mask=rows < n, other=0.0) if FORM.ceiling else rows
    return ids_of_rows(rows, ids, first, n, m, FORM), rows + itself, ceiling


@triton.jit
def ids_of_rows(rows, ids, first, n, m, FORM: tl.constexpr):
    if FORM.ids == "image":
        return rows // FORM.rows_per_image + first  # fault: triton-offset-ignored
    elif FORM.ids == "target":  # a target outside the columns matches none
        target = tl.load(ids + rows, mask=rows < n, other=-1)
        return tl.where((target >= 0) & (target < m), target, -1).to(tl.int32)
    elif FORM.ids == "label":
        return tl.load(ids + rows, mask=rows < n, other=0)
    else:
        return rows


@triton.jit
def marks_of_columns(columns, ids, m, FORM: tl.constexpr):
    """(id, itself, no ceiling) of each column."""
    return _column_ids(columns, ids, m, FORM), columns, columns


@triton.jit
def _column_ids(columns, ids, m, FORM: tl.constexpr):
    if FORM.ids == "image":
        return columns // FORM.n_c
    elif FORM.ids == "label":
        return tl.load(ids + columns, mask=columns < m, other=0)
    else:
        return columns


@triton.jit
def sets(x_marks, y_marks, y_inside, r, ROW_AXIS: tl.constexpr, FORM: tl.constexpr):
    """(pos, neg, all) of a tile of dot products, (X, Y) or what broadcasts to it. The padding beyond y is in none.

    ROW_AXIS is where the rows' marks are spread: 1 where they are x's, 0 where y's.
    """
    x_ids, x_itself, x_ceiling = x_marks
    y_ids, y_itself, y_ceiling = y_marks
    kept = y_inside[None, :]  # fault: triton-padding-counted
    if FORM.drop_self:
        kept = kept & (x_itself[:, None] != y_itself[None, :])  # fault: triton-row-itself
    if FORM.ids == "none":
        pos, neg = kept != kept, kept
    else:
        own = x_ids[:, None] == y_ids[None, :]
        pos, neg = own & kept, ~own & kept
    if FORM.ceiling:  # a NaN stays, and shows
        ceiling = x_ceiling if ROW_AXIS == 1 else y_ceiling
        neg = neg & ~(r > tl.expand_dims(ceiling, ROW_AXIS))  # fault: triton-ceiling
    return pos, neg, kept


@triton.jit
def marks(index, count, other, given, COLUMNS: tl.constexpr, FORM: tl.constexpr):
    """Marks of rows, or of COLUMNS, `count` of them beside `other`, from what a call gives a layout."""
    row_ids, column_ids, ceilings, first, itself = given
    if COLUMNS:
        return marks_of_columns(index, column_ids, count, FORM)
    else:
        return marks_of_rows(index, row_ids, first, itself, ceilings, count, other, FORM)


@triton.jit
def sort_out(t, r, near, x_marks, ys, n_x, n_y, given, BY_COLUMN: tl.constexpr, FORM: tl.constexpr):
    """(t, pos, neg, all) of a tile of dot products r, whose x are columns or rows.

    Where places alone say what a negative is, t of anything else becomes −inf, which every formula of negatives takes
    for nothing. Only a tile `near` such a place looks, as its branch is one for all threads; nobody reads a set then.
    """
    if FORM.by_place:
        if FORM.hardness > 0:
            t = t + FORM.hardness * r
        if near:
            t = negatives_alone(t, x_marks, ys, n_x, n_y, given, BY_COLUMN, FORM)
        return t, t, t, t
    else:
        pos, neg, every = sets_of(r, x_marks, ys, n_x, n_y, given, BY_COLUMN, FORM)
        return hardened(t, r, neg, FORM), pos, neg, every


@triton.jit
def negatives_alone(t, x_marks, ys, n_x, n_y, given, BY_COLUMN: tl.constexpr, FORM: tl.constexpr):
    """t of the negatives, −inf elsewhere."""
    _, neg, _ = sets_of(t, x_marks, ys, n_x, n_y, given, BY_COLUMN, FORM)
    return tl.where(neg, t, float("-inf"))


@triton.jit
def sets_of(r, x_marks, ys, n_x, n_y, given, BY_COLUMN: tl.constexpr, FORM: tl.constexpr):
    """`sets` of a tile."""
    y_marks = marks(ys, n_y, n_x, given, not BY_COLUMN, FORM)
    return sets(x_marks, y_marks, ys < n_y, r, 0 if BY_COLUMN else 1, FORM)


@triton.jit
def own_places(x0, X: tl.constexpr, given, BY_COLUMN: tl.constexpr, FORM: tl.constexpr):
    """[low, high), int64: among these y are all that x0 and the X − 1 after it have as positives or are themselves."""
    _, _, _, first, itself = given
    start = x0.to(tl.int64)
    last = start + (X - 1)
    if FORM.ids == "image":  # which has the row itself, too
        if BY_COLUMN:
            of, others, away = FORM.n_c, FORM.rows_per_image, -first
        else:
            of, others, away = FORM.rows_per_image, FORM.n_c, first
        return (start // of + away) * others, (last // of + away + 1) * others  # fault: triton-own-places
    elif FORM.drop_self:
        away = -itself if BY_COLUMN else itself
        return start + away, last + away + 1
    else:
        return start, start


@triton.jit
def is_near(j, Y: tl.constexpr, n_y, places):
    """Whether the tile of y from j on has any of those places, or the end of y."""
    low, high = places
    return ((j < high) & (j + Y > low)) | (j + Y > n_y)  # fault: triton-near


@triton.jit
def among(members, x, FORM: tl.constexpr):
    """x of members, else 0: what x is anyway where others' t is −inf."""
    if FORM.by_place:
        return x
    else:
        return tl.where(members, x, 0.0)


# ---- transforms -------------------------------------------------------------------------------------------------


@triton.jit
def transform(s, clip, inverse_clip, bias, FORM: tl.constexpr):
    """(t, dt/ds).

    With a = 1/(e^2|x| + 1), tanh|x| = 1 − 2a, and sech² = 4a(1 − a) keeps its digits where tanh saturates. Near 0,
    1 − 2a cancels; the odd polynomial is the minimax fit of tanh up to 0.6, relative error 3e-9 before rounding.
    """
    if FORM.transform == "tanh_clip":
        x = tl.abs(s) * inverse_clip
        a = 1.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
        z = x * x
        p = -0.005895156081 * z + 0.02079596985
        p = p * z - 0.05378382970
        p = p * z + 0.1333192412
        p = p * z - 0.3333329800
        near = x * (z * p) + x
        value = clip * tl.where(x < 0.6, near, 1.0 - 2.0 * a)  # fault: triton-tanh-cancels
        return tl.where(s < 0.0, -value, value), 4.0 * (a - a * a)
    elif FORM.transform == "bias":
        return s + tl.load(bias), 1.0
    else:
        return s, 1.0


@triton.jit
def hardened(t, r, neg, FORM: tl.constexpr):
    """t of a tile with hardness: that of its negatives, which the slope in s knows nothing of."""
    if FORM.hardness > 0:
        return t + tl.where(neg, FORM.hardness * r, 0.0)  # fault: triton-hardness
    else:
        return t


@triton.jit
def slope_of(t, inverse_clip, FORM: tl.constexpr):
    """dt/ds from the value t, where the score itself is not at hand."""
    if FORM.transform == "tanh_clip":
        x = t * inverse_clip
        return (1.0 - x) * (1.0 + x)
    else:
        return tl.full(t.shape, 1.0, tl.float32)


# ---- exponentials, their sums and logarithms --------------------------------------------------------------------


@triton.jit
def shift_of(top):
    """The shift that a running maximum asks for; a row that has seen nothing (−inf) asks for 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def exp(x):
    """e^x to 2 ulp and one rounding of its argument; 0 at −inf, NaN at NaN."""
    return tl.exp2(x * LOG2E)


@triton.jit
def softplus(t):
    """log(1 + e^t), its digits kept where it is small.

    log(1 + e) is 2·atanh(z), z = e/(2 + e) ≤ 1/3: an odd polynomial, the minimax fit to a relative error of 5e-9 before
    rounding, in place of a logarithm whose argument would have rounded e away.
    """
    e = exp(-tl.abs(t))
    z = e / (e + 2.0)
    y = z * z
    p = 0.1400599739 * y + 0.1400090188
    p = p * y + 0.2001076366
    p = p * y + 0.3333320814
    return tl.maximum(t, 0.0) + 2.0 * (z * (y * p) + z)  # fault: triton-softplus-rounds


@triton.jit
def sigmoid(t):
    """1 / (1 + e^−t): a small one keeps its digits, and an infinite e^−t gives 0."""
    return 1.0 / (1.0 + exp(-t))


@triton.jit
def add_exactly(total, lost, x):
    """Kahan's sum and what it lost: a thousand equal terms would all be rounded the same way."""
    y = x - lost
    following = total + y
    return following, (following - total) - y  # fault: triton-equal-terms


@triton.jit
def log_sum(total, shift):
    """log Σ e^t; −inf for a row without terms."""
    return shift + tl.log(total)


@triton.jit
def add_exponentials(t, members, total, lost, top, s, FORM: tl.constexpr):
    """A tile's exponentials, and the row's sum, what it lost, and its maximum; the sum's fade under the new maximum.

    tanh(±inf) = ±1 and e^−inf = 0 would hide a bad score: 0·s makes the sum NaN, whichever set the score is in.
    """
    t = t if FORM.by_place else tl.where(members, t, float("-inf"))
    seen = tl.maximum(top, tl.max(t, 1))
    if FORM.shiftless:
        e = tl.exp2(t * LOG2E)
        fade = tl.full(top.shape, 1.0, tl.float32)
    else:
        shift = shift_of(seen)
        e = tl.exp2((t - shift[:, None]) * LOG2E)
        fade = exp(top - shift)
        total, lost = total * fade, lost * fade
    total, lost = add_exactly(total, lost, tl.sum(e + 0.0 * s, 1))  # fault: triton-nan-hidden
    return e, total, lost, seen, fade


@triton.jit
def merge_exponentials(total, top, parts, peaks, FORM: tl.constexpr):
    """The sums and the maxima with those of several parts, (parts, X)."""
    seen = tl.maximum(top, tl.max(peaks, 0))
    if FORM.shiftless:
        return total + tl.sum(parts, 0), seen
    else:
        shift = shift_of(seen)
        faded = parts * exp(peaks - shift[None, :])  # fault: triton-splits-joined
        return total * exp(top - shift) + tl.sum(faded, 0), seen


# ---- weights ----------------------------------------------------------------------------------------------------


@triton.jit
def load_terms(terms, index, count, TERMS: tl.constexpr):
    """What a side's weights are made of, a tuple of (len(index),), from the lines that `gather.terms_kernel` wrote."""
    at, pitch = terms + index, pitch_of(count)
    return (
        load_term(at, pitch, TERMS.neg_lse),
        load_term(at, pitch, TERMS.d_neg_lse),
        load_term(at, pitch, TERMS.d_softplus),
        load_term(at, pitch, TERMS.d_square),
        load_term(at, pitch, TERMS.pos_lse),
        load_term(at, pitch, TERMS.d_pos_lse),
        load_term(at, pitch, TERMS.d_sum),
        load_term(at, pitch, TERMS.d_gap),
        load_term(at, pitch, TERMS.share),
        load_term(at, pitch, TERMS.d_neg_sum),
    )


@triton.jit
def weights_of(s, t, slope, of, terms, AXIS: tl.constexpr, FORM: tl.constexpr, WANTED: tl.constexpr):
    """One side's part of w = dL/ds, (X, Y). AXIS is where its terms are spread: 1 where they are x's, 0 where y's.

    Outside its set a term may be infinite: it is chosen, never multiplied by 0.
    """
    pos, neg, every = of
    neg_lse, d_neg_lse, d_softplus, d_square, pos_lse, d_pos_lse, d_sum, d_gap, share, d_neg_sum = terms
    if WANTED.neg_lse >= 0:
        e = tl.exp2(t * LOG2E if FORM.shiftless else t * LOG2E - tl.expand_dims(neg_lse, AXIS))  # one for both sides
        on_neg = tl.expand_dims(d_neg_lse, AXIS) * (e * slope)  # fault: triton-clip-slope-missing
        if WANTED.neg_softplus >= 0:
            on_neg += tl.expand_dims(d_softplus, AXIS) * (sigmoid(t) * slope)
        w = among(neg, on_neg, FORM)
    elif WANTED.neg_softplus >= 0:
        w = among(neg, tl.expand_dims(d_softplus, AXIS) * (sigmoid(t) * slope), FORM)
    else:
        w = tl.zeros(t.shape, tl.float32)
    if WANTED.neg_sum >= 0:
        w += tl.where(neg, tl.expand_dims(d_neg_sum, AXIS) * slope, 0.0)  # fault: triton-negatives-sum
    if WANTED.pos_lse >= 0:
        e = tl.exp2(t * LOG2E - tl.expand_dims(pos_lse, AXIS))
        on_pos = tl.expand_dims(d_pos_lse, AXIS) * e
        if WANTED.pos_gap >= 0:  # one term, because it is small where its two cancel
            on_pos += tl.expand_dims(d_gap, AXIS) * (e - tl.expand_dims(share, AXIS))  # fault: triton-positive-gap
        if WANTED.pos_sum >= 0:
            on_pos += tl.expand_dims(d_sum, AXIS)
        w = tl.where(pos, on_pos * slope, w)
    elif WANTED.pos_sum >= 0:
        w = tl.where(pos, tl.expand_dims(d_sum, AXIS) * slope, w)
    if WANTED.square >= 0:
        penalty = tl.expand_dims(d_square, AXIS) * s
        w += tl.where(every, penalty, 0.0) if FORM.drop_self else penalty
    return w
