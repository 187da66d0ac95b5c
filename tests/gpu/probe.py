"""`python -m tests.gpu.probe`: small odd problems on one device, for compute-sanitizer to watch.

Prints each one's largest error in units of its budget; the exit status is the number of those that fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from fused_nce.core import dispatch
from tests.cases import DTYPES, Case, can_run, run
from tests.losses.test_registry import OPEN, etas_of

# Below, at and beyond tiles and vectors; an offset; rows apart in memory; a workspace that splits both ways.
SHAPES: tuple[dict[str, Any], ...] = (
    {"images": 1, "n_k": 1, "n_c": 1, "d": 1},
    {"images": 3, "n_k": 4, "n_c": 7, "d": 33, "offset": 1},
    {"images": 17, "n_k": 17, "n_c": 3, "d": 65, "layouts": ("sliced", "stepped_rows")},
    {"images": 5, "n_k": 9, "n_c": 31, "d": 129, "rows_per_image": 3, "offset": 4, "entry": "stats"},
    {"images": 129, "n_k": 129, "n_c": 2, "d": 15, "clip": None, "tensor_scale": True},
    {"images": 40, "n_k": 40, "n_c": 5, "d": 64, "workspace_mb": 0.2, "entry": "parts"},
)
NAMES = ("float32", "bfloat16", "float16")


def cases(device: str, backend: str) -> list[Case]:
    """Every shape in every dtype."""
    first = Case(backend, "float32", 0, scale=0.3, device=device)
    return [
        dataclasses.replace(first, dtype=dtype, seed=i, **shape) for dtype in NAMES for i, shape in enumerate(SHAPES)
    ]


Probe = tuple[str, str, Callable[[], dict[str, float]]]  # what, how to repeat it, and η of each result


def probes(device: str, backend: str) -> Iterator[Probe]:
    """The cases, and every other loss of the package once, each in the next dtype."""
    for case in cases(device, backend):
        reason = can_run(case)
        if reason is None:
            yield f"{case.dtype:9}", case.line, partial(run, case)
        else:
            print(f"not run: {reason}\n    {case.line}")
    for name, dtype in zip(OPEN, itertools.cycle(NAMES)):
        yield (
            f"{dtype:9} {name}",
            f"tests/gpu/test_losses.py -k {name}",
            partial(etas_of, name, device, backend, DTYPES[dtype]),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; how many failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.probe", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", required=True, choices=dispatch.BACKENDS)
    options = parser.parse_args(argv)
    failed = ran = 0
    for what, how, probe in probes(options.device, options.backend):
        try:
            worst = max(probe().values())
        except ValueError as refusal:
            if "which cannot run this: " not in str(refusal):
                raise
            print(f"not run: {what}: {refusal}")
            continue
        ran += 1
        failed += not worst <= 1
        print(f"{what:32} eta = {worst:.3g}{'' if worst <= 1 else '   FAILED'}", flush=True)
        if not worst <= 1:
            print(f"    {how}")
    print(f"{options.backend} on {options.device}: {ran} problems, {failed} failed")
    return failed if ran else 1


if __name__ == "__main__":
    sys.exit(main())
