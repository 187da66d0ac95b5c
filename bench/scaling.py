"""AMDIM-large on 8, 64 and 512 H200s: a MODEL of bytes on the wire, memory and time a step. Nothing here is measured.

`python -m bench.scaling` prints the tables of `docs/scaling.md`; with `--record bench/results/gpu-….json` the loss's
time is a measured one, scaled. `--check` compares the part that a CPU can run, the loss among 1 to 4 processes over
gloo, with what this file would say of it (`bench/scaling_check.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.counted import counted, parts
from bench.gpu.problems import GLOBAL
from bench.roofline import ENCODER_RATE, FUSED_WORKSPACE_BYTES, GEMM_FLOP_PER_S, OPTIMIZER_BYTES
from bench.text import markdown, number
from fused_nce.models import AMDIM

NDF, WIDTH, DEPTH = 320, 2560, 10  # AMDIM-large at 128 px
LOCATIONS, PAIRS = 25 + 49 + 1, (25, 49, 25)  # of f5, f7 and f1; columns an image of each pair
SCORES = 2 * sum(PAIRS)  # of an image and an image, both directions
SENT = 25 + 49  # locations that are anyone's negatives; a map goes out once, whatever pairs it is in
NODE = 8
NODE_BYTES_PER_S, NET_BYTES_PER_S = 450e9, 50e9  # NVLink within a node; 400 Gb/s a GPU between nodes; one way
MEMORY_BYTES = 0.92 * 141e9  # what a process may fill
PART = 32  # images in an encoder's pass under the gradient cache
WORLDS, BATCHES = (8, 64, 512), (32, 126)
WAYS = ("gather", "ring")


class Encoder(NamedTuple):
    """Of one view of one image."""

    flop: float  # a forward pass
    activations_bytes: float  # in bf16: half of what the float32 graph saves
    parameters: int


@cache
def encoder() -> Encoder:
    """Counted on the meta device."""
    saved: dict[int, int] = {}  # bytes of a storage, which several operations may save

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.device("meta"):
        model = AMDIM(image_size=128, ndf=NDF, n_rkhs=WIDTH, n_depth=DEPTH)
        images = torch.empty(8, 3, 128, 128)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), FlopCounterMode(display=False) as counter:
            taps = model.encode(images)  # alive, so that no storage has another's address
    for p in model.parameters():
        saved.pop(p.untyped_storage()._cdata, None)
    del taps
    return Encoder(
        counter.get_total_flops() / 8, sum(saved.values()) / 2 / 8, sum(map(torch.numel, model.parameters()))
    )


def score_s(record: dict[str, Any] | None) -> float:
    """Seconds a score of width `WIDTH`, forward and backward: by what is counted of a call, or a record's."""
    if record is not None:
        found = next((row for row in record["cases"] if row["label"] == GLOBAL.label), None)
        if found is None:
            raise ValueError(f"record: has no case {GLOBAL.label!r}, need one")
        ms = found["rivals"]["ours"][f"{record['clock']}_ms_median"]
        return float(ms) * 1e-3 / GLOBAL.scores
    found = parts(counted(GLOBAL, "cuda"))
    return (sum(found) - found.launches) * 1e-3 / GLOBAL.scores


class Step(NamedTuple):
    """One process's step."""

    encoder_s: float
    loss_s: float
    wire_bytes: float  # received
    wire_s: float
    activations_bytes: float
    maps_bytes: float  # embeddings and their gradients
    loss_bytes: float  # other processes' keys, their gradients, the workspace

    @property
    def seconds(self) -> float:
        """Gathering waits; the ring's blocks travel while others are compared. See `wire_s` for what is hidden."""
        return self.encoder_s + self.loss_s + self.wire_s

    @property
    def memory_bytes(self) -> float:
        """With weights, their gradients and the optimizer's moments."""
        return self.activations_bytes + self.maps_bytes + self.loss_bytes + OPTIMIZER_BYTES * encoder().parameters


def step(world: int, batch: int, way: str, *, cached: bool, a_score_s: float) -> Step:
    """Of `batch` images on each of `world` processes.

    Args:
        world: processes.
        batch: images of a process in one loss.
        way: "gather" or "ring".
        cached: the gradient cache, `PART` images at a time, which encodes twice.
        a_score_s: see `score_s`.
    """
    e, others = encoder(), world - 1
    rate = NODE_BYTES_PER_S if world <= NODE else NET_BYTES_PER_S
    launches_s = 2 * len(PAIRS) * parts(counted(GLOBAL, "cuda")).launches * 1e-3
    loss_s = SCORES * batch * batch * world * a_score_s + launches_s
    block = 2 * batch * WIDTH  # bf16 bytes of a location of all a process's images
    if way == "gather":  # keys come once, their gradients are reduced once
        wire = 2 * others * block * 2 * SENT
        wire_s = wire / rate
        loss_bytes = 2 * world * block * 2 * SENT
    else:  # each pair's keys go round twice, the second time with a float32 accumulator
        loss_s *= 4 / 3  # two rounds: scores once more
        wire = others * block * SCORES * (1 + 1 + 2)
        wire_s = max(0.0, wire / rate - loss_s * others / world)  # what the compute does not hide
        loss_bytes = block * max(PAIRS) * (2 + 3 * 2)  # two blocks, two accumulators and a sum
    return Step(
        encoder_s=(4 if cached else 3) * 2 * batch * e.flop / (ENCODER_RATE * GEMM_FLOP_PER_S),
        loss_s=loss_s,
        wire_bytes=wire,
        wire_s=wire_s,
        activations_bytes=2 * (min(batch, PART) if cached else batch) * e.activations_bytes,
        maps_bytes=2 * 2 * block * LOCATIONS,
        loss_bytes=loss_bytes + FUSED_WORKSPACE_BYTES,
    )


def largest(world: int, way: str, *, cached: bool) -> int:
    """Images a process at which a step still fits; 0 if none do."""
    low, high = 0, 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        fits = step(world, middle, way, cached=cached, a_score_s=0.0).memory_bytes <= MEMORY_BYTES
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def tables(record: dict[str, Any] | None = None) -> str:
    """The Markdown of `docs/scaling.md`, with its label."""
    a_score_s, e = score_s(record), encoder()
    rows = []
    for world in WORLDS:
        for batch in BATCHES:
            for way in WAYS:
                s = step(world, batch, way, cached=batch > PART, a_score_s=a_score_s)
                parts = (s.activations_bytes, s.maps_bytes, s.loss_bytes, s.memory_bytes, s.wire_bytes)
                times = (s.encoder_s, s.loss_s, s.wire_s, s.seconds)
                cells = [number(x / 1e9) for x in parts] + [number(1e3 * x) for x in times]
                rows.append([str(world), str(batch), way, *cells])
    sizes = ["activations, GB", "cached maps, GB", "loss, GB", "all memory, GB", "received, GB"]
    spans = ["encoder, ms", "loss, ms", "wire that shows, ms", "step, ms"]
    first = markdown(["H200s (modelled)", "images each", "way", *sizes, *spans], rows)
    fits = [
        [str(w), way, *(f"{largest(w, way, cached=cached):,}" for cached in (False, True))]
        for w in WORLDS
        for way in WAYS
    ]
    second = markdown(["H200s (modelled)", "way", "largest batch each", "with the gradient cache"], fits)
    loss = "modelled" if record is None else "scaled from a measured record"
    label = (
        f"**Modelled, not measured** (loss: {loss}). Encoder: {e.flop / 1e9:.0f} GFLOP and "
        f"{e.activations_bytes / 1e6:.0f} MB of bf16 activations a view, {e.parameters / 1e6:.0f} M parameters, "
        f"counted on the meta device; {ENCODER_RATE:.0%} of {GEMM_FLOP_PER_S / 1e12:.0f} TFLOP/s. A score: "
        f"{1e12 * a_score_s:.1f} ps. Wire: {NODE_BYTES_PER_S / 1e9:.0f} GB/s within a node of {NODE}, "
        f"{NET_BYTES_PER_S / 1e9:.0f} GB/s beyond. Memory that fits: {MEMORY_BYTES / 1e9:.0f} GB. Batches above {PART} "
        f"are cached in parts of {PART}; DDP's own all-reduce, which the backward hides, is left out."
    )
    return f"{first}\n\n{second}\n\n{label}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, or check the model on this machine."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--record", type=Path, help="bench/results/gpu-….json: the loss's measured time")
    parser.add_argument("--check", action="store_true", help="run 1 to 4 processes on the CPU; needs a quiet machine")
    parser.add_argument("--out", type=Path, default=Path("bench/results/scaling-cpu.json"), help="of --check")
    options = parser.parse_args(argv)
    if options.check:
        from bench import scaling_check

        print(scaling_check.write(options.out))
        return
    print(tables(json.loads(options.record.read_text(encoding="utf-8")) if options.record else None))


if __name__ == "__main__":
    main()
