"""The GPU's driver and the text of its row kernels, run by the CPU that plays a GPU (`csrc/cuda/host.cpp`).

What is not run here is cuBLAS and the launches: `bench/static_cuda.py` tells what the compiler says of those.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from fused_nce import _extension, tile_loss
from fused_nce.backends import cuda
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.cases import Case, can_run, draw, features, run

MODULE: Any
MODULE, REASON = _extension.status()
pytestmark = pytest.mark.skipif(MODULE is None, reason=REASON or "kernels built")
DTYPES = ["float32", "bfloat16", "float16"]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _play_a_gpu(monkeypatch):
    """CPU tensors count as a GPU's."""
    monkeypatch.setattr(cuda, "why_not", lambda spec, q, k: cuda._unable(MODULE, spec, q, k))


def sweep(dtype, seed, count, record_eta):
    """`count` random cases within their budget."""
    rng = np.random.default_rng(seed)
    failures = []
    for _ in range(count):
        case = draw(rng, "cuda", dtype)
        if dtype == "float16" and case.plant == "huge_row":  # scores beyond 131072: `test_an_overflow_is_seen`
            case = dataclasses.replace(case, penalty=0.0)
        assert can_run(case) is None
        etas = run(case)
        record_eta("cuda*", dtype, etas)
        name, worst = max(etas.items(), key=lambda item: item[1])
        if not worst <= 1:
            failures.append(f"{name}: error is {worst:.3g} of its budget\n    {case.line}")
    assert not failures, f"{len(failures)} of {count} cases failed:\n" + "\n".join(failures[:5])


@pytest.mark.parametrize("block", range(3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_cases(dtype, block, record_eta):
    sweep(dtype, (20261124, block), 100, record_eta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_cases(dtype, fresh_seed, record_eta):
    sweep(dtype, fresh_seed, 100, record_eta)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(30))
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_cases(dtype, block, fresh_seed, record_eta):
    sweep(dtype, (fresh_seed, block), 100, record_eta)


# Shapes for each way through the driver; what the plan says of them is asserted, so that none goes unused.
ROUTES = {
    "one kernel a row": (Case("cuda", "", 1, images=70, n_k=80, offset=3, n_c=9, d=24), {"panels": 1, "parts": 1}),
    "parts of a row": (Case("cuda", "", 2, images=3, n_k=2500, offset=7, n_c=3, d=8, scale=0.3), {"parts": 3}),
    "strips and blocks": (Case("cuda", "", 3, images=700, n_k=700, n_c=2, d=8, workspace_mb=1.9), {"panels": 1}),
    "panels": (Case("cuda", "", 4, images=150, n_k=700, n_c=3, d=8, scale=0.3, workspace_mb=0.4), {"parts": 1}),
    "panels of parts": (Case("cuda", "", 5, images=2, n_k=12000, n_c=1, d=4, workspace_mb=0.085), {"parts": 2}),
}


@pytest.mark.parametrize("clip", [20.0, 60.0, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route(route, dtype, clip, record_eta):
    case, wanted = ROUTES[route]
    for entry in ("loss", "stats"):
        one = dataclasses.replace(case, dtype=dtype, clip=clip, entry=entry, penalty=0.04)
        etas = run(one)
        record_eta("cuda*", dtype, etas)
        assert max(etas.values()) <= 1, one.line
    plan = MODULE.cuda_plan(
        case.images * case.rows_per_image,
        case.n_k * case.n_c,
        case.d,
        case.n_c,
        4 if dtype == "float32" else 2,
        int((case.workspace_mb or 16) * MIB),
    )
    assert plan["fits"]
    assert {name: plan[name] for name in wanted} == wanted
    assert ("panels" in route) == (plan["panels"] > 1)
    if route == "strips and blocks":
        assert plan["block_rows"] < case.images


def test_an_overflow_is_seen():
    """float16 weights of scores beyond 131072 are infinite, and so is what they reach; nothing wraps or saturates."""
    q, k = (x.requires_grad_() for x in features(Case("cuda", "float16", 0, images=4, n_k=4, n_c=1, d=2)))
    with torch.no_grad():
        q[1], k[2] = 1000, 1000
    loss = tile_loss(q, k, Spec(Block(1), TanhClip(20.0)), Nce(3.0), scale=1.0, backend="cuda").loss
    dq, dk = torch.autograd.grad(loss, (q, k))
    assert loss.isfinite()
    assert not dq[1].isfinite().any()
    assert not dk[2].isfinite().any()
