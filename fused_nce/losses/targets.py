"""Targets of several columns a row: positives in any number, and a distribution over a few columns.

A row's target is a distribution w over its columns P, uniform for positives: its loss is the cross entropy
log(Σ_P e^s + Σ_neg e^s) − Σ_P w·s, for positives the mean over them of −log softmax, SupCon's "out" (Khosla et al.
2020, arXiv:2004.11362). No column of P is a negative, of whatever weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_nce.core import checks

ROUNDING = 1e-3  # what a sum of weights may be off 1 by, beyond what their own dtype rounds


class Targets(NamedTuple):
    """Of each row, its columns once each."""

    indices: Tensor  # (N, P) int64 in ascending order, −1 for none
    weights: Tensor  # (N, P), 0 for none, of sum 1
    name: str  # of the argument

    @property
    def some(self) -> Tensor:
        """(N, P) bool: a column."""
        return self.indices >= 0


def checked(
    positives: Tensor | None,  # (N, P) int64
    soft_targets: tuple[Tensor, Tensor] | None,  # (N, P) int64 and (N, P)
    n: int,
    m: int,
    like: Tensor,
) -> Targets | None:
    """Either of them as targets, or None without one.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    if positives is None and soft_targets is None:
        return None
    name = "positives" if soft_targets is None else "soft_targets"
    if positives is not None and soft_targets is not None:
        raise ValueError("soft_targets: got them with positives, need one of the two")
    indices, weights = positives, None
    if soft_targets is not None:
        if not isinstance(soft_targets, (tuple, list)) or len(soft_targets) != 2:
            raise ValueError(f"soft_targets: got {type(soft_targets).__name__}, need a pair (indices, weights)")
        indices, weights = soft_targets
    indices = _checked_indices(name, indices, n, like.device)
    if weights is not None:
        floats = isinstance(weights, Tensor) and weights.is_floating_point()
        if not floats or weights.shape != indices.shape or weights.device != like.device:
            seen = f"{weights.dtype} {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"soft_targets: got weights {seen}, need floats of {tuple(indices.shape)} on {like.device}"
            )
    wide = torch.promote_types(like.dtype, torch.float32)
    some = indices >= 0
    w = some.to(wide) if weights is None else weights.detach().to(wide)
    slack = 0.0 if weights is None else ROUNDING + torch.finfo(weights.dtype).eps / 2
    w = w.masked_fill(~some & w.isfinite(), 0.0)  # padding counts for nothing, unless it is no number
    sums = w.sum(dim=1)
    wrong = ~some.any(dim=1) if weights is None else ~((sums - 1).abs() <= slack) | (w < 0).any(dim=1)
    need = "at least one" if weights is None else "weights >= 0 of sum 1"
    outside, every = (
        (indices < -1).any() | (indices >= m).any(),
        f"{name}: got others, need -1 <= index < M, and of each",
    )
    if checks.is_wrong(outside | wrong.any(), f"{every} row {need}"):
        if checks.is_batched(outside, wrong):
            raise ValueError(f"{every} row {need}")
        low, high = (int(x) for x in torch.aminmax(indices))
        if low < -1 or high >= m:
            raise ValueError(f"{name}: got {low if low < -1 else high}, need -1 <= index < M = {m}")
        row = int(wrong.to(torch.int64).argmax())
        seen = "none" if weights is None else f"weights of sum {float(sums[row]):.4g}"
        raise ValueError(f"{name}: got {seen} for row {row}, need {need}")
    # In ascending order, as the kernels look them up. A column that comes twice is one, of both weights.
    ordered, order = indices.sort(dim=1, stable=True)
    later = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0)) & (ordered >= 0)  # fault: target-twice
    w = w.gather(1, order)
    if weights is not None:
        column = (~later).cumsum(dim=1) - 1  # of a row's different ones
        w = torch.zeros_like(w).scatter_add(1, column, w).gather(1, column)
    w = w.masked_fill(later, 0.0)
    return Targets(ordered.masked_fill(later, -1), w / w.sum(dim=1, keepdim=True), name)


def _checked_indices(name: str, indices: Tensor | None, n: int, device: torch.device) -> Tensor:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{name}: got {kind}, need (N, P) int64 indices")
    if indices.dim() != 2 or indices.shape[0] != n or indices.shape[1] < 1 or indices.device != device:
        seen = f"shape {tuple(indices.shape)} on {indices.device}"
        raise ValueError(f"{name}: got {seen}, need (N, P) indices of N = {n} rows on {device}")
    return indices
