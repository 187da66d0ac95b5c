"""Random sizes, strides and workspaces of every registered loss on every backend and dtype, within its budget."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fused_nce.core.dispatch import BACKENDS
from tests.cases import DTYPES
from tests.conftest import why_not
from tests.losses.fuzz import Judge, draw
from tests.marks import nightly_but

FIXED = 20261126
BLOCK = 100


def sweep(dtype, seed, count, record_eta):
    """Run `count` cases on each backend that takes them; on failure, name the first few, worst result each."""
    rng, failures, unfair = np.random.default_rng(seed), [], 0
    backends = [name for name in BACKENDS if why_not(name, DTYPES[dtype]) is None]
    ran = dict.fromkeys(backends, 0)
    while ran["reference"] < count:
        case = draw(rng, dtype)
        judge = Judge(case)
        if not judge.fair:
            unfair += 1
            continue
        for backend in backends:
            line = dataclasses.replace(case, backend=backend).line
            try:
                etas = judge.run(backend)
            except Exception as error:
                failures.append(f"{type(error).__name__}: {error}\n    {line}")
                ran[backend] += 1
                continue
            if etas is None:
                continue
            ran[backend] += 1
            record_eta(backend, dtype, {"loss": etas["loss"]})
            name, worst = max(etas.items(), key=lambda item: item[1])
            if not worst <= 1:
                failures.append(f"{name}: error is {worst:.3g} of its budget\n    {line}")
    assert not failures, f"{len(failures)} of {sum(ran.values())} failed:\n" + "\n".join(failures[:5])
    assert min(ran.values()) > count / 2, ran
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
