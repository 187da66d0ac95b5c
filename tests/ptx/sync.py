"""Copies that arrive later, atomics, and instructions that order what the interpreter runs in order anyway."""

from __future__ import annotations

import numpy as np

from .machine import Machine, instruction
from .memory import FIRST, PROCESS
from .parse import Fault, Instruction


@instruction("cp", "async ca cg shared shared_cta global commit_group wait_group wait_all L2_128B")
def copy(x: Machine, i: Instruction) -> None:
    """cp.async: the bytes arrive as late as they may, at the thread's wait for their group."""
    if "commit_group" in i.flags:
        x.groups = x.groups + (1 if x.mask is None else x.mask)
    elif "wait_all" in i.flags:
        x.groups = x.groups + (1 if x.mask is None else x.mask)
        _arrive(x, 0)
    elif "wait_group" in i.flags:
        _arrive(x, int(x.read(i.operands[0], "u32")[0]))
    else:
        _issue(x, i)


def _issue(x: Machine, i: Instruction) -> None:
    size = int(x.read(i.operands[2], "u32")[0])
    word = 4 if size == 4 else 8
    to, source, threads = x.address(i.operands[0], True), x.address(i.operands[1], False), x.active()
    wanted = x.some(x.read(i.operands[3], "u32")) if len(i.operands) > 3 else np.full(len(to), size)
    if not np.isin(wanted, (0, size)).all():
        raise Fault("cp.async of a part of its bytes")
    there = wanted == size
    values = [np.zeros(len(to), f"u{word}") for _ in range(size // word)]
    for value, found in zip(
        values, x.memory.load(source[there], word, size // word, x.warp[threads[there]]), strict=True
    ):
        value[there] = found
    x.shared.check(to, size, x.warp[threads])
    x.shared.will_write(*x.shared.granules(to, size, x.warp[threads]), note=False)
    x.copies.append((threads, x.groups[threads], to, values))


def _arrive(x: Machine, left: int) -> None:
    """All groups but the last `left` of the threads that wait."""
    waits = np.ones(x.n, bool) if x.mask is None else x.mask
    copies, x.copies = x.copies, []
    for threads, groups, to, values in copies:
        ready = waits[threads] & (groups < x.groups[threads] - left)
        if ready.any():
            x.shared.store(to[ready], [value[ready] for value in values], x.warp[threads[ready]])
        if not ready.all():
            later = ~ready
            x.copies.append((threads[later], groups[later], to[later], [value[later] for value in values]))


@instruction("fence membar bar", "proxy async shared_cta cta gl gpu sc warp sync acq_rel")
def nothing(x: Machine, i: Instruction) -> None:
    """Fences: each access is finished before the next. Of barriers, those of a warp."""
    if {"gl", "gpu"} & set(i.flags):
        x.memory.unfenced[x.warp[x.active()]] = False
    if i.name == "bar" and "warp" not in i.flags:
        raise Fault(f"unknown instruction: {i.text}")


@instruction("atom", "global inc relaxed gpu")
def increment(x: Machine, i: Instruction) -> None:
    """One thread after the other: up to a limit, after which 0 follows."""
    at, limit = x.address(i.operands[1], False), x.some(x.read(i.operands[2], "u32"))
    x.memory.check(at, 4)
    before = np.zeros(len(at), np.uint32)
    for n, thread in enumerate(x.active()):
        word = (at[n] - FIRST) // 4
        before[n] = PROCESS[4][word]
        PROCESS[4][word] = 0 if before[n] >= limit[n] else before[n] + 1
        x.memory.turn(int(x.warp[thread]), x.number)
    x.write(i.operands[0], x.all(before))
