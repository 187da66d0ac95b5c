"""Tiles: one shipped table, by architecture, dtype and width. Nothing is tuned while a program runs.

`python -m bench.static` compiles every entry for its architecture and holds it to no spill and no stack. Who wants
other tiles has `python -m fused_nce.backends.triton.tune` measure them, and names its file in FUSED_NCE_TILES: the same
file, the same bits.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fused_nce.backends.triton import plan
from fused_nce.backends.triton.form import ABSENT, Partials


class Tile(NamedTuple):
    """The shape of one program."""

    x: int  # rows that it keeps
    y: int  # rows of the other side a step
    chunk: int  # width of a step of the score GEMM; all of D where it holds it
    slice: int  # width of the sums that it keeps
    warps: int
    stages: int
    registers: int | None = (
        None  # a thread's limit; without one ptxas may spill to have two programs on a multiprocessor
    )

    both: int | None = None  # y of a pass that weighs each score in both roles; None: as `weights_tile` has it

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles it with."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else options | {"maxnreg": self.registers}


# By float32's FMA or by TF32's matrix instructions, whatever `torch.backends` allows: small enough for both.
_FLOAT32 = (
    Tile(32, 32, 16, 64, 4, 2),
    Tile(32, 32, 32, 128, 8, 2),
    Tile(32, 32, 32, 256, 8, 2),
    Tile(32, 32, 32, 512, 8, 2),
    Tile(32, 32, 32, 512, 8, 2),
)
# The interpreter's: small, so that small problems have many tiles, chunks and slices.
_INTERPRETED = (Tile(16, 64, 64, 64, 4, 1), *4 * (Tile(32, 64, 32, 64, 4, 1),))
INTERPRETED = "interpreter"

ALL = 255  # registers of a thread: one program of eight warps has the multiprocessor to itself
WIDTHS = (64, 128, 256, 512)  # the bounds of the table's columns; the last entry is for anything wider
# 8.6, 8.9 and 12.0 have sm_80's matrix instructions and 99 KiB of shared memory, of which its tiles take 75 at most.
CONSUMER = ("sm_86", "sm_89", "sm_120")
_SM80 = {
    torch.bfloat16: (
        Tile(128, 64, 64, 64, 8, 3),
        Tile(128, 32, 128, 128, 8, 3),
        Tile(64, 64, 256, 256, 8, 2),
        Tile(64, 16, 64, 512, 8, 3),
        Tile(64, 32, 64, 512, 8, 3),
    ),
    torch.float16: (
        Tile(128, 64, 64, 64, 8, 3),
        Tile(128, 32, 128, 128, 8, 3),
        Tile(64, 32, 256, 256, 8, 2),
        Tile(64, 32, 64, 256, 8, 2),
        Tile(64, 32, 64, 256, 8, 2),
    ),
    torch.float32: (*_FLOAT32[:2], _FLOAT32[2]._replace(registers=ALL), *_FLOAT32[3:]),
}
# AMD's MI300 and MI200: 64 threads a warp and 64 KiB of local memory. Of eight warps two or four would compute the same
# scores; of four, each thread has up to 512 registers.
_MATRIX = (
    Tile(128, 64, 64, 64, 4, 1, both=32),
    Tile(64, 64, 128, 128, 4, 1, both=32),
    Tile(64, 64, 64, 256, 4, 2),
    *2 * (Tile(64, 32, 64, 512, 4, 2),),
)
_CDNA = {
    torch.bfloat16: _MATRIX,
    torch.float16: _MATRIX,
    torch.float32: (
        Tile(64, 32, 16, 64, 4, 2),
        Tile(64, 32, 32, 128, 4, 2),
        Tile(64, 32, 32, 256, 4, 2, both=16),
        *2 * (Tile(32, 32, 32, 512, 4, 2),),
    ),
}
# 128 rows where they fit: half the traffic of 64. At D >= 256 the sums, X·SLICE float32, take most of the registers.
TABLE: dict[tuple[str, torch.dtype], tuple[Tile, ...]] = {
    **{("sm_80", dtype): tiles for dtype, tiles in _SM80.items()},
    **{(card, dtype): tiles for card in CONSUMER for dtype, tiles in _SM80.items()},
    ("sm_120", torch.bfloat16): (
        Tile(128, 32, 64, 64, 8, 3),
        *_SM80[torch.bfloat16][1:4],
        Tile(64, 32, 64, 512, 8, 2, ALL),
    ),
    ("sm_120", torch.float16): (
        Tile(128, 32, 64, 64, 8, 3),
        *_SM80[torch.float16][1:3],
        *2 * (Tile(64, 32, 64, 256, 8, 2, ALL),),
    ),
    **{(card, torch.float32): tuple(tile._replace(registers=ALL) for tile in _FLOAT32) for card in CONSUMER},
    ("sm_90", torch.bfloat16): (  # four warps: two or three programs on a multiprocessor, which take turns at its units
        Tile(64, 64, 64, 64, 4, 3),
        Tile(64, 64, 128, 128, 4, 3),
        Tile(64, 32, 256, 256, 4, 3, both=16),
        *2 * (Tile(64, 32, 64, 512, 8, 3),),
    ),
    ("sm_90", torch.float16): (
        Tile(128, 64, 64, 64, 8, 3),
        Tile(128, 32, 128, 128, 8, 2),
        Tile(64, 32, 256, 256, 8, 2),
        Tile(64, 32, 64, 512, 8, 3),
        Tile(64, 32, 64, 512, 8, 3),
    ),
    ("sm_90", torch.float32): (Tile(32, 32, 32, 64, 8, 2, ALL), *_FLOAT32[1:]),
    ("sm_100", torch.bfloat16): (
        Tile(128, 64, 64, 64, 8, 3, ALL),
        Tile(128, 64, 128, 128, 8, 3, ALL),
        Tile(128, 32, 256, 256, 8, 2),
        Tile(64, 32, 512, 512, 8, 2, ALL),
        Tile(64, 32, 64, 512, 8, 3),
    ),
    ("sm_100", torch.float16): (
        Tile(128, 64, 64, 64, 8, 3, both=32),
        Tile(128, 32, 128, 128, 8, 2, ALL),
        Tile(128, 32, 256, 256, 8, 2),
        Tile(64, 32, 64, 512, 8, 2),
        Tile(64, 32, 64, 512, 8, 2),
    ),
    ("sm_100", torch.float32): (
        Tile(32, 32, 32, 64, 8, 2, ALL),
        *(tile._replace(registers=ALL) for tile in _FLOAT32[1:]),
    ),
    **{("gfx942", dtype): tiles for dtype, tiles in _CDNA.items()},
    # Sums of float16 go through TF32, which an MI200 has not.
    **{("gfx90a", dtype): tiles for dtype, tiles in _CDNA.items() if dtype != torch.float16},
    (INTERPRETED, torch.float16): _INTERPRETED,
    (INTERPRETED, torch.float32): _INTERPRETED,
}
# Of the first columns: a pass over symmetric scores, plan.MIRROR rows at a time. Without, all scores are seen.
_SEEN_ONCE = (Tile(256, 32, 64, 64, 4, 3), Tile(256, 32, 128, 128, 4, 3))
MIRRORED: dict[tuple[str, torch.dtype], tuple[Tile, ...]] = {
    **{(card, dtype): _SEEN_ONCE for card in ("sm_80", "sm_90", "sm_100") for dtype in (torch.bfloat16, torch.float16)},
    **{(INTERPRETED, dtype): 2 * (Tile(256, 32, 64, 64, 4, 1),) for dtype in (torch.float16, torch.float32)},
}


class Square(NamedTuple):
    """The tiles of passes that keep no sums, so that D asks for nothing."""

    both: Tile  # for statistics of both sides; x is `plan.back_block`'s
    strip: Tile  # for stored weights, and for nce's statistics of rows
    fold: Tile  # for any statistics of rows


# Without, the passes are those of each side, and of the tiles above.
_FOLD = Tile(128, 64, 64, 64, 8, 3)
_SQUARE = Square(Tile(256, 128, 64, 64, 8, 2), Tile(128, 256, 64, 64, 8, 3), _FOLD)
# Where operands of matrix instructions are registers.
_SMALL = Square(Tile(256, 32, 64, 64, 8, 2, ALL), Tile(128, 64, 64, 64, 8, 2, ALL), _FOLD)
_SQUARE32 = Square(Tile(64, 32, 32, 32, 8, 2, ALL), *2 * (Tile(64, 64, 32, 32, 8, 2, ALL),))
SQUARE: dict[tuple[str, torch.dtype], Square] = {
    **{("sm_90", dtype): _SQUARE for dtype in (torch.bfloat16, torch.float16)},
    **{
        ("sm_100", dtype): _SQUARE._replace(both=Tile(256, 64, 64, 64, 8, 3))
        for dtype in (torch.bfloat16, torch.float16)
    },
    **{(card, dtype): _SMALL for card in ("sm_80", *CONSUMER) for dtype in (torch.bfloat16, torch.float16)},
    **{("sm_120", dtype): _SMALL._replace(fold=_FOLD._replace(stages=2)) for dtype in (torch.bfloat16, torch.float16)},
    **{(card, torch.float32): _SQUARE32 for card in ("sm_80", "sm_90", "sm_100", *CONSUMER)},
    (INTERPRETED, torch.float16): Square(Tile(256, 64, 32, 32, 4, 1), *2 * (Tile(64, 64, 32, 32, 4, 1),)),
    (INTERPRETED, torch.float32): Square(*3 * (Tile(64, 64, 32, 32, 4, 1),)),
}
ARCHITECTURES = tuple(dict.fromkeys(architecture for architecture, _ in TABLE if architecture != INTERPRETED))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16: what a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())


def column_of(d: int) -> int:
    """The column of the table for width D."""
    return sum(d > width for width in WIDTHS)


def tile(architecture: str, dtype: torch.dtype, d: int) -> Tile:
    """The tile for width D: of the file that FUSED_NCE_TILES names, else the shipped one."""
    column = column_of(d)
    found = own_tiles().get((architecture, dtype, column)) or TABLE[architecture, dtype][column]
    return fitted(found, d)


def fitted(found: Tile, d: int) -> Tile:
    """No wider than D."""
    width = power_of_two(d)
    return found._replace(chunk=min(found.chunk, width), slice=min(found.slice, width))


def fold_tile(tile: Tile, square: Square | None, d: int, parts: Partials, gradient: bool) -> Tile:
    """The tile of a pass for statistics: with sums over positives too, half the walked rows, or registers run out."""
    tile = tile if square is None or gradient or d <= plan.WIDE else square.fold  # fault: triton-thin-statistics
    crowded = (
        gradient and parts.softplus != ABSENT and tile.chunk > 128 and tile.warps == 4
    )  # few threads load a wide row
    return tile._replace(y=max(16, tile.y // 2)) if crowded or parts.pos_sum != ABSENT else tile


def mirrored_tile(architecture: str, dtype: torch.dtype, d: int) -> Tile | None:
    """The tile of a pass that takes the statistics of rows and of columns from symmetric scores; None without."""
    found, column = MIRRORED.get((architecture, dtype), ()), column_of(d)
    return fitted(found[column], d)._replace(x=plan.MIRROR) if column < len(found) else None


def square(architecture: str, dtype: torch.dtype, d: int) -> Square | None:
    """The tiles of passes that keep no sums; None without."""
    found = SQUARE.get((architecture, dtype))
    return None if found is None else Square(*(fitted(tile, d) for tile in found))


def weights_tile(tile: Tile, both: bool) -> Tile:
    """The tile of a pass for a gradient: half the scores where each is weighed in both roles and registers are few."""
    crowded = tile.slice == plan.SLICE or tile.x < 64  # the widest sums; float32, whose tiles no tensor core holds
    return tile._replace(y=tile.both or max(16, tile.y // 2)) if both and (crowded or tile.both) else tile


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


def finish_tile(d: int, partners: int, splits: int) -> tuple[Gather, int]:
    """The same where splits are added up, and how many of them at a time: of few rows, so that no load waits long."""
    shape = gather_tile(d, partners)
    if splits == 1:
        return shape, 1
    x = min(shape.x, 4)
    return shape._replace(x=x), 4096 // (x * shape.width)


def architecture_of(device: torch.device) -> str | None:
    """The table's architecture for a device, None where it has none. The interpreter runs on the CPU."""
    if device.type == "cpu":
        return INTERPRETED
    if torch.version.hip is not None:  # an MI200 calls itself 9.0 too, and says gfx90a:sramecc+:xnack-
        found = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return found if found in ARCHITECTURES else None
    major, minor = torch.cuda.get_device_capability(device)
    found = f"sm_{major}{minor}"
    # 8.7 is 8.0 in a smaller chip; 10.3 is 10.0, and 12.1 is 12.0, with another clock.
    found = {"sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}.get(found, found)
    return found if found in ARCHITECTURES else None


# ---- tiles of one's own -----------------------------------------------------------------------------------------

Tiles = dict[tuple[str, torch.dtype, int], Tile]  # by architecture, dtype and column of the table


def own_tiles() -> Tiles:
    """What FUSED_NCE_TILES names; empty without it."""
    path = os.environ.get("FUSED_NCE_TILES", "")
    return read(path) if path else {}


@cache
def read(path: str) -> Tiles:
    """The tiles of a file that `write` wrote.

    Raises:
        ValueError: for an entry that is no tile of the table's.
    """
    found: Tiles = {}
    for row in json.loads(Path(path).read_text(encoding="utf-8"))["tiles"]:
        written = row["architecture"]
        architecture = f"sm_{written}" if isinstance(written, int) else written  # a number before 0.2.0
        key, one = (architecture, getattr(torch, row["dtype"]), row["column"]), Tile(*row["tile"])
        if key[:2] not in TABLE or key[2] not in range(len(WIDTHS) + 1):
            raise ValueError(f"FUSED_NCE_TILES: got {row}, need an architecture, a dtype and a column of the table")
        if not fits(one):
            raise ValueError(f"FUSED_NCE_TILES: got {one}, need powers of two from 16 on, and y up to {plan.STEP}")
        found[key] = one
    return found


def write(tiles: Tiles, path: str) -> None:
    """A file for FUSED_NCE_TILES."""
    rows = [
        {"architecture": architecture, "dtype": str(dtype).removeprefix("torch."), "column": column, "tile": list(one)}
        for (architecture, dtype, column), one in tiles.items()
    ]
    Path(path).write_text(json.dumps({"tiles": rows}, indent=1) + "\n", encoding="utf-8")
    read.cache_clear()


def fits(one: Tile) -> bool:
    """What the kernels and `plan.py` take for granted."""
    sizes = (one.x, one.y, one.chunk, one.slice)
    powers = all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    return powers and plan.STEP % one.y == 0 and one.slice <= plan.SLICE
