"""What a main loop costs, read from machine code: the instructions of its cheapest turn.

A loop is a backward branch; a turn is the cheapest way from its head back to it that takes an exponential of each
score. What a compiler puts behind a branch for the rare turn (masks, a new maximum) is not on that way.
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

SPECIAL = "MUFU"  # exponentials and reciprocals: a fraction of the rate of other instructions
LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ +)?([A-Z0-9_]+)([^;]*);")
GUARD = re.compile(r"/\*[0-9a-f]+\*/\s+@")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Turn(NamedTuple):
    """The instructions of one turn of a loop, for one thread."""

    issued: int
    special: int


class Block(NamedTuple):
    """Instructions without a branch among them, and the blocks that may follow."""

    issued: int
    special: int
    follows: tuple[int, ...]


def functions(listing: str) -> dict[str, str]:
    """The text of each function of `nvdisasm -c`, by its mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks_of(text: str) -> list[Block]:
    """The basic blocks of a function, in the order of its text.

    A predicated branch may go on; an unconditional one, EXIT and RET may not. Calls are treated as instructions.
    """
    raw: list[tuple[list[str], str | None, bool]] = [([], None, True)]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            if raw[-1][0] or len(raw) == 1:
                raw.append(([], None, True))
            labels[label[1]] = len(raw) - 1
        elif found := LINE.search(line):
            raw[-1][0].append(found[1])
            if found[1] in ("BRA", "EXIT", "RET"):
                jump = TARGET.search(found[2]) if found[1] == "BRA" else None
                raw[-1] = (raw[-1][0], jump[1] if jump else None, bool(GUARD.search(line)))
                raw.append(([], None, True))
    out = []
    for index, (names, target, goes_on) in enumerate(raw):
        follows = [labels[target]] if target in labels else []
        if goes_on and index + 1 < len(raw):
            follows.append(index + 1)
        out.append(Block(len(names), names.count(SPECIAL), tuple(follows)))
    return out


def turns(text: str, least: int) -> list[Turn]:
    """The loops of a function with `least` or more exponentials a turn, in the order of its text."""
    blocks = blocks_of(text)
    heads = sorted({to for index, block in enumerate(blocks) for to in block.follows if to <= index})
    ways = [way for head in heads if (way := _cheapest(blocks, head, least))]
    # An outer loop's way leads through the inner one's, and the same way has more than one head.
    inner = {tuple(sorted(way)) for way in ways}
    alone = [way for way in sorted(inner) if not any(set(other) < set(way) for other in inner)]
    return [Turn(sum(blocks[i].issued for i in way), sum(blocks[i].special for i in way)) for way in alone]


def _cheapest(blocks: list[Block], head: int, least: int) -> list[int] | None:
    """The blocks of the cheapest way from `head` back to it with so many exponentials; None without."""
    queue: list[tuple[int, int, int, list[int]]] = [(0, head, 0, [])]
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
            more = min(least, special + blocks[at].special)
            heapq.heappush(queue, (cost + blocks[at].issued, to, more, [*path, at]))
    return None
