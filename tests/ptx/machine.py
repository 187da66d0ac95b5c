"""CTAs of one launch, run side by side: a register is an array over their threads, an instruction some array work.

Threads part at branches. Of the places where some could go on, the first in the text comes first, so that they meet
again as early as they can; threads at one place run together, those of other CTAs too. When all wait at barriers, all
go on. A launch whose result depends on another order has a hazard, and `memory` reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from .memory import Array, Global, Shared
from .parse import BYTES, NOWHERE, Address, Fault, Immediate, Instruction, Kernel, Operand, Register, Special

TYPES: dict[str, Any] = {
    **{f"{k}{bits}": np.dtype(f"{'i' if k == 's' else 'u'}{bits // 8}") for k in "bus" for bits in (8, 16, 32, 64)},
    "pred": np.dtype(bool),
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": np.dtype("u2"),
    "bf16x2": np.dtype("u4"),
    "f16x2": np.dtype("u4"),
    "tf32": np.dtype("u4"),
}
BITS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
Handler = Callable[["Machine", Instruction], None]
HANDLERS: dict[str, tuple[Handler, frozenset[str]]] = {}
# What these make of a register that some threads never wrote, those have not written either: a reduction among 16 warps
# shuffles all 32 lanes of one. Whatever acts on a number, an address or a predicate takes none such.
COMPUTE = "add sub mul div rem min max and or xor neg abs not sqrt rcp ex2 lg2 fma mad shl shr bfe lop3 prmt"
PASS_ON = frozenset(f"{COMPUTE} setp selp cvt mov shfl".split())
AT_ONCE = 4096  # threads: more hide the interpreter's cost no better, and take memory


def instruction(names: str, flags: str = "") -> Callable[[Handler], Handler]:
    """Register what executes these, with the flags that it knows beside types."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names.split(), (handler, frozenset(flags.split()))))
        return handler

    return register


def handler_of(i: Instruction) -> Handler | None:
    """What executes an instruction; None: the machine itself does.

    Raises:
        Fault: by its name, where nobody knows it or one of its flags.
    """
    if i.name in ("bra", "ret", "exit") or (
        i.name == "bar" and i.flags == ("sync",) and i.operands == (Immediate(0, ""),)
    ):
        return None
    handler, flags = HANDLERS.get(i.name, (None, frozenset()))
    if handler is None or any(flag not in BYTES and flag not in flags for flag in i.flags):
        raise Fault(f"unknown instruction: {'.'.join((i.name, *i.flags))} ({i.text[:100]})")
    return handler


@cache
def immediate(number: Immediate, type: str) -> Array:
    """A number as an array of one."""
    if type == "pred":
        return np.array([number.bits != 0])
    size = BYTES[type]
    if number.type and BYTES[number.type] != size:
        raise Fault(f"{number.type} where {type} is needed")
    return np.array([number.bits & (1 << 8 * size) - 1], BITS[size]).view(TYPES[type])


class Machine:
    """Some CTAs of a launch, by their numbers within the grid."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: int,
        ctas: Sequence[int],
        parameters: bytes,
        dynamic_bytes: int,
        memory: Global,
    ) -> None:
        if threads % 32:
            raise Fault(f"a CTA of {threads} threads: whole warps alone are interpreted")
        self.kernel, self.memory, self.parameters = kernel, memory, np.frombuffer(parameters, np.uint8)
        self.threads, self.n = threads, threads * len(ctas)
        thread = np.arange(self.n)
        self.warp, self.lane, self.cta = thread // 32, thread % 32, thread // threads
        self.shared = Shared(len(ctas), kernel.shared_bytes + dynamic_bytes, self.n // 32)
        number = np.asarray(ctas)[self.cta]
        self.number = number[::32]  # of each warp's CTA
        memory.late, memory.unfenced = np.zeros((2, self.n // 32), bool)
        places = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        self.special = {"%tid.x": thread % threads, "%laneid": self.lane, "%ntid.x": np.full(1, threads)}
        self.special |= {f"%ctaid.{axis}": place for axis, place in zip("xyz", places, strict=True)}
        self.special |= {f"%nctaid.{axis}": np.full(1, size) for axis, size in zip("xyz", grid, strict=True)}
        self.handlers = [handler_of(i) for i in kernel.code]
        self.registers: list[Array | None] = [None] * len(kernel.indices)
        self.partly: dict[int, Array] = {}  # registers that only some threads have written: which
        self.mask: Array | None = None  # threads that execute the current instruction; None: all
        self.passes_on = False  # it is one of PASS_ON
        self.missing: Array | None = None  # threads that never wrote what it reads
        self.copies: list[Any] = []  # of cp.async, not yet there
        self.groups = np.zeros(self.n, np.int64)  # that a thread has committed
        self.products: list[Any] = []  # of wgmma, whose operands are still read
        self.product_groups = np.zeros(self.n, np.int64)

    # ---- operands -----------------------------------------------------------------------------------------------

    def read(self, operand: Operand, type: str, where: Array | None = None) -> Array:
        """An operand as an array of that type, one element a thread or one for all; `where`: the others need none."""
        dtype = TYPES[type]
        if isinstance(operand, Register):
            bits, wrote = self.registers[operand.place], self.partly.get(operand.place)
            if wrote is not None:
                missing = ~wrote if self.mask is None else self.mask & ~wrote
                if (missing if where is None else missing & where).any():
                    if not self.passes_on:
                        raise Fault("reads a register that not each of the threads wrote")
                    self.missing = missing if self.missing is None else self.missing | missing
            if bits is None:
                raise Fault("reads a register that nothing wrote")
            if bits.dtype.itemsize < dtype.itemsize:
                raise Fault(f"reads {type} from a register of {operand.type}")
            return (bits if bits.dtype.itemsize == dtype.itemsize else bits.astype(BITS[dtype.itemsize])).view(dtype)
        if isinstance(operand, Immediate):
            return immediate(operand, type)
        if isinstance(operand, Special) and operand.name in self.special:
            return self.special[operand.name].astype(dtype)
        raise Fault(f"no operand: {operand}")

    def write(self, operand: Operand, value: Array) -> None:
        """Into a register of the threads that execute; integers are extended by their sign."""
        if operand is NOWHERE:
            return
        if not isinstance(operand, Register):
            raise Fault(f"no register: {operand}")
        size = BYTES[operand.type]
        if operand.type == "pred":
            value = value.astype(bool)
        elif value.dtype.itemsize == size:
            value = value.view(BITS[size])
        elif value.dtype.kind in "iu":
            value = value.astype(BITS[size])
        else:
            raise Fault(f"writes {value.dtype} into a register of {operand.type}")
        if self.missing is not None:
            active = np.ones(self.n, bool) if self.mask is None else self.mask
            before, wrote = self.registers[operand.place], self.partly.get(operand.place)
            wrote = np.full(self.n, before is not None) if wrote is None else wrote
            self.partly[operand.place] = (wrote & ~active) | (active & ~self.missing)
            value = np.where(active, value, value.dtype.type(0) if before is None else before)
        elif self.mask is None:
            self.partly.pop(operand.place, None)
        else:
            before, wrote = self.registers[operand.place], self.partly.get(operand.place)
            if before is None or wrote is not None:
                self.partly[operand.place] = self.mask if wrote is None else wrote | self.mask
            value = np.where(self.mask, value, value.dtype.type(0) if before is None else before)
        self.registers[operand.place] = value if len(value) == self.n else np.broadcast_to(value, self.n).copy()

    def active(self) -> Array:
        """Numbers of the threads that execute."""
        return np.arange(self.n) if self.mask is None else np.flatnonzero(self.mask)

    def some(self, value: Array) -> Array:
        """Of the threads that execute."""
        value = np.broadcast_to(value, self.n)
        return value if self.mask is None else value[self.mask]

    def all(self, found: Array) -> Array:
        """The other way: 0 for the others."""
        if self.mask is None:
            return found
        out = np.zeros(self.n, found.dtype)
        out[self.mask] = found
        return out

    def whole(self, threads: int) -> None:
        """An instruction of all threads of a warp, or of four."""
        if (
            self.mask is not None
            and (self.mask.reshape(-1, threads).any(1) != self.mask.reshape(-1, threads).all(1)).any()
        ):
            raise Fault(f"{threads} threads must execute it together")

    def address(self, operand: Operand, shared: bool) -> Array:
        """Of the threads that execute; within `shared` of all CTAs."""
        if not isinstance(operand, Address):
            raise Fault(f"no address: {operand}")
        narrow = isinstance(operand.base, Register) and BYTES[operand.base.type] == 4
        at = self.some(self.read(operand.base, "u32" if narrow else "u64").astype(np.int64) + operand.offset)
        return at + self.some(self.cta) * self.shared.size if shared else at

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """From the first instruction to the last thread's end."""
        self.fronts: dict[int, Array] = {0: np.ones(self.n, bool)}
        self.waiting: dict[int, Array] = {}
        self.text = ""
        try:
            while self.fronts or self.waiting:
                if not self.fronts:
                    self._release()
                place = min(self.fronts)
                self._advance(place, self.fronts.pop(place))
            self.memory.settle(self.number)
        except Fault as fault:
            raise Fault(f"{self.kernel.name}: {fault}: {self.text}") from None

    def _release(self) -> None:
        """All barriers at once."""
        if len(self.waiting) > 1:
            where = np.sum(
                [np.bincount(self.cta[mask], minlength=self.cta[-1] + 1) > 0 for mask in self.waiting.values()], 0
            )
            if where.max() > 1:
                raise Fault("threads of a CTA wait at different barriers")
        self.memory.settle(self.number)
        self.fronts, self.waiting = self.waiting, {}
        self.shared.epoch += 1

    def _meet(self, fronts: dict[int, Array], place: int, mask: Array) -> None:
        if mask.any():
            fronts[place] = fronts[place] | mask if place in fronts else mask

    def _advance(self, place: int, mask: Array) -> None:
        """Threads at one place, up to the next branch, barrier or end."""
        code, whole = self.kernel.code, bool(mask.all())
        while place < len(code):
            if place in self.fronts:
                mask = mask | self.fronts.pop(place)
                whole = bool(mask.all())
            i = code[place]
            place += 1
            self.text = i.text
            execute, rest, self.passes_on, self.missing = mask, None, False, None
            if i.guard is not None:
                self.mask = None if whole else mask
                guard = self.read(i.guard, "pred")
                execute = mask & (~guard if i.negated else guard)
                rest = mask & ~execute
            handler = self.handlers[place - 1]
            if handler is not None:
                if rest is None or execute.any():
                    self.mask = None if whole and (rest is None or execute.all()) else execute
                    self.passes_on = i.name in PASS_ON
                    handler(self, i)
                continue
            if i.name == "bra":
                self._meet(self.fronts, self.kernel.target(i), execute)
            elif i.name == "bar":
                self._meet(self.waiting, place, execute)
            if rest is not None:
                self._meet(self.fronts, place, rest)
            return


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    threads: int,
    parameters: bytes,
    dynamic_bytes: int = 0,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Run a whole grid, as many CTAs side by side as AT_ONCE threads allow."""
    if len(parameters) != kernel.parameter_bytes:
        raise Fault(f"{kernel.name}: {len(parameters)} bytes of arguments, needed: {kernel.parameter_bytes}")
    memory, ctas, step = Global(ranges), range(grid[0] * grid[1] * grid[2]), max(1, AT_ONCE // threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(ctas), step):
            Machine(kernel, grid, threads, ctas[first : first + step], parameters, dynamic_bytes, memory).run()
        memory.finish(kernel.name, len(ctas))
