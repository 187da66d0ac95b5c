"""Where things lie: offsets, loads, and what a call may change without a new compilation."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_nce.backends.triton.plan import STEP

# Never specialised: another batch recompiles no sweep. The form, D and the tile are compiled in: a division by a number
# known then is a multiplication, and each tile makes one for every row and column.
SIZES = ["n", "m", "n_x", "n_y", "first", "itself", "start", "walk", "splits", "programs"]


PITCH = tl.constexpr(STEP)


@triton.jit
def offsets(rows, stride):
    """Where each row starts, int64: rows·stride passes 2^31 long before either does."""
    return rows.to(tl.int64) * stride  # fault: triton-offsets-32


@triton.jit
def load_tile(x, rows, count, stride, d0, D: tl.constexpr, WIDTH: tl.constexpr, WIDEN: tl.constexpr):
    """x[rows, d0 : d0 + WIDTH], 0 outside, (len(rows), WIDTH); float32 where it must WIDEN."""
    d = d0 + tl.arange(0, WIDTH)
    inside = (rows < count)[:, None]
    if D % WIDTH != 0:
        inside = inside & (d < D)[None, :]
    tile = tl.load(x + offsets(rows, stride)[:, None] + d[None, :], mask=inside, other=0.0)
    return tile.to(tl.float32) if WIDEN else tile


@triton.jit
def load_scale(scale, TENSOR_SCALE: tl.constexpr):
    """The scale: a number, or a tensor that the host never reads."""
    if TENSOR_SCALE:
        return tl.load(scale)
    else:
        return scale


@triton.jit
def load_line(lines, length, mask, LINE: tl.constexpr, ABSENT: tl.constexpr):
    """Line LINE of (lines, length); ABSENT where there is none, or no element."""
    if LINE >= 0:
        return tl.load(lines + LINE * length, mask=mask, other=ABSENT)
    else:
        return tl.full(mask.shape, ABSENT, tl.float32)


@triton.jit
def store_line(lines, value, length, mask, LINE: tl.constexpr):
    """`value` to line LINE of (lines, length); one that is not there is left out."""
    if LINE >= 0:
        tl.store(lines + LINE * length, value, mask=mask)


@triton.jit
def pitch_of(count):
    """From one line of terms to the next: whole tiles of every size in the table, so that no load needs a mask."""
    return (count.to(tl.int64) + (PITCH - 1)) // PITCH * PITCH


@triton.jit
def load_term(at, pitch, LINE: tl.constexpr):
    """The line's terms; 0 for one that is not there."""
    if LINE >= 0:
        return tl.load(at + LINE * pitch)
    else:
        return tl.zeros(at.shape, tl.float32)
