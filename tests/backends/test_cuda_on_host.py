"""The GPU's driver and the text of its row kernels, run by a CPU emulation of the GPU (`csrc/cuda/host.cpp`).

What is not run here is cuBLAS and the launches: `bench/static_cuda.py` tells what the compiler says of those.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from fused_nce import tile_loss
from fused_nce.backends import cuda
from fused_nce.core.problem import Problem, Statistics
from fused_nce.core.spec import Block, Separate, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.cases import Case, Sweep, can_run, draw, features, run
from tests.conftest import MODULE, needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("play_gpu")]
DTYPES = ["float32", "bfloat16", "float16"]
MIB = 1 << 20
UNMARKED = (None,) * 5  # no ceilings, guides or several positives


def sweep(dtype, seed, count, record_eta):
    """`count` random cases within their budget."""
    rng, tried = np.random.default_rng(seed), Sweep(record_eta, "cuda*", dtype)
    for _ in range(count):
        case = draw(rng, "cuda", dtype)
        if dtype == "float16" and case.plant == "huge_row":  # scores beyond 131072: `test_an_overflow_is_seen`
            case = dataclasses.replace(case, penalty=0.0)
        assert can_run(case) is None
        tried.add(case.line, partial(run, case))
    tried.check()


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
    "one kernel a row": (
        Case("cuda", "", 1, images=70, n_k=80, offset=3, n_c=9, d=24),
        {"panels": 1, "ctas_per_row": 1},
    ),
    "two turns a thread": (
        Case("cuda", "", 6, images=66, n_k=6400, n_c=1, d=4, scale=0.3),
        {"panels": 1, "ctas_per_row": 1, "threads": 416},
    ),
    "parts of a row": (Case("cuda", "", 2, images=3, n_k=2500, offset=7, n_c=3, d=8, scale=0.3), {"ctas_per_row": 3}),
    "strips and blocks": (Case("cuda", "", 3, images=700, n_k=700, n_c=2, d=8, workspace_mb=2.2), {"panels": 1}),
    "panels": (Case("cuda", "", 4, images=150, n_k=700, n_c=3, d=8, scale=0.3, workspace_mb=0.4), {"ctas_per_row": 1}),
    "panels of parts": (Case("cuda", "", 5, images=2, n_k=12000, n_c=1, d=4, workspace_mb=0.085), {"ctas_per_row": 2}),
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


def statistics(n, n_c, seed=0):
    """Arguments of `cuda_summary`: pos (n, n_c) and rows (3, n)."""
    g = torch.Generator().manual_seed(seed)
    pos, lse = torch.randn(n, n_c, generator=g) * 8, torch.randn(n, generator=g) * 4 + 3
    return pos, torch.stack([lse, lse - 1.5, torch.rand(n, generator=g) * 100])


def summarize(pos, rows, n_c, images, penalty=0.0, mean=True, elements=False, reports=1):
    """`cuda_summary` of one problem, at weight 1."""
    lists = [pos], [rows], [n_c], [images], [images * n_c], [1.0], [penalty]
    return torch.ops.fused_nce.cuda_summary(*lists, mean, elements, [reports])


@pytest.mark.parametrize("layout", ["block", "views", "separate"])
def test_summary_without_squares(layout):
    """Of losses that have no penalty, whose positives are other than n_c columns."""
    spec = {
        "block": Spec(Block(3), stats=Nce().stats),
        "views": Spec(Block(2, 2), stats=Nce().stats, drop_self=True),
        "separate": Spec(Separate(2), stats=Nce().stats),
    }[layout]
    pos, rows = statistics(8, spec.n_pos)
    m = 24
    problem = Problem(torch.empty(8, 1), torch.empty(m, 1), 1.0, spec, 0)
    found = cuda.summary([problem], [Nce()], [Statistics(pos, rows[:2])], [2])
    assert found is not None
    wanted = (
        *Nce().values(spec, pos.double(), rows[:2].double(), None, m),
        Nce().reports(spec, pos.double(), rows[:2].double(), None, m, 2),
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("n", "n_c"), [(1, 1), (7, 3), (700, 49), (9000, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("penalty", [0.0, 0.05])
@pytest.mark.parametrize("by_row", [False, True])
def test_summary_is_the_tail(n, n_c, reduction, penalty, by_row):
    """Against `core/tails.py` in float64; several groups of threads from 4096 positives on."""
    reports = next(r for r in (4, 7, 1) if n % r == 0) if by_row else 1
    found = statistics(n, n_c)
    tail, spec, m = Nce(penalty, reduction), Spec(Block(n_c), TanhClip(20.0)), (n + 3) * n_c
    pos, rows = found[0].double(), found[1].double()
    exact = (*tail.values(spec, pos, rows, None, m), tail.reports(spec, pos, rows, None, m, reports))
    out = summarize(found[0], found[1], n_c, m // n_c, penalty, reduction != "sum", reduction == "none", reports)
    for x, y in zip(out, exact, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)


def test_summary_of_rows_without_negatives():
    pos, rows = statistics(3, 2)
    rows[:2] = -float("inf")
    loss, nce, penalty, report = summarize(pos, rows, 2, 1)
    assert (loss, nce, penalty) == (0, 0, 0)
    assert report[0, 2] == -float("inf")
    rows[2] = float("inf")
    assert summarize(pos, rows, 2, 1)[0] == 0  # no penalty: not 0·inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_repeat_and_do_not_depend_on_the_way(dtype):
    """One kernel for a whole row gives what its three parts give, where they take the same columns."""
    q, k = features(Case("cuda", dtype, 3, images=40, n_k=40, n_c=5, d=16))
    arguments = (q, k, 0.2, None, 5, 1, 0, 20.0, None, -1, None, None, None, *UNMARKED)
    first = torch.ops.fused_nce.cuda_loss(*arguments, False, "nce", 0.25, 0.0, True, True, True, 16 * MIB)
    again = torch.ops.fused_nce.cuda_loss(*arguments, False, "nce", 0.25, 0.0, True, True, True, 16 * MIB)
    stats = torch.ops.fused_nce.cuda_stats(*arguments, False, False, 16 * MIB)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first[:2], stats[:2], strict=True))


@pytest.mark.parametrize(
    ("limit", "dq", "dk"),
    [
        (16 * MIB, torch.bfloat16, torch.bfloat16),
        (MIB // 2, torch.bfloat16, torch.float32),
        (MIB // 256, torch.float32, torch.float32),
    ],
)
def test_a_gradient_that_one_gemm_finishes_leaves_in_the_inputs_type(limit, dq, dk):
    """One strip of rows finishes dk, one panel of columns dq: no second buffer, and no pass that casts it."""
    q, k = features(Case("cuda", "bfloat16", 3, images=600, n_k=600, n_c=1, d=4))
    rest = (False, "nce", 0.25, 0.0, True, True, False)
    arguments = (q, k, 0.2, None, 1, 1, 0, 20.0, None, -1, None, None, None, *UNMARKED, *rest)
    found = torch.ops.fused_nce.cuda_loss(*arguments, limit)
    assert (found[2].dtype, found[3].dtype) == (dq, dk)
    wide = torch.ops.fused_nce.cuda_loss(*(q.float(), k.float(), *arguments[2:]), 16 * MIB)
    for x, exact in zip(found[2:4], wide[2:4], strict=True):
        assert (x - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_upstream_gradient_is_met_on_the_device(dtype):
    x = torch.linspace(-3, 3, 10).to(getattr(torch, dtype))
    for factor in (1.0, 0.7):
        out = x.clone()
        torch.ops.fused_nce.cuda_multiply_(out, torch.tensor(factor))
        assert torch.equal(out, (x.float() * torch.tensor(factor)).to(x.dtype))
    with pytest.raises(ValueError, match="factor has shape"):
        torch.ops.fused_nce.cuda_multiply_(x, torch.ones(1))
    with pytest.raises(ValueError, match="x has strides"):
        torch.ops.fused_nce.cuda_multiply_(x[::2], torch.tensor(2.0))


def test_bad_numbers_reach_what_they_touch():
    """A bad query its row and all dk, a bad key every row, with a clip that would hide them and without."""
    for clip in (20.0, 60.0, 0.0):
        rest = (0.2, None, 2, 1, 0, clip, None, -1, None, None, None, *UNMARKED)
        for bad in (float("nan"), float("inf")):
            q, k = features(Case("cuda", "float32", 3, images=6, n_k=6, n_c=2, d=4))
            q[2, 1] = bad
            _, rows, dq, dk, *_ = torch.ops.fused_nce.cuda_loss(
                q, k, *rest, False, "nce", 0.1, 0.0, True, True, False, MIB
            )
            touched = torch.arange(6) == 2
            assert torch.equal(rows[0].isnan(), touched), (clip, bad)
            assert torch.equal(dq.isfinite().all(1), ~touched)
            assert not dk.isfinite().any()
            q, k = features(Case("cuda", "float32", 3, images=6, n_k=6, n_c=2, d=4))
            k[7, 0] = bad
            lse = torch.ops.fused_nce.cuda_stats(q, k, *rest, False, False, MIB)[1][0]
            assert lse.isnan()[torch.arange(6) != 3].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({2: torch.ones(2)}, "scale_tensor has shape"),
        ({2: torch.ones((), dtype=torch.float64)}, "scale_tensor is Double, needed: float32"),
        ({3: 3}, "n_c is 3, needed: a divisor"),
        ({10: torch.ones(8, dtype=torch.int64)}, "row_ids is None, needed: the rows' labels"),
        ({11: torch.ones(())}, "clip is 20, needed: 0 beside a bias"),
        ({6: 0.0, 11: torch.ones(1)}, "bias has shape"),
        ({19: 10}, "workspace_bytes is 10, needed: at least"),
        ({12: torch.ones(4)}, "ceiling has shape"),
        ({13: torch.ones(1, 4)}, "guide_q is None"),
        ({16: torch.ones(4, 2)}, "several is Float"),
        ({16: torch.ones(4, 2, dtype=torch.int64), 18: True}, "statistics of columns are wanted, needed: none beside"),
    ],
)
def test_arguments_are_checked_before_any_work(change, message):
    arguments = [torch.ones(4, 8), torch.ones(8, 8), None, 2, 1, 0, 20.0, None, -1, None, None, None, *UNMARKED]
    arguments += [False, False, MIB]
    for index, value in change.items():
        arguments[index] = value
    q, k, *rest = arguments
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.fused_nce.cuda_stats(q, k, 1.0, *rest)


CONTRACT = tuple(f"tests/core/test_{name}.py" for name in ("contract", "golden", "nonfinite", "determinism", "ops"))


def test_what_every_backend_is_held_to():
    """Golden values, non-finite inputs, layouts, autocast, `torch.compile`; and every loss of the package."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.backends.play_gpu", "-p", "no:cacheprovider"]
    select = ["-k", "cuda and not opcheck and not float64"]  # opcheck wants float64
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, *select, "-rs", *CONTRACT, "tests/losses/test_registry.py", "tests/losses/test_amdim.py"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    left_out = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert not [line for line in left_out if any(file in line for file in CONTRACT)]
    reasons = ("it has no ", "it gathers no columns", "plain torch, the same")
    assert all(any(reason in line for reason in reasons) for line in left_out), left_out
