"""What no loss with both gradients can do without: three GEMMs, each at the fastest that torch offers here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARIES = ("mm", "onednn")
GEMMS = ("scores", "grad_antecedents", "grad_consequents")


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
    return {key: call for key, call in calls.items() if key[1] == "mm" or runs(call)}


def runs(call: Callable[[], Tensor]) -> bool:
    """Whether this CPU has the product: oneDNN multiplies no bfloat16 where there are no instructions for it."""
    try:
        call()
    except RuntimeError:
        return False
    return True
