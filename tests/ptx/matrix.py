"""Matrix instructions: how a product's elements lie in the registers of a warp, or of four, and in shared memory.

Products of 16-bit numbers and of TF32 are exact in float64; the sum with the accumulator is rounded to float32 once.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from .convert import wide
from .machine import Machine, instruction
from .memory import Array
from .move import several
from .parse import Fault, Instruction, Operand

LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4  # a lane's row of eight, and its columns 2·PLACE and 2·PLACE + 1


class Shape(NamedTuple):
    """m16n8k16.f32.bf16 and its like."""

    m: int
    n: int
    k: int
    type: str


def shape_of(i: Instruction) -> Shape:
    """From the flags; accumulators are float32."""
    size = re.search(r"\.m(\d+)n(\d+)k(\d+)(?:\.row\.col)?\.f32\.(bf16|f16|tf32)", i.text)
    if size is None:
        raise Fault(f"unknown instruction: {i.text[:80]}")
    return Shape(int(size[1]), int(size[2]), int(size[3]), size[4])


def left(x: Machine, operand: Operand, k: int, type: str) -> Array:
    """(warps, 16, k) of the registers that hold 16 rows."""
    out = np.zeros((x.n // 32, 16, k))
    for n, register in enumerate(several(operand)):
        word, row, column = x.read(register, "b32").reshape(-1, 32), GROUP + 8 * (n % 2), n // 2
        if type == "tf32":
            out[:, row, PLACE + 4 * column] = wide(word, type)
        else:
            out[:, row, 2 * PLACE + 8 * column] = wide(word & np.uint32(0xFFFF), type)
            out[:, row, 2 * PLACE + 8 * column + 1] = wide(word >> np.uint32(16), type)
    return out


def right(x: Machine, operand: Operand, k: int, type: str) -> Array:
    """(warps, k, 8)."""
    out = np.zeros((x.n // 32, k, 8))
    for n, register in enumerate(several(operand)):
        word = x.read(register, "b32").reshape(-1, 32)
        if type == "tf32":
            out[:, PLACE + 4 * n, GROUP] = wide(word, type)
        else:
            out[:, 2 * PLACE + 8 * n, GROUP] = wide(word & np.uint32(0xFFFF), type)
            out[:, 2 * PLACE + 8 * n + 1, GROUP] = wide(word >> np.uint32(16), type)
    return out


def add(x: Machine, to: Operand, before: Operand, product: Array, keep: Array | None = None) -> None:
    """before + product (warps, 16, n) into registers: four a lane for every eight columns."""
    for n, (register, old) in enumerate(zip(several(to), several(before), strict=True)):
        found = product[:, GROUP + 8 * (n // 2 % 2), 8 * (n // 4) + 2 * PLACE + n % 2].reshape(-1)
        if keep is None:
            found = x.read(old, "f32") + found
        elif keep.any():  # else nothing may have been there
            found = np.where(keep, x.read(old, "f32", keep), np.float32(0)) + found
        x.write(register, found.astype(np.float32))


@instruction("mma", "sync aligned m16n8k16 m16n8k8 row col")
def of_a_warp(x: Machine, i: Instruction) -> None:
    """D = A B + C."""
    x.whole(32)
    s = shape_of(i)
    a, b = left(x, i.operands[1], s.k, s.type), right(x, i.operands[2], s.k, s.type)
    add(x, i.operands[0], i.operands[3], a @ b)


# ---- shared memory as matrices ----------------------------------------------------------------------------------


def _rows(x: Machine, operand: Operand, n: int) -> tuple[Array, Array]:
    """Addresses of the n-th matrix' rows, eight a warp, and their warps: lane 8 n + r has that of row r."""
    at = x.address(operand, True).reshape(-1, 32)[:, 8 * n : 8 * n + 8]
    return at.reshape(-1), np.repeat(x.some(x.warp)[::32], 8)


def _count(i: Instruction) -> int:
    return int(next(flag[1] for flag in i.flags if flag in ("x1", "x2", "x4")))


@instruction("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared_cta")
def load(x: Machine, i: Instruction) -> None:
    """8 × 8 matrices of 16 bits into the places of `left` and `right`."""
    x.whole(32)
    for n, register in zip(range(_count(i)), several(i.operands[0]), strict=True):
        at, warps = _rows(x, i.operands[1], n)
        matrix = np.stack(x.shared.load(at, 2, 8, warps), 1).reshape(-1, 8, 8)
        matrix = matrix.transpose(0, 2, 1) if "trans" in i.flags else matrix
        low, up = (matrix[:, GROUP, 2 * PLACE + half].astype(np.uint32) for half in (0, 1))
        x.write(register, x.all((low | up << np.uint32(16)).reshape(-1)))


@instruction("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared_cta")
def store(x: Machine, i: Instruction) -> None:
    """The other way."""
    x.whole(32)
    for n, register in zip(range(_count(i)), several(i.operands[1]), strict=True):
        word = x.some(x.read(register, "b32")).reshape(-1, 32)
        matrix = np.zeros((len(word), 8, 8), np.uint16)
        for half, value in enumerate((word & np.uint32(0xFFFF), word >> np.uint32(16))):
            row, column = (2 * PLACE + half, GROUP) if "trans" in i.flags else (GROUP, 2 * PLACE + half)
            matrix[:, row, column] = value
        at, warps = _rows(x, i.operands[0], n)
        x.shared.store(at, list(matrix.reshape(-1, 8).T), warps)


# ---- wgmma: four warps, operands in shared memory ----------------------------------------------------------------

WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of a row of the swizzled layouts, by the descriptor's mode
SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}


def described(
    x: Machine, operand: Operand, rows: int, k: int, size: int, transposed: bool
) -> tuple[Array, list[Array]]:
    """(groups, rows, k) words of a matrix by its descriptor (start, two strides, a swizzle), and their granules."""
    words = x.some(x.read(operand, "u64")).reshape(-1, 128)
    if (words != words[:, :1]).any():
        raise Fault("a descriptor differs within four warps")
    start, near, far = (((words[:, 0] >> np.uint64(n) & np.uint64(0x3FFF)) << np.uint64(4)) for n in (0, 16, 32))
    start, near, far = (part.astype(np.int64)[:, None, None] for part in (start, near, far))
    modes = np.unique(words[:, 0] >> np.uint64(62))
    if len(modes) != 1:
        raise Fault("descriptors with several swizzles")
    mode, (r, c) = int(modes[0]), (np.arange(rows)[:, None], np.arange(k)[None, :])
    width = WIDTH[mode]
    if transposed and mode:  # 16-bit words: those of `width` bytes are neighbouring rows
        half = width // 2
        at = start + r % half * 2 + r // half * near + c % 8 * width + c // 8 * far
    elif transposed:
        raise Fault("a transposed operand without a swizzle")
    elif mode:
        at = start + r % 8 * width + r // 8 * far + c * size
    else:
        part = 16 // size
        at = start + r % 8 * 16 + r // 8 * far + c // part * near + c % part * size
    at = (at ^ (at >> 7 & SWIZZLE[mode]) << 4) + x.some(x.cta)[::128, None, None] * x.shared.size
    x.shared.check(at.reshape(-1), size, np.repeat(x.some(x.warp)[::128], rows * k))
    cells = [np.unique(np.concatenate([one.ravel() // 2 + word for word in range(size // 2)])) for one in at]
    return x.shared.words[size][at // size], cells


@instruction(
    "wgmma",
    "mma_async sync aligned fence commit_group wait_group "
    + " ".join(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16)),
)
def of_four_warps(x: Machine, i: Instruction) -> None:
    """D (64, n) = A B + D, where the predicate holds. The operands in shared memory are read until a wait."""
    x.whole(128)
    if "commit_group" in i.flags:
        x.product_groups = x.product_groups + (1 if x.mask is None else x.mask)
    elif "wait_group" in i.flags:
        _finished(x, int(x.read(i.operands[0], "u32")[0]))
    elif "mma_async" in i.flags:
        s = shape_of(i)
        size = 4 if s.type == "tf32" else 2
        in_registers = isinstance(i.operands[1], list)
        signs, turned = i.operands[4:6], [x.read(operand, "u32")[0] != 0 for operand in i.operands[6:]]
        if any(x.read(sign, "s32")[0] != 1 for sign in signs):
            raise Fault("wgmma with a sign")
        cells: list[list[Array]] = []
        if in_registers:
            a = left(x, i.operands[1], s.k, s.type).reshape(-1, 64, s.k)
            a = a if x.mask is None else a[x.mask[::128]]
        else:
            words, read = described(x, i.operands[1], 64, s.k, size, bool(turned and turned[0]))
            a, cells = wide(words, s.type).astype(np.float64), [read]
        words, read = described(x, i.operands[2], s.n, s.k, size, bool(turned and turned[-1]))
        product = np.zeros((x.n // 128, 64, s.n))
        product[x.active()[::128] // 128] = a @ wide(words, s.type).astype(np.float64).transpose(0, 2, 1)
        add(x, i.operands[0], i.operands[0], product.reshape(-1, 16, s.n), x.read(i.operands[3], "pred"))
        for granules in (*cells, read):
            for thread, some in zip(x.active()[::128], granules, strict=True):
                # On behalf of no warp: what these four wrote needs a barrier too, since each reads the others'.
                x.shared.will_read(some, np.full(len(some), x.shared.everyone))
                x.shared.busy[some] += 1
                x.products.append((thread, x.product_groups[thread], some))


def _finished(x: Machine, left_over: int) -> None:
    """All products but those of the last groups of the warps that wait."""
    products, x.products = x.products, []
    for product in products:
        thread, group, cells = product
        if (x.mask is None or x.mask[thread]) and group < x.product_groups[thread] - left_over:
            x.shared.busy[cells] -= 1
            x.shared.read[cells] = x.shared.epoch * x.shared.w + x.shared.everyone
        else:
            x.products.append(product)
