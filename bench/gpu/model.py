"""What each shape should take on one H200, written down before it was measured: a MODEL, against which a run is read.

`python -m bench.gpu.model` prints the tables. Rates and launches are those of `core/cost.py`, by which a backend is
chosen; the GEMMs are counted for each loss, and a row kernel's time for a score is what its machine code issues for one
(`bench.static_cuda`). Memory is no model but the plan that the kernels follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from bench import static_cuda
from bench.gpu.problems import TABLE, Problem
from bench.roofline import GEMM_FLOP_PER_S
from bench.text import markdown, number
from fused_nce.core import cost
from fused_nce.core.atoms import SHIFTLESS_CLIP
from fused_nce.core.dispatch import backend_module
from fused_nce.core.spec import Spec
from fused_nce.core.workspace import GPU_DEFAULT_MB

CUBLAS_RATE = 0.92  # of the sustained GEMM rate, at these shapes
ISSUE_PER_S = 132 * 128 * 1.755e9  # thread instructions of an H200 at its boost clock: four warps a clock and SM
ISSUE_RATE = 0.8  # of it, that a row kernel reaches
CUDA_US, TRITON_US = (cost.table()[name, 2].launch_us for name in ("cuda", "triton"))  # of launches a call


class Parts(NamedTuple):
    """Where the time of `cuda` goes, in ms."""

    gemms: float
    rows: float
    launches: float


def bound_ms(problem: Problem) -> float:
    """The least GEMMs at the sustained rate."""
    return problem.flop / GEMM_FLOP_PER_S * 1e3


def row_ps(spec: Spec, together: bool) -> float:
    """A score's share of the row kernels: one kernel that has the statistics and the weights, or one for each.

    Args:
        spec: what is done to a score.
        together: all scores of a row are there at once, and it has no statistics of columns.
    """
    words = ["clip"] * (spec.clip is not None) + ["shift"] * (spec.clip is None or spec.clip > SHIFTLESS_CLIP)
    transform = " ".join(words)
    columns = bool(spec.columns)
    kernels = [f"fold {transform}", f"weigh {transform}{' columns' if columns else ''} bfloat16"]
    if columns:
        kernels.append(f"fold_columns {transform}")
    if together and not columns:
        kernels = [f"loss {transform} bfloat16"]
    issued = sum(static_cuda.committed()["sm_90"][kernel] for kernel in kernels)
    return issued / (ISSUE_RATE * ISSUE_PER_S) * 1e12


def cuda_parts(problem: Problem) -> Parts:
    """The GEMMs by cuBLAS, the row kernels, and a call's launches."""
    gemms = len(problem.gemms) + (problem.loss == "nt_xent")  # q and k in one: W·z and Wᵀ·z, one after the other
    cut = problem.workspace_mb is not None  # in columns too: statistics first, then the scores again
    gemms += cut
    gemm_ps = gemms * 2 * problem.d / (CUBLAS_RATE * GEMM_FLOP_PER_S) * 1e12
    scores = problem.steps * problem.scores * 1e-9
    return Parts(scores * gemm_ps, scores * row_ps(problem.spec, not cut), problem.steps * CUDA_US * 1e-3)


def cuda_ms(problem: Problem) -> float:
    """All of them."""
    return sum(cuda_parts(problem))


def triton_ms(problem: Problem) -> float:
    """What the choice of a backend goes by."""
    gemms = problem.call.gemms("triton")
    return problem.steps * cost.table()["triton", 2].time_us(gemms, problem.n, problem.m, problem.d) * 1e-3


def choice(problem: Problem) -> str:
    """The backend that a call takes."""
    return cost.fastest_first(problem.call, problem.n, problem.m, problem.d, torch.bfloat16)[0]


def extra_mb(problem: Problem) -> float:
    """What the chosen backend allocates, in 10^6 bytes: its plan within the workspace's limit.

    Raises:
        RuntimeError: for `cuda` where the kernels, which have its plan, are not built.
    """
    limit = (problem.workspace_mb or GPU_DEFAULT_MB) << 20
    sizes = problem.n, problem.m, problem.d, torch.bfloat16.itemsize
    return backend_module(choice(problem)).workspace_bytes(problem.spec, *sizes, limit) / 1e6


def table(problems: Iterable[Problem] = TABLE) -> str:
    """The Markdown table of times, with its label."""
    rows = []
    for problem in problems:
        asked = "" if problem.target is None else number(problem.target.device_ms)
        parts = (number(x) for x in cuda_parts(problem))
        times = number(bound_ms(problem)), number(cuda_ms(problem)), *parts, number(triton_ms(problem))
        rows.append([problem.label, *times, choice(problem), asked])
    header = ["shape (modelled), times in ms", "least GEMMs", "`cuda`", "its GEMMs", "its rows", "its launches"]
    return markdown([*header, "`triton`", "chosen", "target"], rows) + (
        f"\n\n**Modelled, not measured**: {GEMM_FLOP_PER_S / 1e12:.0f} TFLOP/s of bf16 GEMM, {CUBLAS_RATE:.0%} of it "
        f"by cuBLAS; the row kernels' instructions a score at {ISSUE_RATE:.0%} of the issue rate; "
        f"{CUDA_US:.0f} and {TRITON_US:.0f} µs of "
        "launches a call, which a CUDA graph all but saves."
    )


def memory_table() -> str:
    """The Markdown table of memory beside the targets."""
    rows = []
    for problem in TABLE:
        asked = "" if problem.target is None else f"≤ {number(problem.target.peak_mb)}"
        rows.append([problem.label, choice(problem), number(extra_mb(problem)), asked])
    return markdown(["shape, memory in MB", "backend", "workspace", "target, all extra memory"], rows)


if __name__ == "__main__":
    print(f"{table()}\n\n{memory_table()}")
