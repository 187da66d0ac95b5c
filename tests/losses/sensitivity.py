"""The error budget of a registered loss, from its dense oracle alone: how far rounding the scores can move everything.

The oracle scores by `dense_scores`; a zero E is added there, and value and gradients are differentiated by it. A score
may be off by δ: its dot product's roundings, and those of everything up to its exponential, which act like an error of
the score. To first order |∂x/∂E|·δ is what that does to a result x. Beside it stand the roundings of the sums over
the weights and of the output. float64 is judged by an oracle that rounds likewise, which the factors of 2 allow for.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_nce.losses.registry import Entry
from tests.budget import Precision

ROUNDINGS = 8  # between a score and its weight: scale, transform, statistic, exponential, coefficient


class Exact(NamedTuple):
    """The oracle's value and gradients, each with its budget."""

    loss: Tensor
    loss_budget: Tensor
    grads: dict[str, Tensor]
    grad_budgets: dict[str, Tensor]


def exact(entry: Entry, inputs: dict[str, Any], leaves: list[str], p: Precision, monkeypatch: Any) -> Exact:
    """Everything about float64 `inputs`, differentiated by those that `leaves` names."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def probed(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
        s = scale * (q @ k.T)
        error = torch.zeros_like(s, requires_grad=True)
        terms = abs(float(torch.as_tensor(scale).detach())) * (q.detach().abs() @ k.detach().abs().T)
        seen.append((s, error, p.u * (4 + math.sqrt(q.shape[1])) * terms))
        return s + error

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[entry.oracle.__module__], "dense_scores", probed)
        loss = entry.oracle(**inputs)
    ((s, error, noise),) = seen
    shift = float(torch.as_tensor(inputs.get("logit_bias", 0.0)).detach())
    size = 1 + s.detach().abs().max() + math.log(s.numel()) + abs(shift)
    delta = noise + ROUNDINGS * p.u * size
    tensors = [inputs[name] for name in leaves]
    *grads, w = torch.autograd.grad(loss, [*tensors, error], create_graph=True)
    budgets = {}
    for name, x, g in zip(leaves, tensors, grads, strict=True):
        moved = _jacobian(g, error) @ delta.reshape(-1)
        gross = _jacobian(s, x).T @ w.detach().abs().reshape(-1)
        if not gross.any():  # the bias, which is added to every score
            gross = w.detach().abs().sum().reshape(1)
        sums = (ROUNDINGS + math.sqrt(s.numel())) * p.u + p.u_in
        u_out = torch.finfo(x.dtype if x.dim() == 0 else p.out).eps / 2
        out = max(u_out, p.u) * (g.detach().abs().reshape(-1) + (gross if name in entry.two_paths else 0))
        budgets[name] = (2 * moved + 2 * sums * gross + 2 * out + p.step).reshape(x.shape)
    value = 2 * (w.detach().abs() * delta).sum() + 2 * ROUNDINGS * p.u * (1 + loss.detach().abs())
    return Exact(loss.detach(), value, dict(zip(leaves, (g.detach() for g in grads), strict=True)), budgets)


def _jacobian(y: Tensor, x: Tensor) -> Tensor:
    """|∂y/∂x|, (y.numel(), x.numel())."""
    rows = [
        torch.autograd.grad(element, x, retain_graph=True, allow_unused=True)[0] for element in y.reshape(-1).unbind()
    ]
    return torch.stack([torch.zeros(x.numel(), dtype=x.dtype) if r is None else r.abs().reshape(-1) for r in rows])
