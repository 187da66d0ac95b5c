"""The error budget of a registered loss, from its dense oracle alone: how far rounding the scores can move everything.

The oracle scores by `dense_scores`; a zero E is added there, and value and gradients are differentiated by it. A score
may be off by δ: its dot product's roundings, and those of everything up to its exponential, which act like an error of
the score. To first order |∂x/∂E|·δ is what that does to a result x. Beside it stand the roundings of the sums over
the weights and of the output. A closed form has no scores: its inputs stand in for them, without a dot product's error.
float64 is judged by an oracle that rounds likewise, which the factors of 2 allow for.
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


class Probe(NamedTuple):
    """A value that may be off, with the zero that was added to it."""

    value: Tensor
    error: Tensor
    noise: Tensor  # its own, before the roundings between it and its weight
    size: Tensor  # 0-d, of what those are relative to


def probe(value: Tensor, noise: Tensor) -> Probe:
    """At zero error."""
    size = 1 + value.detach().abs().max() + math.log(value.numel())
    return Probe(value, torch.zeros_like(value, requires_grad=True), noise, size)


class Exact(NamedTuple):
    """The oracle's value and gradients, each with its budget."""

    loss: Tensor
    loss_budget: Tensor
    grads: dict[str, Tensor]
    grad_budgets: dict[str, Tensor]


def exact(entry: Entry, inputs: dict[str, Any], leaves: list[str], p: Precision, monkeypatch: Any) -> Exact:
    """Everything about float64 `inputs`, differentiated by those that `leaves` names."""
    seen: list[Probe] = []

    def probed(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
        terms = abs(float(torch.as_tensor(scale).detach())) * (q.detach().abs() @ k.detach().abs().T)
        seen.append(probe(scale * (q @ k.T), p.u * (4 + math.sqrt(q.shape[1])) * terms))
        return seen[-1].value + seen[-1].error

    if entry.closed:
        seen = [probe(inputs[name], torch.zeros_like(inputs[name])) for name in leaves]
        loss = entry.oracle(**{**inputs, **{name: x.value + x.error for name, x in zip(leaves, seen, strict=True)}})
    else:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[entry.oracle.__module__], "dense_scores", probed)
            loss = entry.oracle(**inputs)
    bias = abs(float(torch.as_tensor(inputs.get("logit_bias", 0.0)).detach()))
    delta = torch.cat([(x.noise + ROUNDINGS * p.u * (x.size + bias)).reshape(-1) for x in seen])
    count = delta.numel()
    tensors, errors = [inputs[name] for name in leaves], [x.error for x in seen]
    grads = torch.autograd.grad(loss, [*tensors, *errors], create_graph=True)
    w = torch.cat([g.detach().abs().reshape(-1) for g in grads[len(leaves) :]])
    budgets = {}
    for name, x, g in zip(leaves, tensors, grads, strict=False):
        moved = torch.cat([_jacobian(g, error) for error in errors], dim=1) @ delta
        gross = torch.cat([_jacobian(part.value, x) for part in seen]).T @ w
        if not gross.any():  # the bias, which is added to every score
            gross = w.sum().reshape(1)
        sums = (ROUNDINGS + math.sqrt(count)) * p.u + p.u_in
        u_out = torch.finfo(x.dtype if x.dim() == 0 else p.out).eps / 2
        out = max(u_out, p.u) * (g.detach().abs().reshape(-1) + (gross if name in entry.two_paths else 0))
        budgets[name] = (2 * moved + 2 * sums * gross + 2 * out + p.step).reshape(x.shape)
    value = 2 * (w * delta).sum() + 2 * ROUNDINGS * p.u * (1 + loss.detach().abs())
    return Exact(loss.detach(), value, {name: g.detach() for name, g in zip(leaves, grads, strict=False)}, budgets)


def _jacobian(y: Tensor, x: Tensor) -> Tensor:
    """|∂y/∂x|, (y.numel(), x.numel())."""
    if not y.requires_grad:  # a constant gradient
        return torch.zeros(y.numel(), x.numel(), dtype=x.dtype)
    rows = [
        torch.autograd.grad(element, x, retain_graph=True, allow_unused=True)[0] for element in y.reshape(-1).unbind()
    ]
    return torch.stack([torch.zeros(x.numel(), dtype=x.dtype) if r is None else r.abs().reshape(-1) for r in rows])
