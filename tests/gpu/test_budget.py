"""Random problems on every device, backend and dtype: each value and gradient within its error budget."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest
import torch

from tests.cases import DTYPES, Sweep, can_run, draw, run
from tests.gpu.conftest import repeats, require

FIXED = 20261124
# A Triton kernel takes 1.5 s to compile and a case may need four new ones: the fuzz takes what it can in this time, and
# never fewer than LEAST of a backend that compiles, three times as many of one that does not.
SECONDS, LEAST = 10.0, 4


def least(place):
    """Cases that a sweep must have run."""
    return LEAST if place.backend == "triton" and place.device == "cuda" else 3 * LEAST


def sweep(place, dtype, seed, count, record_eta):
    """Up to `count` cases within `SECONDS`; every failure is named by the command that repeats it."""
    require(place, DTYPES[dtype])
    rng, tried, refused = np.random.default_rng(seed), Sweep(record_eta, " ".join(reversed(place)), dtype), set()
    begin = time.monotonic()
    for _ in range(4 * count):
        if tried.ran == count or (tried.ran >= least(place) and time.monotonic() - begin > SECONDS):
            break
        case = draw(rng, place.backend, dtype, place.device)
        if (reason := can_run(case)) is not None:
            refused.add(reason)
            continue
        tried.add(case.line, partial(run, case))
    tried.check()
    assert tried.ran >= least(place), f"it ran {tried.ran} cases and refused the rest: {refused}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_cases(place, dtype, record_eta):
    sweep(place, dtype, FIXED, repeats(place, on_cpu=3 * LEAST, on_gpu=40), record_eta)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_cases(place, dtype, fresh_seed, record_eta):
    sweep(place, dtype, fresh_seed, repeats(place, on_cpu=3 * LEAST, on_gpu=300), record_eta)


def test_float32_is_not_tf32(place):
    """TF32 keeps 10 bits: at these sizes its dot products are off by a hundred budgets."""
    assert not torch.backends.cuda.matmul.allow_tf32
    rng = np.random.default_rng(1)
    case = draw(rng, place.backend, "float32", place.device)
    while case.d < 64 or case.plant != "random" or abs(case.scale) * case.d**0.5 > 3:
        case = draw(rng, place.backend, "float32", place.device)
    assert max(run(case).values()) <= 1
