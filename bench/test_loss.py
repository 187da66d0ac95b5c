"""pytest-benchmark cases: `pytest bench`. The table's runner interleaves the rivals; here each is timed by itself."""

from __future__ import annotations

import gc

import pytest
import torch

from bench import rivals
from bench.cases import BFLOAT16, TABLE, Case
from bench.rivals import bound
from fused_nce.measure import cores, torch_threads

CASES = [*TABLE, *(Case(case.n_a, case.n_c, case.d, BFLOAT16) for case in TABLE)]
ROUNDS, WARMUPS = 20, 2


@pytest.fixture(autouse=True)
def _all_cores():
    with torch_threads(cores()):
        yield
    gc.collect()


@pytest.mark.parametrize("rival", rivals.RIVALS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.n_a}x{case.n_c}x{case.d}-{case.dtype}")
def test_loss_and_gradients(benchmark, case, rival):
    step = rivals.prepare(rival, case)
    benchmark.group = f"{case.name} {case.dtype}"
    benchmark.extra_info.update(flop=case.flop, inputs_bytes=case.inputs_bytes)
    rivals.check_agreement(case, {rival: step})
    value, *_ = benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=WARMUPS, iterations=1)
    assert torch.isfinite(value)


@pytest.mark.parametrize("library", bound.LIBRARIES)
@pytest.mark.parametrize("gemm", bound.GEMMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.n_a}x{case.n_c}x{case.d}-{case.dtype}")
def test_gemm_of_the_bound(benchmark, case, gemm, library):
    calls = bound.gemms(*case.inputs())
    if (gemm, library) not in calls:
        pytest.skip(f"{library} has no {case.dtype} product here")
    benchmark.group = f"{case.name} {case.dtype} {gemm}"
    benchmark.extra_info["flop"] = case.flop // 3
    benchmark.pedantic(calls[gemm, library], rounds=ROUNDS, warmup_rounds=WARMUPS, iterations=1)
