"""Conversions between types."""

from __future__ import annotations

import numpy as np

from .arith import flushed
from .machine import TYPES, Machine, instruction
from .memory import Array
from .parse import Fault, Instruction


def to_bf16(x: Array) -> Array:
    """float32 to the bits of bfloat16, halves to even."""
    wide = x.view(np.uint32).astype(np.uint64)
    rounded = wide + np.uint64(0x7FFF) + (wide >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_f16(x: Array) -> Array:
    """float32 to the bits of float16."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def to_tf32(x: Array) -> Array:
    """float32 to ten digits, halves away from zero."""
    return x.view(np.uint32) + np.uint32(0x1000) & np.uint32(0xFFFFE000)


def wide(x: Array, type: str) -> Array:
    """Bits of bfloat16, float16 or TF32 to float32."""
    if type == "bf16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type == "f16":
        return x.astype(np.uint16).view(np.float16).astype(np.float32)
    return (x & np.uint32(0xFFFFE000)).view(np.float32)


NARROW = {"bf16": to_bf16, "f16": to_f16, "tf32": to_tf32}
TO_INTEGER = {"rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc}


@instruction("cvt", "rn rna ftz rni rmi rpi rzi")
def convert(x: Machine, i: Instruction) -> None:
    """`cvt.to.from`, and two float32 into one register: the first is its upper half."""
    to, source = i.flags[-2:]
    if to in ("bf16x2", "f16x2"):
        upper, lower = (NARROW[to[:-2]](x.read(operand, "f32")).astype(np.uint32) for operand in i.operands[1:])
        x.write(i.operands[0], upper << np.uint32(16) | lower)
        return
    if source in ("bf16", "f16") and to == "f32":
        x.write(i.operands[0], wide(x.read(i.operands[1], "b16"), source))
        return
    value = x.read(i.operands[1], source)
    if "ftz" in i.flags and value.dtype == np.float32:
        value = flushed(value)
    if to in NARROW and source == "f32":
        if ("rna" in i.flags) != (to == "tf32"):
            raise Fault(f"unknown instruction: cvt.{'.'.join(i.flags)}")
        x.write(i.operands[0], NARROW[to](value))
        return
    if value.dtype.kind == "f" and to[0] != "f":
        limits = np.iinfo(TYPES[to])
        rounded = TO_INTEGER[i.flags[0]](value).astype(np.longdouble)
        value = np.where(np.isnan(rounded), 0, np.clip(rounded, limits.min, limits.max))
    elif {to, source} & {"bf16", "f16", "tf32", "bf16x2", "f16x2"}:
        raise Fault(f"unknown instruction: cvt.{'.'.join(i.flags)}")
    value = value.astype(TYPES[to])
    x.write(i.operands[0], flushed(value) if "ftz" in i.flags and to == "f32" else value)


@instruction("cvta", "to global shared")
def address(x: Machine, i: Instruction) -> None:
    """Global addresses are the same as generic ones; shared ones would not be."""
    if i.flags[0] != "to" or "global" not in i.flags:
        raise Fault(f"unknown instruction: cvta.{'.'.join(i.flags)}")
    x.write(i.operands[0], x.read(i.operands[1], "u64"))
