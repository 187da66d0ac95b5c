"""Tiles: one shipped table, by architecture, bits of the inputs and width. Nothing is tuned at run time.

`python -m bench.static` compiles every entry for its architecture and holds it to no spill and no stack.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """The shape of one program."""

    x: int  # rows that it keeps
    y: int  # rows of the other side a step
    chunk: int  # width of a step of the score GEMM; all of D where it holds it
    slice: int  # width of the sums that it keeps
    warps: int
    stages: int


# The interpreter's: small, so that small problems have many tiles, chunks and slices.
INTERPRETED = 0
WIDTHS = (64, 128, 256, 512)  # the bounds of the table's columns; the last entry is for anything wider
TABLE: dict[tuple[int, int], tuple[Tile, ...]] = {
    (INTERPRETED, 16): (Tile(16, 64, 64, 64, 4, 1),) + 4 * (Tile(32, 64, 32, 64, 4, 1),),
    (INTERPRETED, 32): (Tile(16, 64, 64, 64, 4, 1),) + 4 * (Tile(32, 64, 32, 64, 4, 1),),
    (90, 16): (
        Tile(128, 64, 64, 64, 8, 3),
        Tile(128, 64, 128, 128, 8, 3),
        Tile(128, 32, 256, 256, 8, 3),
        Tile(64, 32, 512, 512, 8, 2),
        Tile(64, 32, 128, 512, 8, 3),
    ),
}
ARCHITECTURES = sorted({architecture for architecture, _ in TABLE} - {INTERPRETED})
BITS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 16}


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16: what a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())


def tile(architecture: int, dtype: torch.dtype, d: int) -> Tile:
    """The tile for width D."""
    column = sum(d > width for width in WIDTHS)
    found = TABLE[architecture, BITS[dtype]][column]
    width = power_of_two(d)
    return found._replace(chunk=min(found.chunk, width), slice=min(found.slice, width))


class Gather(NamedTuple):
    """The shape of one program that gathers positives."""

    x: int
    partners: int
    width: int


def gather_tile(d: int, partners: int) -> Gather:
    """4096 elements a program of four warps: 32 a thread, all in flight at once."""
    width = min(128, power_of_two(d))
    count = min(16, 1 << (partners - 1).bit_length())
    return Gather(4096 // (width * count), count, width)


def architecture_of(device: torch.device) -> int | None:
    """The table's architecture for a device, None where it has none. The interpreter runs on the CPU."""
    if device.type == "cpu":
        return INTERPRETED
    major = 10 * torch.cuda.get_device_capability(device)[0]
    return major if major in ARCHITECTURES else None
