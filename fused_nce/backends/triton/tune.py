"""`python -m fused_nce.backends.triton.tune --width D --out FILE`: the fastest tile on the GPU at hand.

Times a loss with both gradients at each candidate, and adds the winner to FILE, which FUSED_NCE_TILES then names. It
runs when it is asked to, never within a call: what a program computes does not depend on what else the card was doing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from fused_nce.backends.triton import configs, plan
from fused_nce.backends.triton.configs import Tile
from fused_nce.core import workspace
from fused_nce.core.engine import tile_loss
from fused_nce.core.spec import Bias, Block, Index, Spec, TanhClip
from fused_nce.core.tails import Nce

SPEC = Spec(Index(), TanhClip(20.0), Nce().stats)
BIASED = replace(SPEC, transform=Bias())  # whose weights are never stored: that takes tiles of its own
VIEWS = Spec(Block(2, 2), stats=Nce().stats, drop_self=True)  # one tensor in both roles, as NT-Xent has it
Clock = Callable[[Tile], float]  # a step's time; infinite for a tile that does not run


@dataclass(frozen=True)
class Step:
    """What is timed: InfoNCE with a clip and NT-Xent, with their gradients: every form of both kernels.

    Where a clip's weights would be stored, a bias stands in its place.
    """

    rows: int
    columns: int
    width: int
    dtype: torch.dtype

    def on(self, device: str, architecture: str) -> Callable[[], None]:
        """A step on a device."""
        q, k = (torch.randn(n, self.width, device=device, dtype=self.dtype) for n in (self.rows, self.columns))
        q, k = (x.mul_(self.width**-0.25).requires_grad_() for x in (q, k))
        targets = torch.arange(self.rows, device=device) % self.columns
        views = q[: len(q) // 2 * 2].detach().requires_grad_()
        stores = configs.square(architecture, self.dtype, self.width) is not None
        sizes = self.rows, self.columns, self.width, (self.dtype, self.dtype), False, workspace.limit_bytes(device)
        spec = BIASED if stores and plan.ways(SPEC, *sizes).strip else SPEC  # fault: triton-tune-stored

        def step() -> None:
            loss = tile_loss(q, k, spec, Nce(), row_ids=targets, backend="triton").loss
            torch.autograd.grad(loss, (q, k))
            torch.autograd.grad(tile_loss(views, None, VIEWS, Nce(), backend="triton").loss, views)

        return step

    def clock(self, key: tuple[str, torch.dtype, int], path: str) -> Clock:
        """A step's median time in ms on the current GPU, the tile being read from `path`."""
        from triton.runtime.errors import OutOfResources, PTXASError
        from triton.testing import do_bench

        step = self.on("cuda", key[0])

        def time_ms(tile: Tile) -> float:
            configs.write({key: tile}, path)
            try:
                return float(do_bench(step, return_mode="median"))
            except (OutOfResources, PTXASError):  # more shared memory or registers than there are
                return float("inf")

        return time_ms


def candidates(shipped: Tile, width: int) -> list[Tile]:
    """The shipped tile, then those around it."""
    most = configs.power_of_two(width)
    found = [
        shipped._replace(x=x, y=y, chunk=chunk, warps=warps, stages=stages)
        for x, y, chunk, warps, stages in product((64, 128), (32, 64, 128), {64, shipped.chunk}, (4, 8), (2, 3, 4))
        if chunk <= most
    ]
    return [shipped, *(tile for tile in found if tile != shipped and configs.fits(tile))]


def fastest(tiles: Sequence[Tile], time_ms: Clock, least_gain: float = 0.03) -> Tile:
    """The fastest; the first, which ships, where no other is faster by more than `least_gain` of its time."""
    times = {tile: time_ms(tile) for tile in tiles}
    best = min(times, key=times.__getitem__)
    return best if times[best] < times[tiles[0]] * (1 - least_gain) else tiles[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Time, print, write; 0."""
    parser = argparse.ArgumentParser(prog="python -m fused_nce.backends.triton.tune", description=__doc__)
    parser.add_argument("--width", type=int, required=True, help="D")
    parser.add_argument("--dtype", choices=[str(x).removeprefix("torch.") for x in configs.DTYPES], default="bfloat16")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--out", required=True, help="the file; the tiles that it has of other shapes stay")
    options = parser.parse_args(argv)
    architecture = configs.architecture_of(torch.device("cuda")) if torch.cuda.is_available() else None
    if architecture is None:
        print("tune: got no GPU that the table of tiles knows, need one", file=sys.stderr)
        return 1
    dtype = getattr(torch, options.dtype)
    if (architecture, dtype) not in configs.TABLE:
        print(f"tune: got {options.dtype} on {architecture}, which has no tiles for it", file=sys.stderr)
        return 1
    key = (architecture, dtype, configs.column_of(options.width))
    before = configs.read(options.out) if Path(options.out).exists() else {}
    os.environ["FUSED_NCE_TILES"] = trial = f"{options.out}.trial"
    shipped = configs.TABLE[architecture, dtype][key[2]]
    clock = Step(options.rows, options.columns, options.width, dtype).clock(key, trial)
    found = fastest(candidates(shipped, options.width), clock)
    Path(trial).unlink()
    configs.write({**before, key: found}, options.out)
    print(f"{architecture}, {options.dtype}, D {options.width}: {found}")
    print(f"wrote {options.out}: FUSED_NCE_TILES={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
