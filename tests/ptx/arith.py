"""Arithmetic, comparisons and bits of one thread."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import TYPES, Machine, instruction
from .memory import Array
from .parse import BYTES, Fault, Instruction

SMALLEST = {np.dtype("f4"): np.float32(2.0**-126), np.dtype("f8"): np.float64(2.0**-1022)}


def flushed(x: Array) -> Array:
    """Subnormals are zeros, of their sign."""
    small = np.abs(x) < SMALLEST[x.dtype]
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if small.any() else x


def fused(a: Array, b: Array, c: Array) -> Array:
    """a·b + c, rounded once. The product of two float32 is exact in float64; its sum is rounded to odd, then again."""
    if a.dtype == np.float64:  # what calls it takes a logarithm, and needs no last digit
        return (a.astype(np.longdouble) * b + c).astype(np.float64)
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    inexact = (lost != 0) & (bits & 1 == 0) & np.isfinite(total)
    if inexact.any():  # to the neighbour whose last bit is 1, on the side of what was lost
        bits = np.where(inexact, bits + np.where((lost > 0) == (total > 0), 1, -1), bits)
    return bits.view(np.float64).astype(np.float32)


def quotient(a: Array, b: Array) -> Array:
    """Integers divide towards zero; by 0, all bits are set."""
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    whole = a // safe
    if a.dtype.kind == "i":
        whole = whole + ((whole < 0) & (whole * safe != a))
    return np.where(b == 0, ~a.dtype.type(0), whole)


def high(a: Array, b: Array) -> Array:
    """The upper half of a product of integers, of 64 bits by Python's own."""
    bits = 8 * a.dtype.itemsize
    wide = np.dtype(f"{a.dtype.kind}8" if bits == 32 else object)
    return (a.astype(wide) * b.astype(wide) >> bits).astype(a.dtype)


# fmin and fmax give what is a number, as PTX's do without .NaN.
TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
    "min": np.fmin,
    "max": np.fmax,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
ONE: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg,
    "abs": np.abs,
    "not": operator.invert,
    "sqrt": np.sqrt,
    "rcp": lambda x: x.dtype.type(1) / x,
    "ex2": lambda x: np.exp2(x.astype(np.float64)),
    "lg2": lambda x: np.log2(x.astype(np.float64)),
}


# The relative errors that the manual allows; a result is off by all of it, up or down by what looks like chance.
ERRORS = {"ex2": 2.0**-22.5, "lg2": 2.0**-22.6, "rcp": 2.0**-23, "div": 2.0**-22}


def approximate(value: Array, name: str) -> Array:
    """As far off as a GPU's result may be, the same for the same value."""
    near = value.astype(np.float32)
    up = near.view(np.uint32) * np.uint32(2654435761) >> np.uint32(31) > 0
    return value * np.where(up, 1 + ERRORS[name], 1 - ERRORS[name])


def _finish(x: Machine, i: Instruction, value: Array, type: str) -> None:
    value = value.astype(TYPES[type])
    x.write(i.operands[0], flushed(value) if "ftz" in i.flags and value.dtype in SMALLEST else value)


def _inputs(x: Machine, i: Instruction, type: str) -> list[Array]:
    found = [x.read(operand, type) for operand in i.operands[1:]]
    return [flushed(a) for a in found] if "ftz" in i.flags and TYPES[type] in SMALLEST else found


def _check(i: Instruction) -> None:
    if i.type in ("f16", "bf16", "f16x2", "bf16x2", "tf32"):
        raise Fault(f"unknown instruction: {i.name}.{i.type}")


@instruction("add sub mul div rem min max and or xor", "rn ftz lo hi wide full approx NaN")
def two(x: Machine, i: Instruction) -> None:
    """Of two operands."""
    _check(i)
    a, b = _inputs(x, i, i.type)
    if "wide" in i.flags:
        wide = TYPES[f"{i.type[0]}{2 * int(i.type[1:])}"]
        x.write(i.operands[0], a.astype(wide) * b.astype(wide))
        return
    function = high if "hi" in i.flags else np.maximum if "NaN" in i.flags and i.name == "max" else TWO[i.name]
    value = function(a, b)
    _finish(x, i, approximate(value, i.name) if {"full", "approx"} & {*i.flags} else value, i.type)


@instruction("neg abs not sqrt rcp ex2 lg2", "rn ftz approx")
def one(x: Machine, i: Instruction) -> None:
    """Of one."""
    _check(i)
    (a,) = _inputs(x, i, i.type)
    value = ONE[i.name](a)
    if i.name == "rcp" and i.type == "f64":  # it has the upper half of the digits alone
        value = (value.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    elif "approx" in i.flags:
        value = approximate(value, i.name)
    _finish(x, i, value, i.type)


@instruction("fma mad", "rn ftz lo wide")
def three(x: Machine, i: Instruction) -> None:
    """a·b + c."""
    _check(i)
    if "wide" in i.flags:
        to = f"{i.type[0]}{2 * int(i.type[1:])}"
        a, b = (x.read(operand, i.type).astype(TYPES[to]) for operand in i.operands[1:3])
        x.write(i.operands[0], a * b + x.read(i.operands[3], to))
        return
    a, b, c = _inputs(x, i, i.type)
    _finish(x, i, fused(a, b, c) if i.type[0] == "f" else a * b + c, i.type)


@instruction("shl shr")
def shift(x: Machine, i: Instruction) -> None:
    """By as many bits as there are or more: nothing is left, or the sign alone."""
    bits = 8 * BYTES[i.type]
    a, by = x.read(i.operands[1], i.type), x.read(i.operands[2], "u32")
    near = np.minimum(by, bits - 1).astype(a.dtype)
    value = a << near if i.name == "shl" else a >> near
    x.write(
        i.operands[0], value if i.name == "shr" and a.dtype.kind == "i" else np.where(by < bits, value, a.dtype.type(0))
    )


@instruction("bfe")
def extract(x: Machine, i: Instruction) -> None:
    """Some bits of a 32-bit integer, extended by the highest of them where it is signed."""
    a = x.read(i.operands[1], i.type).astype(np.int64)
    first, count = (x.read(operand, "u32").astype(np.int64) & 255 for operand in i.operands[2:])
    if BYTES[i.type] != 4 or (first + count > 32).any() or (count == 0).any():
        raise Fault("bfe beyond 32 bits")
    value = a >> first & (1 << count) - 1
    if i.type == "s32":
        value = np.where(value >> count - 1 & 1, value - (1 << count), value)
    x.write(i.operands[0], value.astype(np.int32))


@instruction("lop3")
def logic(x: Machine, i: Instruction) -> None:
    """Three operands' bits through a table of eight."""
    words = [x.read(operand, "b32") for operand in i.operands[1:4]]
    table = int(x.read(i.operands[4], "u32")[0])
    value = np.zeros(1, np.uint32)
    for row in range(8):
        if table >> row & 1:
            a, b, c = (word if row >> 2 - n & 1 else ~word for n, word in enumerate(words))
            value = value | a & b & c
    x.write(i.operands[0], value)


@instruction("prmt")
def permute(x: Machine, i: Instruction) -> None:
    """Four bytes of eight, each chosen by a nibble; its upper bit repeats the byte's sign."""
    a, b, choice = (x.read(operand, "b32").astype(np.uint64) for operand in i.operands[1:])
    both, value = a | b << np.uint64(32), np.zeros(1, np.uint64)
    for n in range(4):
        nibble = choice >> np.uint64(4 * n) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        value = value | byte << np.uint64(8 * n)
    x.write(i.operands[0], value.astype(np.uint32))


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


@instruction("setp", "ftz and or xor num nan " + " ".join(f"{c} {c}u" for c in COMPARE))
def compare(x: Machine, i: Instruction) -> None:
    """A comparison with a NaN is false, but for those whose name ends in u."""
    a, b = (x.read(operand, i.type) for operand in i.operands[1:3])
    if "ftz" in i.flags:
        a, b = flushed(a), flushed(b)
    how = i.flags[0]
    unordered = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(1, bool)
    if how in ("nan", "num"):
        value = unordered if how == "nan" else ~unordered
    elif how in COMPARE:
        value = COMPARE[how](a, b) & ~unordered
    else:
        value = COMPARE[how[:-1]](a, b) | unordered
    if i.flags[1] in ("and", "or", "xor"):
        value = TWO[i.flags[1]](value, x.read(i.operands[3], "pred"))
    if isinstance(i.operands[0], list):
        raise Fault("setp with two results")
    x.write(i.operands[0], value)


@instruction("selp")
def select(x: Machine, i: Instruction) -> None:
    """a where the predicate holds, else b."""
    a, b = (x.read(operand, i.type) for operand in i.operands[1:3])
    x.write(i.operands[0], np.where(x.read(i.operands[3], "pred"), a, b))
