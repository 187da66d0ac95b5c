"""What each shape should take on one H200, made from counts before it was measured: a MODEL to read a run against.

`python -m bench.counted` prints the tables. Launches, bytes, FLOP and scores are counted in calls (`bench.calls`), what
a score issues, and to which pipe, in machine code (`bench.static_cuda`, `bench.calls`). What no count tells is assumed,
in the constants below and nowhere else. Memory is no model but the plan that the kernels follow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from bench import calls, compiled, sass, static, static_cuda
from bench.gpu.problems import HELD_OUT, MOCO, SWEEP, TABLE, Problem
from bench.roofline import GEMM_FLOP_PER_S, HBM_BYTES_PER_S
from bench.text import markdown, number
from fused_nce.core import cost
from fused_nce.core.cost import Measured
from fused_nce.core.dispatch import backend_module
from fused_nce.core.workspace import GPU_DEFAULT_MB

MULTIPROCESSORS, CLOCK_HZ = 132, 1.755e9
LANES = 128  # threads of a multiprocessor that issue an instruction in a clock: four warps
ISSUE_RATE = 0.8  # of that, or of the fullest pipe (`sass.Turn.slots`), in a loop over scores; of float32 products too
CUBLAS_RATE = 0.92  # of the rate that a GEMM of 16 bits sustains, at these shapes
LAUNCH_S = 2e-6  # of each kernel: drain, gap and fill between it and the next
L2_BYTES, L2_BYTES_PER_S = 50 << 20, 5.5e12  # of 60; scores of a strip that it holds cost no memory traffic


class Parts(NamedTuple):
    """Where the time of a call goes, in ms."""

    gemms: float
    rows: float  # kernels that meet every score
    small: float  # all other kernels, by their bytes; torch's too
    launches: float


def assumptions() -> str:
    """In words, for the documents."""
    return (
        f"{GEMM_FLOP_PER_S / 1e12:.0f} TFLOP/s of bf16 GEMM, {CUBLAS_RATE:.0%} of it by cuBLAS; "
        f"{MULTIPROCESSORS} multiprocessors at {CLOCK_HZ / 1e9:.3f} GHz, {ISSUE_RATE:.0%} of their issue slots used, "
        "or of the ALU's or the special functions' pipe, whichever takes longest; "
        f"{HBM_BYTES_PER_S / 1e12:.1f} TB/s of memory, {L2_BYTES_PER_S / 1e12:.1f} of {L2_BYTES >> 20} MiB of L2; "
        f"{LAUNCH_S * 1e6:.0f} µs a launch. A Triton program alone on its multiprocessor multiplies and computes in "
        "turns; two or more do both at once. What it walks through comes from the L2."
    )


def bound_ms(problem: Problem) -> float:
    """The least GEMMs at the sustained rate."""
    return problem.flop / GEMM_FLOP_PER_S * 1e3


def _compute_s(kernel: dict[str, Any]) -> float:
    """What a kernel's arithmetic takes."""
    name, scores = kernel["name"], kernel.get("scores", 0)
    issued_per_s = ISSUE_RATE * MULTIPROCESSORS * LANES * CLOCK_HZ
    if name.startswith("gemm"):
        wide = name.endswith("float32")
        return float(kernel["flop"]) / (2 * issued_per_s if wide else CUBLAS_RATE * GEMM_FLOP_PER_S)
    if "code" in kernel:
        code = kernel["code"]
        slots = sass.Turn(*(code[name] for name in static.PER_SCORE)).slots
        issue = code["scores"] * slots / LANES / ISSUE_RATE
        matrix = code["scores"] * (code["matrix_clocks_per_score"] or 0.0)
        clocks = max(issue, matrix) if code["resident"] > 1 else issue + matrix
        waves = kernel["launches"] * -(-kernel["programs"] // MULTIPROCESSORS)
        return float(waves * kernel["tiles"] * clocks / CLOCK_HZ)
    return scores * static_cuda.committed()["sm_90"][name]["slots"] / issued_per_s if scores else 0.0


def parts(call: calls.Call) -> Parts:
    """Of a counted call."""
    kernels = call["kernels"]
    strip = max((kernel.get("strip", 0) for kernel in kernels), default=0)
    outside = max(0.0, 1 - L2_BYTES / strip) if strip else 0.0  # of a strip's scores, what the L2 does not hold
    ms = {"gemms": 0.0, "rows": 0.0, "small": 1e3 * call["torch_bytes"] / HBM_BYTES_PER_S}
    for kernel in kernels:
        scores = kernel.get("strip_bytes", 0)
        memory = (kernel.get("bytes", 0) + outside * scores) / HBM_BYTES_PER_S + (1 - outside) * scores / L2_BYTES_PER_S
        part = "gemms" if kernel["name"].startswith("gemm") else "rows" if kernel.get("scores") else "small"
        walked = kernel.get("walked_bytes", 0) / L2_BYTES_PER_S  # while memory and units are at work
        ms[part] += 1e3 * max(memory, walked, _compute_s(kernel))
    return Parts(**ms, launches=call["launches"] * LAUNCH_S * 1e3)


def counted(problem: Problem, backend: str) -> calls.Call:
    """The committed count of a problem's call."""
    return calls.committed()[problem.label, backend]


def time_ms(problem: Problem, backend: str) -> float:
    """Of a call, in bfloat16."""
    return sum(parts(counted(problem, backend)))


def compiled_ms(problem: Problem) -> float:
    """Of torch.compile's code and the launch that a backward begins with: a kernel's FLOP or its tensors' way.

    What the L2 holds comes from there, and no instruction of a kernel costs anything: rather too fast than too slow.
    """
    found = LAUNCH_S
    for kernel in compiled.counted(problem)["kernels"]:
        rate = L2_BYTES_PER_S if kernel["bytes"] <= L2_BYTES else HBM_BYTES_PER_S
        products = kernel.get("flop", 0) / (CUBLAS_RATE * GEMM_FLOP_PER_S)
        found += LAUNCH_S + max(kernel["bytes"] / rate, products)
    return 1e3 * found


def choice(problem: Problem) -> str:
    """The backend that a call takes."""
    return cost.fastest_first(problem.call(), problem.n, problem.m, problem.d, torch.bfloat16)[0]


def cost_times(held_out: bool = False) -> list[Measured]:
    """The model's times of the calls that the rule of the choice is fitted to, or of those that try it.

    Args:
        held_out: the latter: those of TABLE and HELD that it is not fitted to.
    """
    found = []
    for label, (problem, dtype) in calls.problems_counted().items():
        call, sizes = problem.call(dtype), (problem.n, problem.m, problem.d)
        fits = (
            problem.fits_cost or problem.role == SWEEP or (call.columns and problem.role != HELD_OUT) or problem is MOCO
        )
        wanted = fits != held_out and problem.workspace_mb is None
        for backend in [name for name in calls.BACKENDS if wanted and (dtype != torch.float16 or name == "triton")]:
            us = 1e3 * sum(parts(calls.committed()[label, backend])) / problem.steps
            found.append(Measured(backend, dtype.itemsize, call, *sizes, us))
    return found


def has_rate(row: Measured) -> bool:
    """Whether a time tells a rate: few rows leave multiprocessors without a program of 16-bit `triton`, in any turn.

    Nor of `cuda` between thick strips and thin ones.
    """
    if row.backend == "cuda" and row.element_bytes == 2 and not row.call.columns:
        return not cost.THICK < row.m < cost.THIN_FROM
    return row.backend != "triton" or row.element_bytes > 2 or row.n >= (8192 if row.call.stored else 1008)


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
        found = parts(counted(problem, "cuda"))
        rest = found.small + found.launches
        times = bound_ms(problem), sum(found), found.gemms, found.rows, rest, time_ms(problem, "triton")
        theirs, chosen = compiled_ms(problem), choice(problem)
        ours = time_ms(problem, chosen)
        share, ahead = f"{bound_ms(problem) / ours:.0%}", f"{theirs / ours:.2f}×"
        rows.append([problem.label, *(number(ms) for ms in times), chosen, share, asked, number(theirs), ahead])
    header = ["shape (modelled), times in ms", "least GEMMs", "`cuda`", "its GEMMs", "its rows", "the rest"]
    header += ["`triton`", "chosen", "least GEMMs in it", "target", "`torch.compile`", "÷ chosen"]
    return f"{markdown(header, rows)}\n\n**Modelled from counts, not measured**: {assumptions()}"


def launches_table(problems: Iterable[Problem]) -> str:
    """The Markdown table of what a call launches and moves, forward and backward."""
    rows = []
    for problem in problems:
        row = [problem.label]
        for backend in calls.BACKENDS:
            call = counted(problem, backend)
            row += [f"{calls.own(call):,}", f"{sum(call['torch'].values())}", number(calls.moved_bytes(call) / 1e6)]
        theirs = compiled.counted(problem)
        rows.append([*row, f"{len(theirs['kernels'])}", number(compiled.moved_bytes(theirs) / 1e6)])
    header = [f"`{backend}`: {what}" for backend in calls.BACKENDS for what in ("own launches", "torch's", "MB moved")]
    return markdown(["call (counted)", *header, "`torch.compile`: launches", "MB moved"], rows)


def memory_table() -> str:
    """The Markdown table of memory beside the targets."""
    rows = []
    for problem in TABLE:
        asked = "" if problem.target is None else f"≤ {number(problem.target.peak_mb)}"
        rows.append([problem.label, choice(problem), number(extra_mb(problem)), asked])
    return markdown(["shape, memory in MB", "backend", "workspace", "target, all extra memory"], rows)


if __name__ == "__main__":
    from bench.gpu.problems import SMALL

    print(f"{table()}\n\n{launches_table((*TABLE, *SMALL))}\n\n{memory_table()}")
