"""Flash-style kernels in Triton: a tile of scores is computed, used and dropped on the chip, without a C++ compiler.

Without a penalty, one pass over the scores gives the row statistics and the unnormalised dq; dk takes a second
pass. Where k is q, one more pass gives the gradient of both roles. Where columns have statistics too, or rows are
wide, one pass gives all of them, and weights are stored for cuBLAS, a strip of rows at a time (`stored.py`). A bank of
another dtype is cast tile by tile. Inputs are used in place where the elements of a row are adjacent, as the `cpu`
backend does; any other layout is copied first, beyond the workspace. Triton itself is imported when the first kernel is
launched: `fused_nce` needs torch alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_nce.backends.triton import configs, plan
from fused_nce.core import workspace
from fused_nce.core.defaults import mirrored, slopes, summary, tiles  # noqa: F401  (handed on)
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import KERNEL_ATOMS, Spec
from fused_nce.core.tails import Coefficients, Tail

BOTH_WAYS = False
ATOMS = KERNEL_ATOMS - {"guide", "several", "prefixes"} | {"mixed"}  # each has its twin in `atoms.py`
losses = gathered_scores = gathered_grads = None
MOST_ROWS = 2**31 - 2**16  # a row's number is a 32-bit integer, a tile or a split beyond the last row too


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Needs Triton, a GPU that the table of tiles knows, and 16 or 32 bits."""
    if spec.columns and spec.marked:
        return "its kernels leave no column of a row out beside statistics of columns"
    for x in (q, k):
        if x.dtype not in configs.DTYPES:
            return f"its kernels take float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    interpreted = q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if q.device.type != "cuda" and not interpreted:
        return f"needs a GPU, not {q.device}"
    if interpreted and torch.bfloat16 in (q.dtype, k.dtype):
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if not _installed():
        return "triton is not installed"
    architecture = configs.architecture_of(q.device)
    if architecture is None:
        return f"has no tiles for {q.device}, only for {', '.join(configs.ARCHITECTURES)}"
    wide = torch.promote_types(q.dtype, k.dtype)
    if (architecture, wide) not in configs.TABLE and not interpreted:
        return f"has no tiles for {str(wide).removeprefix('torch.')} on {architecture}"
    if max(q.shape[0], k.shape[0]) > MOST_ROWS:
        return f"numbers at most {MOST_ROWS} rows, not {max(q.shape[0], k.shape[0])}"
    return None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """`plan.workspace_bytes`: partial sums of the splits, or stored weights, and O(N·P) statistics."""
    return plan.workspace_bytes(spec, n, m, d, dtype_bytes, limit_bytes)


def ways(spec: Spec, q: Tensor, k: Tensor, shared: bool) -> plan.Ways:
    """`plan.ways` of these tensors within the limit; AMD's cards have no tiles for either."""
    if torch.version.hip is not None:
        return plan.Ways()
    sizes = q.shape[0], k.shape[0], q.shape[1], (q.dtype, k.dtype), shared
    return plan.ways(spec, *sizes, workspace.limit_bytes(q.device.type))


def stats(problem: Problem) -> Statistics:
    """One score GEMM, of columns too; two where their statistics take a pass of their own."""
    return _launch().stats(problem)


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The scores again for each gradient, once where weights are stored, and one GEMM a gradient."""
    return _launch().grads(problem, statistics, coefficients, needs)


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """Statistics and gradients, without a stored score."""
    return _launch().loss(problem, tail, needs)


def whole_loss(*call: Any) -> tuple[Any, ...] | None:
    """`whole.py`: nce of rows or both sides; norms, the tail and the upstream gradient have launches of their own."""
    found: tuple[Any, ...] | None = importlib.import_module("fused_nce.backends.triton.whole").whole_loss(*call)
    return found


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _launch() -> Any:
    return importlib.import_module("fused_nce.backends.triton.launch")
