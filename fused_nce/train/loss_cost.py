"""Time and peak memory of a run's loss beside the naive one, on the run's own shapes.

`measure` starts a fresh process (`python -m fused_nce.train.loss_cost`), so that the high-water mark of the
memory is the loss's own and not the training's. The parent reads one JSON object from its output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_nce.measure import CLIP, PENALTY, naive_loss, peak_bytes

Loss = Callable[[Tensor, Tensor], Tensor]
Term = tuple[int, int]  # n_r, n_c


def fused_loss(antecedents: Tensor, consequents: Tensor) -> Tensor:
    """The same value by `fused_nce.amdim_nce`, which never holds the scores."""
    from fused_nce import amdim_nce

    value: Tensor = amdim_nce(antecedents, consequents, clip=CLIP, penalty=PENALTY).loss
    return value


def step(loss: Loss, pairs: list[tuple[Tensor, Tensor]]) -> float:
    """One training step's worth of the loss: every pair, forward and both gradients."""
    total = 0.0
    for antecedents, consequents in pairs:
        antecedents.grad = consequents.grad = None
        value = loss(antecedents, consequents)
        value.backward()
        total += float(value.detach())
    return total


def compare(batch: int, terms: list[Term], width: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Times both losses in turn on random features and takes their peak memory; the values must agree.

    Raises:
        RuntimeError: the two losses differ by more than 1 % (bf16 scores differ by that much at most).
    """
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for counts in terms:
        a, c = (torch.randn(batch, n, width, generator=generator).to(dtype).requires_grad_() for n in counts)
        pairs.append((a, c))
    losses: dict[str, Loss] = {"fused": fused_loss, "naive": naive_loss}
    values = {name: step(loss, pairs) for name, loss in losses.items()}  # also the warm-up
    if abs(values["fused"] - values["naive"]) > 0.01 * abs(values["naive"]):
        raise RuntimeError(f"the losses disagree: fused {values['fused']:.6g}, naive {values['naive']:.6g}")
    peaks: dict[str, int | None] = {}
    for name, loss in losses.items():
        try:
            peaks[name] = peak_bytes(partial(step, loss, pairs))
        except (OSError, AttributeError):
            peaks[name] = None  # printed as "not measurable here"
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            start = time.perf_counter()
            step(loss, pairs)
            times[name].append(1e3 * (time.perf_counter() - start))
    result: dict[str, Any] = {
        "batch": batch, "terms": terms, "width": width, "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "repeats": repeats,
    }  # fmt: skip
    for name in losses:
        quarters = statistics.quantiles(times[name], n=4) if repeats > 1 else [times[name][0]] * 3
        result[name] = {
            "time_ms": round(quarters[1], 3),
            "quartiles_ms": [round(quarters[0], 3), round(quarters[2], 3)],
            "peak_bytes": peaks[name],
            "loss": values[name],
        }
    return result


def measure(batch: int, terms: list[Term], width: int, dtype: torch.dtype, repeats: int = 20) -> dict[str, Any]:
    """`compare` in a process of its own, with this process's thread count.

    Args:
        batch: images of a step.
        terms: (n_r, n_c) of each loss term of a step: rows and columns that an image supplies to it.
        width: D, the features' width.
        dtype: of the features that reach the loss.
        repeats: timed steps of each loss.

    Raises:
        RuntimeError: the measuring process failed; the message ends with its last line.
    """
    names = {"--batch": batch, "--width": width, "--dtype": str(dtype).removeprefix("torch."), "--repeats": repeats}
    options = [str(part) for pair in names.items() for part in pair]
    sizes = [f"{rows}x{columns}" for rows, columns in terms]
    command = [sys.executable, "-m", "fused_nce.train.loss_cost", *options, "--terms", *sizes]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"measuring the loss failed (exit {done.returncode}): {last}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--terms", nargs="+", required=True, help="n_r x n_c of each, such as 1x25")
    given = parser.parse_args()
    terms = [(int(rows), int(columns)) for rows, columns in (term.split("x") for term in given.terms)]
    print(json.dumps(compare(given.batch, terms, given.width, getattr(torch, given.dtype), given.repeats)))


if __name__ == "__main__":
    main()
