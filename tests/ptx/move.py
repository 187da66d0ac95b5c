"""Between registers and memories, and between the threads of a warp."""

from __future__ import annotations

import numpy as np

from .machine import BITS, TYPES, Machine, instruction
from .memory import Array
from .parse import BYTES, Address, Fault, Instruction, Operand


def several(operand: Operand) -> list[Operand]:
    """{a, b} or a alone."""
    return operand if isinstance(operand, list) else [operand]


@instruction("mov")
def move(x: Machine, i: Instruction) -> None:
    """Also a register into its parts, and parts into a register, the lowest first."""
    to, source = i.operands
    size = BYTES[i.type]
    if isinstance(to, list):
        part = 8 * size // len(to)
        whole = x.read(source, i.type).view(BITS[size])
        for n, register in enumerate(to):
            x.write(register, (whole >> BITS[size].type(n * part)).astype(BITS[part // 8]))
    elif isinstance(source, list):
        part = 8 * size // len(source)
        value = np.zeros(1, BITS[size])
        for n, register in enumerate(source):
            value = value | x.read(register, f"b{part}").astype(BITS[size]) << BITS[size].type(n * part)
        x.write(to, value)
    else:
        x.write(to, x.read(source, i.type))


def _space(i: Instruction) -> bool:
    """Whether it is the shared memory."""
    if ("global" in i.flags) == any(flag.startswith("shared") for flag in i.flags):
        raise Fault(f"generic addresses are not interpreted: {i.text[:60]}")
    return "global" not in i.flags


@instruction("ld", "global shared shared_cta param v2 v4 nc")
def load(x: Machine, i: Instruction) -> None:
    """From any memory; small integers are extended to their register."""
    to, size = several(i.operands[0]), BYTES[i.type]
    if "param" in i.flags:
        found = _parameters(x, i.operands[1], size, len(to))
    else:
        shared = _space(i)
        at, warps = x.address(i.operands[1], shared), x.some(x.warp)
        parts = x.shared.load(at, size, len(to), warps) if shared else x.memory.load(at, size, len(to), warps)
        found = [x.all(part) for part in parts]
    for register, part in zip(to, found, strict=True):
        x.write(register, part.view(TYPES[i.type]))


def _parameters(x: Machine, place: Operand, size: int, count: int) -> list[Array]:
    if not isinstance(place, Address):
        raise Fault(f"no address: {place}")
    at = x.read(place.base, "u64").astype(np.int64) + place.offset
    if (x.some(at) < 0).any() or (x.some(at) + size * count > len(x.parameters)).any():
        raise Fault("reads beyond the arguments")
    at = np.clip(at, 0, len(x.parameters) - size * count)  # of threads that do not execute
    cells = at[:, None] + np.arange(size * count)
    words = np.ascontiguousarray(x.parameters[cells]).view(BITS[size])
    return [words[:, n] for n in range(count)]


@instruction("st", "global shared shared_cta v2 v4")
def store(x: Machine, i: Instruction) -> None:
    """The other way."""
    values = [x.some(x.read(register, i.type).view(BITS[BYTES[i.type]])) for register in several(i.operands[1])]
    shared = _space(i)
    at = x.address(i.operands[0], shared)
    (x.shared if shared else x.memory).store(at, values, x.some(x.warp))


@instruction("shfl", "sync down up bfly idx")
def shuffle(x: Machine, i: Instruction) -> None:
    """Another lane's word; one's own, and false, where that lane is out of bounds. All of a warp take part."""
    x.whole(32)
    word, by, bounds = (x.read(operand, "u32") for operand in i.operands[1:4])
    by, bounds = by.astype(np.int64), bounds.astype(np.int64)
    segment, clamp = bounds >> 8 & 31, bounds & 31
    first = x.lane & segment
    last = first | clamp & ~segment
    how = i.flags[1]
    lane = {"down": x.lane + by, "up": x.lane - by, "bfly": x.lane ^ by, "idx": first | by & ~segment}[how]
    inside = lane >= last if how == "up" else lane <= last
    lane = np.where(inside, lane, x.lane)
    to, source = several(i.operands[0]), x.warp * 32 + lane
    x.missing = None if x.missing is None else x.missing[source]
    x.write(to[0], np.broadcast_to(word, x.n)[source])
    if len(to) > 1:
        x.write(to[1], inside)
