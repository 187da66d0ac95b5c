"""Random problems on every backend and dtype, each value and gradient within its error budget."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tests.cases import DTYPES, Sweep, can_run, draw, run
from tests.marks import nightly_but

FIXED = 20261122
BLOCK = 100


def sweep(backend, dtype, seed, count, record_eta):
    """Run `count` cases."""
    rng, tried = np.random.default_rng(seed), Sweep(record_eta, backend, dtype)
    for _ in range(count):
        case = draw(rng, backend, dtype)
        reason = can_run(case)
        if reason is not None:
            pytest.skip(f"{backend} {dtype}: {reason}")
        tried.add(case.line, partial(run, case))
    tried.check()


@pytest.mark.parametrize("block", nightly_but([0], range(3)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_cases(backend, dtype, block, record_eta):
    sweep(backend, dtype, (FIXED, block), BLOCK, record_eta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_cases(backend, dtype, fresh_seed, record_eta):
    sweep(backend, dtype, fresh_seed, BLOCK // 4, record_eta)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(30))
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_cases(backend, dtype, block, fresh_seed, record_eta):
    sweep(backend, dtype, (fresh_seed, block), BLOCK, record_eta)
