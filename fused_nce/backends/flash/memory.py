"""Where things lie: offsets, loads, and what a call may change without a new compilation."""

from __future__ import annotations

import triton
import triton.language as tl

# Never specialised: another batch does not recompile. The spec, D and the tile are compiled in: a division by a number
# known then is a multiplication, and each tile makes one for every row and column.
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
