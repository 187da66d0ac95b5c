"""How the GPU's backend cuts a call up, and what that costs: `csrc/cuda/plan.h`."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.counted import L2_BYTES
from fused_nce import _extension
from fused_nce.backends import cuda
from fused_nce.core.spec import Block, Spec, TanhClip
from tests.conftest import MODULE, needs_kernels

pytestmark = needs_kernels
MIB = 1 << 20


def plan(n, m, d, n_c=1, element_bytes=2, limit=256 * MIB, **options):
    return MODULE.cuda_plan(n, m, d, n_c, element_bytes, limit, **options)


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_every_plan_keeps_its_promises(element_bytes):
    """Within the limit, covering everything, and with vectors, threads and parts that the kernels can take."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        n, m, d = (int(np.exp(rng.uniform(0, np.log(top)))) for top in (3e5, 3e6, 4096))
        n_c = int(rng.integers(1, 50))
        limit = int(np.exp(rng.uniform(np.log(1e5), np.log(1e9))))
        statistics, gradients = [(True, True), (True, False), (False, True)][int(rng.integers(3))]
        p = plan(n, m, d, n_c, element_bytes, limit, statistics=statistics, gradients=gradients)
        if not p["fits"]:
            assert p["total_bytes"] > limit
            continue
        assert p["total_bytes"] <= limit
        assert 1 <= p["strip_rows"] <= p["block_rows"] <= n
        assert p["panels"] * p["panel_columns"] >= m > (p["panels"] - 1) * p["panel_columns"]
        assert p["panels"] == 1 or p["panel_columns"] % 8 == 0
        assert p["threads"] % 32 == 0
        assert 64 <= p["threads"] <= 768
        assert p["strip_rows"] * p["ctas_per_row"] < 2**31


def test_a_row_is_kept_where_as_many_ctas_run_with_it():
    """Of the 228 KiB of a multiprocessor each of them takes its scores, 1,056 bytes in steps of 128, and 1 KiB."""
    most = {(20.0, 256): 18936, (20.0, 384): 28664, (20.0, 416): 57848, (20.0, 768): 57848}
    most |= {(0.0, 256): 14072, (0.0, 320): 18936, (0.0, 512): 28664, (0.0, 544): 57848}
    for (clip, threads), stride in most.items():
        assert MODULE.cuda_kept_bytes(stride, threads, clip) == 4 * stride
        assert MODULE.cuda_kept_bytes(stride + 8, threads, clip) == 0
        assert MODULE.cuda_kept_bytes(stride, threads, clip, (227 << 10) - 1024) == 0


def test_the_longest_row_that_is_kept():
    """docs/performance.md has the number."""
    strides, clips = range(50_000, 60_000, 8), (20.0, 0.0)
    for clip in clips:
        kept = [m for m in strides if MODULE.cuda_kept_bytes(m, plan(128, m, 64)["threads"], clip)]
        assert kept == [*range(50_000, 57_849, 8)]
    text = (Path(__file__).parent.parent.parent / "docs/performance.md").read_text(encoding="utf-8")
    assert "up to 57,848 of them" in text


def test_published_shapes():
    """What the design says of them."""
    small = plan(128, 128 * 49, 1024, 49)
    assert (small["panels"], small["ctas_per_row"], small["strip_rows"], small["block_rows"]) == (1, 1, 128, 128)
    assert small["total_bytes"] < 5 * MIB
    large = plan(1008, 1008 * 49, 2560, 49)
    assert (large["panels"], large["block_rows"]) == (1, 1008)  # one pair of gradient GEMMs
    assert large["score_bytes"] < 25 * MIB  # strips stay in the L2
    cpc = plan(12544, 12544, 1024)
    assert (cpc["block_rows"], cpc["strip_rows"]) == (6272, 640)  # ten strips a block
    assert 1.5 * cpc["score_bytes"] <= L2_BYTES  # with their weights
    clip = plan(65536, 65536, 768)
    assert clip["panels"] == 1
    assert clip["block_rows"] >= 735  # dk's traffic hides behind its GEMM


@pytest.mark.parametrize(("name", "n", "d"), [("CLIP", 32768, 512), ("CLIP", 32768, 1024), ("CPC", 12544, 1024)])
def test_float_sums_of_16_bit_gradients_are_within_the_limit_too(name, n, d):
    """256 MB in all, of which dk in float until the last block is up to half."""
    p = plan(n, n, d, statistics=name == "CPC")
    assert p["block_rows"] >= 735
    assert p["total_bytes"] + p["sum_bytes"] <= 252e6
    assert plan(n, n, d, element_bytes=4)["sum_bytes"] == 0


def test_a_bank_of_a_million_columns_stays_within_the_limit():
    for n in (1, 256, 65536):
        p = plan(n, 1_280_000, 128)
        assert p["fits"]
        assert p["total_bytes"] <= 256 * MIB
    assert plan(65536, 1_280_000, 128)["panels"] > 1


def test_workspace_does_not_grow_with_the_problem():
    sizes = [plan(n, n, 512)["total_bytes"] for n in (2**14, 2**16, 2**18)]
    assert max(sizes) <= 256 * MIB
    assert min(sizes) >= 64 * MIB


def test_space_is_taken_for_what_is_wanted():
    """A number of dL/dscale a row, and a column's running statistics, where they are asked for."""
    plain = plan(4096, 4096, 64, sums=0)["total_bytes"]
    assert plan(4096, 4096, 64)["total_bytes"] == plain + 4096 * 4
    stats = {"gradients": False, "sums": 0}
    assert (
        plan(4096, 4096, 64, column_stats=True, **stats)["total_bytes"]
        == plan(4096, 4096, 64, **stats)["total_bytes"] + 4096 * 24
    )


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False), ((12, 0), False)],
)
def test_machine_code_runs_within_its_major_version(capability, runs):
    assert cuda._runs_on(capability, "sm_80,sm_90") is runs


def test_ptx_runs_on_what_comes_later_and_a_letter_binds():
    assert cuda._runs_on((12, 0), "sm_80,compute_90")
    assert not cuda._runs_on((8, 6), "compute_90")
    assert cuda._runs_on((9, 0), "sm_90a")
    assert not cuda._runs_on((10, 3), "sm_100a,compute_90a")
    assert cuda._runs_on((10, 3), "sm_100")
    assert not cuda._runs_on((9, 0), "")


def test_a_gpu_that_the_kernels_were_not_built_for_is_told_so(monkeypatch):
    """Not by cudaErrorNoKernelImageForDevice in the middle of a step."""
    built = MODULE.build_info() | {"cuda": True, "cuda_architectures": "sm_80,sm_90"}
    monkeypatch.setattr(_extension, "status", lambda: (types.SimpleNamespace(build_info=lambda: built), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    x: Any = types.SimpleNamespace(device=torch.device("cuda"))
    reason = cuda.why_not(Spec(Block(1)), x, x) or ""
    assert reason.startswith("the kernels were built for sm_80,sm_90, which this GPU, sm_120, cannot run; for it: ")


def test_published_formula_and_refusal():
    spec = Spec(Block(4), TanhClip(20.0))
    assert cuda.workspace_bytes(spec, 64, 256, 32, 2, 256 * MIB) >= 64 * 256 * 6  # scores and weights
    on_cpu = cuda.why_not(spec, torch.ones(4, 8), torch.ones(16, 8)) or ""
    assert on_cpu.startswith("its kernels run on NVIDIA GPUs, not on cpu")
    assert "float64" in (cuda._unable(MODULE, spec, torch.ones(4, 8).double(), torch.ones(16, 8).double()) or "")
