"""Random sizes, strides and workspaces of every registered loss on every backend and dtype, within its budget."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest

from fused_nce.core.dispatch import BACKENDS
from tests.cases import DTYPES, Sweep
from tests.conftest import why_not
from tests.losses.fuzz import Judge, draw
from tests.marks import nightly_but

FIXED = 20261126
BLOCK = 100


def sweep(dtype, seed, count, record_eta):
    """Run `count` cases on each backend that takes them."""
    rng, unfair = np.random.default_rng(seed), 0
    tried = {x: Sweep(record_eta, x, dtype) for x in BACKENDS if why_not(x, DTYPES[dtype]) is None}
    while tried["reference"].ran < count:
        judge = Judge(draw(rng, dtype))
        if not judge.fair:
            unfair += 1
            continue
        for backend, cases in tried.items():
            cases.add(dataclasses.replace(judge.case, backend=backend).line, partial(judge.run, backend))
    for backend, cases in tried.items():
        cases.check()
        assert cases.ran > count / 2, backend
    assert unfair < count / 10


@pytest.mark.parametrize("block", nightly_but([0], range(2)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_cases(dtype, block, record_eta):
    sweep(dtype, (FIXED, block), BLOCK, record_eta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_cases(dtype, fresh_seed, record_eta):
    sweep(dtype, fresh_seed, BLOCK // 4, record_eta)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(30))
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_cases(dtype, block, fresh_seed, record_eta):
    sweep(dtype, (fresh_seed, block), BLOCK, record_eta)
