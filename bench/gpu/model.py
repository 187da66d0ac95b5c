"""What each shape should take on one H200, written down before it was measured: a MODEL, against which a run is read.

`python -m bench.gpu.model` prints the table. Rates and launches are those of `core/cost.py`, by which a backend is
chosen; the GEMMs are counted for each loss, and every pass over scores has its row kernel.
"""

from __future__ import annotations

from bench.gpu.problems import TABLE, Problem
from bench.roofline import GEMM_FLOP_PER_S
from bench.text import markdown, number
from fused_nce.core import cost

CUBLAS_RATE = 0.92  # of the sustained GEMM rate, at these shapes
ROW_PS = 1.5  # a score through the L2: written by the GEMM, read twice by the row kernel, its weight written
CUDA_US, TRITON_US = (cost.table()[name, 2].launch_us for name in ("cuda", "triton"))  # of launches a call


def bound_ms(problem: Problem) -> float:
    """The least GEMMs at the sustained rate."""
    return problem.flop / GEMM_FLOP_PER_S * 1e3


def cuda_ms(problem: Problem) -> float:
    """The GEMMs by cuBLAS, a row kernel for each time that the scores are computed, and a call's launches."""
    gemms = len(problem.gemms) + (problem.loss == "nt_xent")  # q and k in one: W·z and Wᵀ·z, one after the other
    passes = 1 + ("scores_again" in problem.gemms)
    score_ps = gemms * 2 * problem.d / (CUBLAS_RATE * GEMM_FLOP_PER_S) * 1e12 + passes * ROW_PS
    return problem.steps * (CUDA_US * 1e-3 + problem.scores * score_ps * 1e-9)


def triton_ms(problem: Problem) -> float:
    """What the choice of a backend goes by."""
    gemms = problem.call.gemms("triton")
    return problem.steps * cost.table()["triton", 2].time_us(gemms, problem.n, problem.m, problem.d) * 1e-3


def table() -> str:
    """The Markdown table, with its label."""
    rows = []
    for problem in TABLE:
        if problem.workspace_mb is not None:
            continue
        asked = "" if problem.target is None else number(problem.target.device_ms)
        times = (bound_ms(problem), cuda_ms(problem), triton_ms(problem))
        rows.append([problem.label, *(number(x) for x in times), asked])
    header = ["shape (modelled)", "least GEMMs, ms", "`cuda`, ms", "`triton`, ms", "target, ms"]
    return markdown(header, rows) + (
        f"\n\n**Modelled, not measured**: {GEMM_FLOP_PER_S / 1e12:.0f} TFLOP/s of bf16 GEMM, {CUBLAS_RATE:.0%} of it "
        f"by cuBLAS; {ROW_PS} ps a score and pass for the row kernels; {CUDA_US:.0f} and {TRITON_US:.0f} µs of "
        "launches a call, which a CUDA graph all but saves."
    )


if __name__ == "__main__":
    print(table())
