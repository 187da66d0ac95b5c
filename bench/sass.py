"""What a main loop costs, read from machine code: the instructions of its cheapest turn.

A loop is a backward branch; a turn is the cheapest way from its head back to it that takes an exponential of each
score. What a compiler puts behind a branch for the rare turn (masks, a new maximum) is not on that way.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from typing import NamedTuple

MATRIX = "HGMMA"  # of four warps, asynchronous; the only ones whose clocks are counted
LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ +)?([A-Z0-9_]+)([^;]*);")
GUARD = re.compile(r"/\*[0-9a-f]+\*/\s+@")
SHAPE = re.compile(r"^\.64x(\d+)x(\d+)\S* +R\d+, (R\d+)?")
# Where sm_90 runs what: nvdisasm's own sets of operations, which put VIADD beside IMAD (`data12/sm90_2.txt` of
# github.com/redplait/denvdis has them), and in words Nsight Compute's guide, "Pipelines". The rest is memory's,
# control's, the tensor cores', or of a whole warp at once (U…).
ALU = (
    "BMSK|CS2R|F2FP|F2IP|FMNMX3?|FSEL|FSETP?|I2FP|I2IP?|IABS|IADD3?|IMNMX|ISETP|LEA|LOP3|MOV|P2R|PLOP3|PRMT|R2P|SEL"
    "|SGXT|SHF|VABSDIFF4?|VIADDMNMX|VIMNMX3?|VOTE"
)
FMA = "FADD2?|FFMA2?|FMUL2?|FSWZADD|HADD2|HFMA2|HMUL2|IDP|IMAD|IMUL|VIADD"
REST = (
    r"LD\w*|ST\w*|RED|ATOM\w*|SHFL|S2U?R|R2UR|FENCE|MEMBAR|ERRBAR|CCTL|SYNCS|DEPBAR|BAR|B2R|NOP|BRA|CALL|RET|EXIT"
    r"|BSSY|BSYNC|BREAK|WARPSYNC|WARPGROUP|YIELD|HMMA|HGMMA|U\w+"
)


class Dialect(NamedTuple):
    """How a disassembler writes."""

    label: re.Pattern[str]
    line: re.Pattern[str]  # an instruction's name and operands
    target: re.Pattern[str]  # of a jump
    ends: re.Pattern[str]  # a block
    goes_on: re.Pattern[str]  # a line with such an end may go on
    special: re.Pattern[str]  # exponentials and reciprocals: a fraction of the rate of other instructions
    alu: re.Pattern[str]  # of a pipe that takes fewer threads in a clock than are issued
    rest: re.Pattern[str]  # all others that are known


SASS = Dialect(
    re.compile(r"(\.L_x_\d+):"),
    LINE,
    re.compile(r"`\((\.L_x_\d+)\)"),
    re.compile("BRA|EXIT|RET"),
    GUARD,
    re.compile("MUFU"),
    re.compile(ALU),
    re.compile(f"{FMA}|{REST}"),
)
AMD = Dialect(
    re.compile(r"(\.LBB\d+_\d+):"),
    re.compile(r"^\s+([a-z]\w*)([^;]*)"),
    re.compile(r"(\.LBB\d+_\d+)"),
    re.compile(r"s_c?branch\w*|s_endpgm|s_setpc_b64"),
    re.compile(r"^\s+s_cbranch"),
    re.compile(r"v_(?:exp|log|rcp|rsq|sqrt)_f32\w*"),
    re.compile("(?!)"),  # integers and floats have one pipe, which takes what is issued
    re.compile(".*"),
)


class Turn(NamedTuple):
    """The instructions of one turn of a loop, for one thread."""

    issued: float
    special: float  # of them, and
    alu: float = 0  # in the ALU pipe
    matrix_clocks: float = 0.0  # of the tensor cores, for the matrix instructions of four warps

    @property
    def slots(self) -> float:
        """Issue slots of sm_90 that it takes at least.

        In a clock a multiprocessor issues for 128 threads, and takes 64 in its ALU pipe and 16 in that of special
        functions: CUDA's programming guide, "Throughput of Native Arithmetic Instructions". 128 find place in FMA's, 64
        with integers, which are too few in any loop here to count.
        """
        return max(self.issued, 2 * self.alu, 8 * self.special)


class Block(NamedTuple):
    """Instructions without a branch among them, and the blocks that may follow."""

    cost: Turn
    follows: tuple[int, ...]
    unknown: frozenset[str] = frozenset()  # instructions that no pipe is known of


def matrix_clocks(operands: str) -> float:
    """Of `HGMMA` followed by this: 64 × n results of a depth of 32 bytes.

    The tensor cores of a multiprocessor take 4096 FLOP of 16 bits a clock, and read 128 bytes of shared memory.
    """
    found = SHAPE.match(operands)
    if found is None:
        return 0.0
    n = int(found[1])
    return max(n / 2, (n + (0 if found[3] else 64)) * 32 / 128)


def shapes(text: str) -> dict[str, int]:
    """How many matrix instructions of each shape a function has: `64x128x16`, `…r` with an operand in registers."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        if (at := LINE.search(line)) and at[1] == MATRIX and (shape := SHAPE.match(at[2])):
            name = f"64x{shape[1]}x{shape[2]}{'r' if shape[3] else ''}"
            found[name] = found.get(name, 0) + 1
    return found


def functions(listing: str) -> dict[str, str]:
    """The text of each function of `nvdisasm -c`, by its mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks_of(text: str, by: Dialect = SASS) -> list[Block]:
    """The basic blocks of a function, in the order of its text.

    A predicated branch may go on; an unconditional one, EXIT and RET may not. Calls are treated as instructions.
    """
    raw: list[tuple[list[tuple[str, str]], str | None, bool]] = [([], None, True)]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := by.label.match(line):
            if raw[-1][0] or len(raw) == 1:
                raw.append(([], None, True))
            labels[label[1]] = len(raw) - 1
        elif found := by.line.search(line):
            raw[-1][0].append((found[1], found[2]))
            if by.ends.fullmatch(found[1]):
                jump = by.target.search(found[2])
                raw[-1] = (raw[-1][0], jump[1] if jump else None, bool(by.goes_on.search(line)))
                raw.append(([], None, True))
    out = []
    for index, (code, target, goes_on) in enumerate(raw):
        follows = [labels[target]] if target in labels else []
        if goes_on and index + 1 < len(raw):
            follows.append(index + 1)
        names = [name for name, _ in code]
        special, alu, rest = ([name for name in names if of.fullmatch(name)] for of in (by.special, by.alu, by.rest))
        clocks = sum(matrix_clocks(operands) for name, operands in code if name == MATRIX)
        unknown = frozenset(names).difference(special, alu, rest)
        out.append(Block(Turn(len(names), len(special), len(alu), clocks), tuple(follows), unknown))
    return out


def turns(text: str, least: int, inner: int = 1, by: Dialect = SASS) -> list[Turn]:
    """The loops of a function with `least` or more exponentials a turn, in the order of its text.

    Args:
        text: of the function.
        least: exponentials.
        inner: turns of a loop within such a turn.
        by: what wrote it.

    Raises:
        ValueError: for an instruction in one whose pipe is not known.
    """
    blocks = blocks_of(text, by)
    heads = sorted({to for index, block in enumerate(blocks) for to in block.follows if to <= index})
    ways = [way for head in heads if (way := _cheapest(blocks, head, least))]
    # An outer loop's way leads through the inner one's, and the same way has more than one head.
    found = {tuple(sorted(way)) for way in ways}
    alone = [way for way in sorted(found) if not any(set(other) < set(way) for other in found)]
    if unknown := {name for way in alone for i in way for name in blocks[i].unknown}:
        raise ValueError(f"machine code: got {sorted(unknown)}, need instructions whose pipe is known")
    return [_sum(blocks, [*way, *(inner - 1) * _within(blocks, way)]) for way in alone]


def _sum(blocks: list[Block], way: Iterable[int]) -> Turn:
    return Turn(*(sum(field) for field in zip(*(blocks[i].cost for i in way), strict=True)))


def _within(blocks: list[Block], way: tuple[int, ...]) -> list[int]:
    """The blocks of a way that a loop within it repeats."""
    repeated: set[int] = set()
    for at in way[:-1]:
        for head in blocks[at].follows:
            if way[0] < head <= at:
                repeated |= {i for i in way if head <= i <= at}
    return sorted(repeated)


def _cheapest(blocks: list[Block], head: int, least: int) -> list[int] | None:
    """The blocks of the cheapest way from `head` back to it with so many exponentials; None without."""
    queue: list[tuple[float, int, float, list[int]]] = [(0, head, 0, [])]
    seen = set()
    while queue:
        cost, at, special, path = heapq.heappop(queue)
        if at == head and path:
            if special >= least:
                return path
            continue
        if (at, special) in seen or at < head:
            continue
        seen.add((at, special))
        for to in blocks[at].follows:
            more = min(least, special + blocks[at].cost.special)
            heapq.heappush(queue, (cost + blocks[at].cost.issued, to, more, [*path, at]))
    return None
