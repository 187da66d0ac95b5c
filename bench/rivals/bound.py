"""What no loss with both gradients can do without: three GEMMs, each by the fastest library here."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bench import host

GEMMS = ("scores", "grad_antecedents", "grad_consequents")


class Product(Protocol):
    """x·y, into `out` if given: a library with no such entry point takes fresh memory."""

    def __call__(self, x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor: ...


class Library(NamedTuple):
    """Where a product comes from. `load` gives None where it is not here, or would not be compared fairly."""

    label: str
    load: Callable[[], Product | None]


def _mm(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(x, y, out=out)


def _onednn(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, y.T, None, "none", [], "")
    return found


@lru_cache(maxsize=1)
def _openblas() -> Product | None:
    """`pip install scipy-openblas32`: of float32, row-major or the transpose of what is, on torch's threads."""
    if importlib.util.find_spec("scipy_openblas32") is None:
        return None
    # It reads these once, as it loads: AVX2 kernels, and threads that sleep at once. They would spin for 2^26 cycles
    # after a product, on the cores that the next one needs.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    if host.narrowed():
        os.environ.setdefault("OPENBLAS_CORETYPE", "Zen")
    package = importlib.import_module("scipy_openblas32")
    library: Any = ctypes.CDLL(str(Path(package.get_lib_dir(), package.get_library(fullname=True))))
    row_major, no_transpose, transpose = 101, 111, 112
    one, zero = ctypes.c_float(1), ctypes.c_float(0)

    def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32:
            raise RuntimeError(f"got {x.dtype}, need float32")
        out = x.new_empty(x.shape[0], y.shape[1]) if out is None else out
        place = [number for z in (x, y) for number in (ctypes.c_void_p(z.data_ptr()), max(z.stride()))]
        ways = [no_transpose if z.stride(1) == 1 else transpose for z in (x, y)]
        library.scipy_openblas_set_num_threads(torch.get_num_threads())
        sizes = (x.shape[0], y.shape[1], x.shape[1])
        to = (ctypes.c_void_p(out.data_ptr()), out.stride(0))
        library.scipy_cblas_sgemm(row_major, *ways, *sizes, one, *place, zero, *to)
        return out

    return product


@lru_cache(maxsize=1)
def _zendnn() -> Product | None:
    """`pip install zentorch`, its operators alone: the package itself also changes how torch compiles.

    It chooses its kernels by the CPU, and nothing turns its AVX-512 off: no rival where torch's is.
    """
    found = importlib.util.find_spec("zentorch")
    if found is None or found.origin is None or host.narrowed():
        return None
    try:
        torch.ops.load_library(str(Path(found.origin).with_name("libzentorch.so")))
    except OSError:  # built for another torch
        return None

    def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            fresh: Tensor = torch.ops.zentorch.zentorch_mm(x, y)
            return fresh
        torch.ops.zentorch.zentorch_linear_unary.out(x, y.T, None, out=out)
        return out

    return product


LIBRARIES = {
    "mm": Library("torch.mm", lambda: _mm),
    "onednn": Library("oneDNN", lambda: _onednn if torch.backends.mkldnn.is_available() else None),
    "openblas": Library("OpenBLAS", _openblas),
    "zendnn": Library("ZenDNN", _zendnn),
}


def gemms(q: Tensor, k: Tensor) -> dict[tuple[str, str], Callable[[], Tensor]]:
    """(GEMM, library) → a call, for S = q·kᵀ, dq = W·k and dk = Wᵀ·q; libraries that cannot run here are left out.

    Scores go to a buffer that is there already: a loss need not keep them. The two gradients are fresh memory, as every
    rival's are.
    """
    q, k = q.detach(), k.detach().flatten(0, -2)
    scores, w = (torch.randn(q.shape[0], k.shape[0]).to(q.dtype) for _ in range(2))
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    for name, library in LIBRARIES.items():
        product = library.load()
        if product is None or not runs(partial(product, q, k.T)):
            continue
        calls["scores", name] = partial(product, q, k.T, out=scores)
        calls["grad_antecedents", name] = partial(product, w, k)
        calls["grad_consequents", name] = partial(product, w.T, q)
    return calls


def runs(call: Callable[[], Tensor]) -> bool:
    """Whether this CPU has the product: oneDNN multiplies no bfloat16 where there are no instructions for it."""
    try:
        call()
    except RuntimeError:
        return False
    return True
