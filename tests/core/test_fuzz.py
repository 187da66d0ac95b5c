"""Random problems on every backend and dtype, each value and gradient within its error budget."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases import DTYPES, can_run, draw, run
from tests.marks import nightly_but

FIXED = 20261122
BLOCK = 100


def sweep(backend, dtype, seed, count, record_eta):
    """Run `count` cases; on failure, name the first few, worst result each."""
    rng, failures = np.random.default_rng(seed), []
    ran = 0
    for _ in range(count):
        case = draw(rng, backend, dtype)
        reason = can_run(case)
        if reason is not None:
            pytest.skip(f"{backend} {dtype}: {reason}")
        ran += 1
        try:
            etas = run(case)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\n    {case.line}")
            continue
        record_eta(backend, dtype, etas)
        name, worst = max(etas.items(), key=lambda item: item[1])
        if not worst <= 1:
            failures.append(f"{name}: error is {worst:.3g} of its budget\n    {case.line}")
    assert ran == count
    assert not failures, f"{len(failures)} of {count} cases failed:\n" + "\n".join(failures[:5])


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
