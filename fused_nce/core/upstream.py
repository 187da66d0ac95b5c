"""What a backward does with the gradient that comes down to it."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_batched(*upstream: Tensor | None) -> None:
    """Not several upstream gradients at once, for a backward that computes the scores again.

    Raises:
        RuntimeError: for them.
    """
    if not torch.compiler.is_compiling() and any(batched(g) for g in upstream if g is not None):
        raise RuntimeError(
            "fused_nce: batched upstream gradients (is_grads_batched, vmap) are supported for `loss` of one sweep "
            "alone: this backward, of a part, blocks or row weights, computes the scores again for each upstream"
        )


def batched(x: Tensor) -> bool:
    """One of several upstream gradients that `is_grads_batched` or a vmap hands down at once."""
    return "Batched" in torch._C._dispatch_key_set(x)  # either kind of vmap; no predicate knows both


def times(stash: Tensor, upstream: Tensor) -> Tensor:
    """stash·upstream, in the stash's own memory unless the graph is kept for another backward."""
    traced = torch.compiler.is_compiling() or type(upstream) is not Tensor
    # fault: stash-scaled-place
    if traced or batched(upstream) or torch._C._autograd._get_current_graph_task_keep_graph():
        return stash * upstream
    # `loss.backward()` has upstream 1, and multiplying would read and write every gradient once more: 20 % of the whole
    # call at N = 126, D = 2560. A CPU looks without waiting; on a GPU a kernel looks.
    if upstream.dtype == torch.float32 and _has_kernel("fused_nce::cuda_multiply_", upstream.device):
        torch.ops.fused_nce.cuda_multiply_(stash, upstream)
        return stash
    return stash if _is_known_one(upstream) else stash.mul_(upstream)


def _is_known_one(upstream: Tensor) -> bool:
    return upstream.device.type == "cpu" and upstream.item() == 1.0


def _has_kernel(op: str, device: torch.device) -> bool:
    """Whether the extension is loaded and has this op for a GPU."""
    loaded = torch._C._dispatch_has_kernel
    return device.type == "cuda" and loaded(op) and torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
