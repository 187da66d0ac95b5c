"""A GPU's two memories: the process' own as the global one, and the shared one of CTAs with what its rules forbid.

Between two barriers, nothing may be touched by two warps if one of them writes; in one launch, nor may global memory by
two CTAs, which no barrier orders: but the one whose turn at an atomic comes last is after what all others had done, and
fenced, before their own. Each 2-byte granule remembers who wrote and who read it, so a missing barrier is
reported whichever order the threads happened to run in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .parse import Fault

Array = NDArray[Any]
FIRST, LAST = 4096, 1 << 47  # of the addresses that a process may have
MANY = 1 << 22  # granules of a launch that are kept before each is kept once
WORDS = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class _Process:
    """All of this process' memory, as an array of words."""

    def __init__(self, size: int) -> None:
        self.__array_interface__ = {
            "data": (FIRST, False),
            "shape": ((LAST - FIRST) // size,),
            "typestr": f"<u{size}",
            "version": 3,
        }


PROCESS: dict[int, Array] = {size: np.asarray(_Process(size)) for size in WORDS}


def check_alignment(at: Array, size: int) -> None:
    """A vector of `size` bytes lies at a multiple of them."""
    if (at % size).any():
        raise Fault(f"{int(at[at % size != 0][0]):#x} is no multiple of the access' {size} bytes")


def put(words: Array, index: Array, value: Array) -> None:
    """Of threads that store together; raise where two different numbers have one place."""
    words[index] = value
    if (words[index] != value).any():
        raise Fault("two threads write different values to one place")


Touched = tuple[Array, Array, Array, Array]  # granules; the lowest and the highest of those who touched; if one wrote


def merged(parts: Sequence[Touched]) -> Touched:
    """Each granule once."""
    cells, low, top, wrote = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(cells)
    cells = cells[order]
    starts = np.flatnonzero(np.diff(cells, prepend=-1))
    low, top = np.minimum.reduceat(low[order], starts), np.maximum.reduceat(top[order], starts)
    return cells[starts], low, top, np.logical_or.reduceat(wrote[order], starts)


def check_order(touched: Touched, who: str, what: str) -> None:
    """Raise for a granule that one of several wrote."""
    cells, low, top, wrote = touched
    bad = wrote & (low != top)
    if bad.any():
        at = int(cells[bad][0]) * 2
        raise Fault(f"hazard: {who} {low[bad][0]} and {top[bad][0]} at global address {at:#x}, {what}")


class Global:
    """Addresses are pointers of this process, within `ranges` of (first, bytes); None: whoever calls knows none."""

    def __init__(self, ranges: Sequence[tuple[int, int]] | None) -> None:
        self.ranges = ranges
        # Since the last barrier: granules, their warps, if they wrote, and if that was after their CTA's atomic.
        self.now: list[tuple[Array, Array, bool, Array]] = []
        self.after: list[Touched] = []  # what CTAs touched after theirs
        self.turns: list[int] = []  # of CTAs at atomics
        self.late, self.unfenced = np.zeros(0, bool), np.zeros(0, bool)  # of the warps of the CTAs that run
        self.launch: list[Touched] = []  # since the launch: by CTAs
        self.merged = 0  # granules of the first part, which holds each once
        if ranges is not None:
            parts = sorted(set(ranges))
            self.first = np.array([first for first, _ in parts] or [0], np.int64)
            self.end = np.maximum.accumulate(np.array([first + size for first, size in parts] or [0], np.int64))

    def check(self, at: Array, size: int) -> None:
        """Raise where an access leaves what it may touch."""
        check_alignment(at, size)
        if self.ranges is not None:
            part = np.searchsorted(self.first, at, "right") - 1
            bad = (part < 0) | (at + size > self.end[part])
            if bad.any():
                raise Fault(f"{int(at[bad][0]):#x} is outside every tensor, by thread {int(np.flatnonzero(bad)[0])}")

    def load(self, at: Array, size: int, count: int, warps: Array) -> list[Array]:
        """`count` words that lie side by side, for each address."""
        self.check(at, size * count)
        self._note(at, size * count, warps, False)
        index = (at - FIRST) // size
        return [PROCESS[size][index + word] for word in range(count)]

    def store(self, at: Array, values: Sequence[Array], warps: Array) -> None:
        """The other way."""
        size = values[0].dtype.itemsize
        self.check(at, size * len(values))
        self._note(at, size * len(values), warps, True)
        self.unfenced[warps] = True
        index = (at - FIRST) // size
        for word, value in enumerate(values):
            put(PROCESS[size], index + word, value)

    def _note(self, at: Array, size: int, warps: Array, wrote: bool) -> None:
        cells, whose = Shared.granules(at, size, warps)
        self.now.append((cells, whose, wrote, self.late[whose]))

    def turn(self, warp: int, ctas: Array) -> None:
        """A CTA's atomic. It orders nothing that its warp has stored without a fence."""
        self.late |= ctas == ctas[warp]
        if not self.unfenced[warp]:
            self.turns.append(int(ctas[warp]))

    def settle(self, ctas: Array) -> None:
        """At a barrier, which orders the warps of a CTA: their CTAs' numbers. Raise for what had no order before it."""
        now, self.now = self.now, []
        if not now:
            return
        cells, warps = (np.concatenate([part[n] for part in now]) for n in (0, 1))
        wrote = np.repeat([part[2] for part in now], [len(part[0]) for part in now])
        if wrote.any():
            check_order(merged([(cells, warps, warps, wrote)]), "warps", "with no barrier between")
        late = np.concatenate([part[3] for part in now])
        for which, list_of in ((~late, self.launch), (late, self.after)):
            if which.any():
                list_of.append((cells[which], *2 * (ctas[warps[which]],), wrote[which]))
        if sum(len(part[0]) for part in self.launch) > 2 * self.merged + MANY:
            self.launch = [merged(self.launch)]
            self.merged = len(self.launch[0][0])

    def finish(self, kernel: str, ctas: int) -> None:
        """At the end of a launch of so many CTAs."""
        last = self.turns[-1] if sorted(self.turns) == list(range(ctas)) else -1
        for cells, cta, _, wrote in self.after:
            others = cta != last
            self.launch.append((cells[others], cta[others], cta[others], wrote[others]))
        if self.launch:
            check_order(merged(self.launch), f"CTAs of {kernel}:", "whose order is not defined")


class Shared:
    """The shared memory of several CTAs, one after the other: `at` counts from the start of the first one's.

    A stamp is epoch·W + warp; epochs are counted by barriers. `everyone` stands for several readers.
    """

    def __init__(self, ctas: int, size: int, warps: int) -> None:
        self.size, self.warps = -(-size // 1024) * 1024 if size else 0, warps // ctas
        self.used, self.everyone, self.w, self.epoch = size, warps, warps + 1, 0
        data = np.zeros(ctas * self.size, np.uint8)
        self.words = {n: data.view(word) for n, word in WORDS.items()}
        self.written = np.full(len(data) // 2, -1, np.int64)
        self.read = np.full(len(data) // 2, -1, np.int64)
        self.busy = np.zeros(len(data) // 2, np.int16)  # granules that a running matrix instruction reads

    def check(self, at: Array, size: int, warps: Array) -> None:
        """Alignment, and the bounds of the CTA whose warp it is: the next one's memory is not this one's."""
        check_alignment(at, size)
        own = at - warps // self.warps * self.size
        bad = (own < 0) | (own + size > self.used)
        if bad.any():
            raise Fault(f"shared address {int(own[bad][0])} of {self.used} bytes")

    @staticmethod
    def granules(at: Array, size: int, warps: Array) -> tuple[Array, Array]:
        """Those of each access, and its warp beside each."""
        cells = (at // 2)[:, None] + np.arange(max(1, size // 2))
        return cells.ravel(), np.repeat(warps, cells.shape[1])

    def will_read(self, cells: Array, warps: Array) -> None:
        """Note who reads; raise for what nothing wrote, or another warp since the last barrier."""
        before, mine, now = self.written[cells], self.epoch * self.w + warps, self.epoch * self.w
        if (before < 0).any():
            raise Fault("reads shared memory that nothing wrote")
        if (bad := (before >= now) & (before != mine)).any():
            raise Fault(self._hazard("reads", warps[bad][0], "wrote", before[bad][0]))
        readers = self.read[cells]
        self.read[cells] = np.where((readers >= now) & (readers != mine), now + self.everyone, mine)
        several = self.read[cells] != mine
        self.read[cells[several]] = now + self.everyone

    def will_write(self, cells: Array, warps: Array, note: bool = True) -> None:
        """Note who writes; raise for what another warp read or wrote since the last barrier."""
        mine, now = self.epoch * self.w + warps, self.epoch * self.w
        for what, before in (("wrote", self.written[cells]), ("read", self.read[cells])):
            if (bad := (before >= now) & (before != mine)).any():
                raise Fault(self._hazard("writes", warps[bad][0], what, before[bad][0]))
        if self.busy[cells].any():
            raise Fault("writes what a matrix instruction still reads")
        if note:
            self.written[cells] = mine
            self.written[cells[self.written[cells] != mine]] = now + self.everyone

    def _hazard(self, does: str, warp: int, did: str, stamp: int) -> str:
        other = int(stamp % self.w)
        who = "several warps" if other == self.everyone else f"warp {other}"
        return f"hazard: warp {int(warp)} {does} what {who} {did} in shared memory, with no barrier between"

    def load(self, at: Array, size: int, count: int, warps: Array) -> list[Array]:
        """`count` words side by side, for each address."""
        self.check(at, size * count, warps)
        self.will_read(*self.granules(at, size * count, warps))
        return [self.words[size][at // size + word] for word in range(count)]

    def store(self, at: Array, values: Sequence[Array], warps: Array) -> None:
        """The other way."""
        size = values[0].dtype.itemsize
        self.check(at, size * len(values), warps)
        self.will_write(*self.granules(at, size * len(values), warps))
        for word, value in enumerate(values):
            put(self.words[size], at // size + word, value)
