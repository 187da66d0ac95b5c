"""What no loss with both gradients can do without: three GEMMs, each by the fastest of torch, oneDNN and OpenBLAS."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARIES = ("mm", "onednn", "openblas")
GEMMS = ("scores", "grad_antecedents", "grad_consequents")


@lru_cache(maxsize=1)
def _openblas() -> Any:
    """The library in the package `scipy-openblas32`, or None where that is not installed."""
    if importlib.util.find_spec("scipy_openblas32") is None:
        return None
    package = importlib.import_module("scipy_openblas32")
    return ctypes.CDLL(str(Path(package.get_lib_dir(), package.get_library(fullname=True))))


def _sgemm(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x·y in float32 by OpenBLAS, each row-major or the transpose of what is, on as many threads as torch."""
    out = x.new_empty(x.shape[0], y.shape[1]) if out is None else out
    place: list[Any] = []
    for z in (x, y):
        place += [ctypes.c_void_p(z.data_ptr()), max(z.stride())]
    row_major, no_transpose, transpose = 101, 111, 112
    ways = [no_transpose if z.stride(1) == 1 else transpose for z in (x, y)]
    library = _openblas()
    library.scipy_openblas_set_num_threads(torch.get_num_threads())
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    sizes = (x.shape[0], y.shape[1], x.shape[1])
    library.scipy_cblas_sgemm(
        row_major, *ways, *sizes, one, *place, zero, ctypes.c_void_p(out.data_ptr()), out.stride(0)
    )
    return out


def gemms(a: Tensor, c: Tensor) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """(GEMM, library) → a call, for S = q·kᵀ, dq = W·k and dk = Wᵀ·q; libraries that cannot run here are left out.

    Scores go to a buffer that is there already (oneDNN's entry point offers none): a loss need not keep them. The two
    gradients are fresh memory, as every rival's are.
    """
    q, k = a.detach(), c.detach().flatten(0, 1)
    scores, w = (torch.randn(q.shape[0], k.shape[0]).to(q.dtype) for _ in range(2))

    def onednn(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        # x·yᵀ
        return lambda: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")

    calls: dict[tuple[str, str], Callable[[], Tensor]] = {
        ("scores", "mm"): lambda: torch.mm(q, k.T, out=scores),
        ("grad_antecedents", "mm"): lambda: torch.mm(w, k),
        ("grad_consequents", "mm"): lambda: torch.mm(w.T, q),
    }
    if torch.backends.mkldnn.is_available():
        calls["scores", "onednn"] = onednn(q, k)
        calls["grad_antecedents", "onednn"] = onednn(w, k.T)
        calls["grad_consequents", "onednn"] = onednn(w.T, q.T)
    if q.dtype == torch.float32 and _openblas() is not None:
        calls["scores", "openblas"] = lambda: _sgemm(q, k.T, scores)
        calls["grad_antecedents", "openblas"] = lambda: _sgemm(w, k)
        calls["grad_consequents", "openblas"] = lambda: _sgemm(w.T, q)
    return {key: call for key, call in calls.items() if key[1] == "mm" or runs(call)}


def runs(call: Callable[[], Tensor]) -> bool:
    """Whether this CPU has the product: oneDNN multiplies no bfloat16 where there are no instructions for it."""
    try:
        call()
    except RuntimeError:
        return False
    return True
