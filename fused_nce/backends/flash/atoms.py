"""The formulas of `core/atoms.py` as Triton functions: one parity test compares the twins.

float32 throughout. Exponentials go through `ex2`, the one that the hardware has; `tanh.approx` is never used: its error
of 2^-11 is a thousand times the budget.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


# ---- layouts ----------------------------------------------------------------------------------------------------


@triton.jit
def image_of(index, first, PER_IMAGE: tl.constexpr):
    """The image that each row or column of `index` belongs to."""
    return index // PER_IMAGE + first


@triton.jit
def own_mask(x_images, y_images):
    """True where row and column belong to the same image, (X, Y). Another layout is another branch here."""
    return x_images[:, None] == y_images[None, :]


# ---- transforms -------------------------------------------------------------------------------------------------


@triton.jit
def transform(s, clip, inverse_clip, CLIP: tl.constexpr):
    """(t, dt/ds).

    With a = 1/(e^2|x| + 1), tanh|x| = 1 − 2a, and sech² = 4a(1 − a) keeps its digits where tanh saturates. Near 0,
    1 − 2a cancels; the odd polynomial is the minimax fit of tanh up to 0.6, relative error 3e-9 before rounding.
    """
    if CLIP:
        x = tl.abs(s) * inverse_clip
        a = 1.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
        z = x * x
        p = -0.005895156081 * z + 0.02079596985
        p = p * z - 0.05378382970
        p = p * z + 0.1333192412
        p = p * z - 0.3333329800
        near = x * (z * p) + x
        value = clip * tl.where(x < 0.6, near, 1.0 - 2.0 * a)
        return tl.where(s < 0.0, -value, value), 4.0 * (a - a * a)
    else:
        return s, 1.0


@triton.jit
def slope_of(t, inverse_clip, CLIP: tl.constexpr):
    """dt/ds from the value t, where the score itself is not at hand."""
    if CLIP:
        x = t * inverse_clip
        return (1.0 - x) * (1.0 + x)
    else:
        return tl.full(t.shape, 1.0, tl.float32)


# ---- sums of exponentials ---------------------------------------------------------------------------------------


@triton.jit
def shift_of(top):
    """The shift that a running maximum asks for; a row that has seen nothing (−inf) asks for 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def exp(x):
    """e^x to 2 ulp and one rounding of its argument; 0 at −inf, NaN at NaN."""
    return tl.exp2(x * LOG2E)


@triton.jit
def add_exactly(total, lost, x):
    """Kahan's sum and what it lost: a thousand equal terms would all be rounded the same way."""
    y = x - lost
    following = total + y
    return following, (following - total) - y


@triton.jit
def log_sum(total, shift):
    """log Σ e^t; −inf for a row without terms."""
    return shift + tl.log(total)
