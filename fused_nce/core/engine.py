"""The engine's two entries: differentiable statistics for any torch tail, and a loss and its gradients in one sweep."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core import ops as _ops  # noqa: F401  (defines torch.ops.fused_nce)
from fused_nce.core.spec import STATISTICS, Spec
from fused_nce.core.tails import REDUCTIONS, REPORT, Nce


class LossParts(NamedTuple):
    """What one sweep gives. `loss`, `nce` and `penalty` are differentiable; the rest is detached, for logging."""

    loss: Tensor  # 0-d
    nce: Tensor  # 0-d, or (N, P) under reduction="none"
    penalty: Tensor  # 0-d
    report: dict[str, Tensor]  # 0-d each, `tails.REPORT`
    pos: Tensor  # (N, P) transformed scores of the positives
    rows: dict[str, Tensor]  # (N,) each, the spec's statistics


def tile_stats(
    q: Tensor,  # (N, D) queries
    k: Tensor,  # (M, D) keys
    spec: Spec,
    *,
    scale: float | Tensor = 1.0,
    offset: int = 0,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Row statistics of the scores s = scale·⟨q_i, k_j⟩, differentiable in q, k and a tensor `scale`.

    Costs one score GEMM, and three more in a backward that wants both gradients. `neg_max` comes detached: its gradient
    is undefined at ties.

    Args:
        q: (N, D).
        k: (M, D), whole images of `spec.layout.n_c` columns.
        spec: layout, transform and the statistics wanted.
        scale: factor of the dot product; a 0-d tensor is learnable.
        offset: the image of row 0.
        backend: a name of `fused_nce.backends()`, or None to choose.

    Returns:
        `pos` (N, P) and (N,) each of `spec.stats`, float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: naming the argument, the value seen and the value needed.
    """
    q, k, factor, tensor = _prepare(q, k, spec, scale, offset)
    pos, rows = torch.ops.fused_nce.stats(q, k, tensor, factor, spec.code, offset, backend or "")
    named = dict(zip(spec.stats, rows.unbind(0), strict=True))
    if "neg_max" in named:
        named["neg_max"] = named["neg_max"].detach()
    return {"pos": pos, **named}


def tile_loss(
    q: Tensor,  # (N, D) queries
    k: Tensor,  # (M, D) keys
    spec: Spec,
    tail: Nce,
    *,
    scale: float | Tensor = 1.0,
    offset: int = 0,
    backend: str | None = None,
) -> LossParts:
    """The tail's loss, its gradients leaving with the forward: three GEMMs, two where one side wants no gradient.

    `nce` and `penalty` stay differentiable apart from `loss`; a backward that reaches them recomputes the scores.

    Args:
        q: (N, D).
        k: (M, D), whole images of `spec.layout.n_c` columns.
        spec: layout, transform; the statistics must be all of `STATISTICS`.
        tail: from statistics to the loss.
        scale: factor of the dot product; a 0-d tensor is learnable.
        offset: the image of row 0.
        backend: a name of `fused_nce.backends()`, or None to choose.

    Raises:
        ValueError, TypeError: naming the argument, the value seen and the value needed.
    """
    if spec.stats != STATISTICS:
        raise ValueError(f"spec: got statistics {spec.stats}, need all of {STATISTICS} for a loss")
    checks.check_choice("tail.reduction", tail.reduction, REDUCTIONS)
    checks.check_number("tail.penalty", tail.penalty, at_least=0)
    q, k, factor, tensor = _prepare(q, k, spec, scale, offset)
    graph = torch.is_grad_enabled()
    needs = [graph and x is not None and x.requires_grad for x in (q, k, tensor)]
    loss, nce, penalty, report, pos, rows, *_ = torch.ops.fused_nce.loss(
        q, k, tensor, factor, spec.code, offset, tail.code, needs, backend or ""
    )
    return LossParts(
        loss,
        nce,
        penalty,
        dict(zip(REPORT, report.unbind(0), strict=True)),
        pos,
        dict(zip(spec.stats, rows.unbind(0), strict=True)),
    )


def _prepare(
    q: Tensor, k: Tensor, spec: Spec, scale: float | Tensor, offset: int
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """Checked inputs, cast as `matmul` would under autocast (differentiably), and the scale as (host, tensor)."""
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k = (x.to(dtype) if isinstance(x, Tensor) and x.dtype in checks.CASTABLE else x for x in (q, k))
    checks.check_scores(q, k, spec, scale, offset)
    return (q, k, 1.0, scale) if isinstance(scale, Tensor) else (q, k, float(scale), None)
