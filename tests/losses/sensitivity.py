"""The error budget of a registered loss, from its dense oracle alone: how far rounding the scores can move everything.

The oracle scores by `dense_scores`; a zero E is added there, and value and gradients are differentiated by it. A score
may be off by δ: its dot product's roundings, and those of everything up to its exponential, which act like an error of
the score. To first order |∂x/∂E|·δ is what that does to a result x. Beside it stand the roundings of each weight, of
the sums over them and of the output. A closed form has no scores: its inputs stand in for them, without a dot product's
error. float64 is judged by an oracle that rounds likewise, which the factors of 2 allow for.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_nce.losses.registry import Entry
from tests.budget import Precision
from tests.losses.poses import is_float

ORACLE_U = 2.0**-50  # of the largest weight: float64's own roundings, which are all that is left where terms cancel
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


def scored(
    entry: Entry,
    inputs: dict[str, Any],
    leaves: list[str],
    p: Precision,
    monkeypatch: Any,
    off: list[Tensor] | None = None,
) -> tuple[Tensor, list[Probe]]:
    """The oracle's loss, and what was probed on the way, in its order; each off by as much as `off` says."""
    seen: list[Probe] = []
    of: dict[int, tuple[Tensor, Tensor]] = {}  # a probed value by its identity, and its error

    def add(value: Tensor, noise: Tensor) -> Tensor:
        seen.append(probe(value, noise))
        moved = value + (seen[-1].error if off is None else off[len(seen) - 1])
        of[id(moved)] = moved, seen[-1].error
        return moved

    def still(s: Tensor) -> Tensor:
        """As the oracle's own, but what a score is off by moves what it weighs."""
        return s.detach() + (of[id(s)][1] if off is None else 0)

    def probed(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
        terms = abs(float(torch.as_tensor(scale).detach())) * (q.detach().abs() @ k.detach().abs().T)
        return add(scale * (q @ k.T), p.u * (4 + math.sqrt(q.shape[1])) * terms)

    if entry.closed:
        floats = [name for name, x in inputs.items() if is_float(x)]
        moved = {name: add(inputs[name], torch.zeros_like(inputs[name])) for name in floats}
        return entry.oracle(**{**inputs, **moved}), seen
    with monkeypatch.context() as patch:
        module = sys.modules[entry.oracle.__module__]
        patch.setattr(module, "dense_scores", probed)
        if hasattr(module, "still"):
            patch.setattr(module, "still", still)
        return entry.oracle(**inputs), seen


def errors_of(seen: list[Probe], inputs: dict[str, Any], p: Precision) -> list[Tensor]:
    """How far off each probed value may be."""
    bias = abs(float(torch.as_tensor(inputs.get("logit_bias", 0.0)).detach()))
    return [x.noise + ROUNDINGS * p.u * (x.size + bias) for x in seen]


def soft_weights(inputs: dict[str, Any], scores: Tensor) -> Tensor:
    """What soft targets take off the weights of their columns: two terms, which may cancel."""
    found = torch.zeros_like(scores, requires_grad=False)
    if inputs.get("soft_targets") is None or scores.shape != (len(inputs["queries"]), len(inputs["keys"])):
        return found
    columns, shares = inputs["soft_targets"]
    rows = inputs.get("row_weights")
    rows = torch.ones(len(found), dtype=found.dtype) if rows is None else rows.detach().to(found.dtype)
    shares = torch.where(columns >= 0, shares.to(found.dtype), 0.0) * (rows / rows.sum())[:, None]
    return found.scatter_add_(1, columns.clamp(min=0), shares)


def exact(entry: Entry, inputs: dict[str, Any], leaves: list[str], p: Precision, monkeypatch: Any) -> Exact:
    """Everything about float64 `inputs`, differentiated by those that `leaves` names."""
    loss, seen = scored(entry, inputs, leaves, p, monkeypatch)
    delta = torch.cat([x.reshape(-1) for x in errors_of(seen, inputs, p)])
    count = delta.numel()
    tensors, errors = [inputs[name] for name in leaves], [x.error for x in seen]
    grads = torch.autograd.grad(loss, [*tensors, *errors], create_graph=True)
    w = torch.cat([g.detach().abs().reshape(-1) for g in grads[len(leaves) :]])
    # A log-sum-exp is stored rounded, by u times its size, and every weight e^(t − lse) is off by that.
    sizes = torch.cat([x.size.expand(x.value.numel()) for x in seen])
    relative = (ROUNDINGS + math.sqrt(count) + sizes) * p.u + p.u_in
    targets = torch.cat([soft_weights(inputs, x.value).reshape(-1) for x in seen])
    budgets = {}
    for name, x, g in zip(leaves, tensors, grads, strict=False):
        moved = torch.cat([_jacobian(g, error) for error in errors], dim=1) @ delta
        reach = torch.cat([_jacobian(part.value, x) for part in seen]).T
        if not reach.any():  # the bias, which is added to every score
            reach = torch.ones(1, count, dtype=w.dtype)
        gross, summed = reach @ w, reach @ ((w + targets) * relative)
        u_out = torch.finfo(x.dtype if x.dim() == 0 else p.out).eps / 2
        several = name in entry.two_paths
        if inputs.get("prefixes") and x.dim() > 1:
            # Products less what lies along the row, for each prefix: both may be as large as the row's largest.
            several, gross = True, 8 * gross.view(x.shape).amax(dim=-1, keepdim=True).expand(x.shape).reshape(-1)
        out = max(u_out, p.u) * (g.detach().abs().reshape(-1) + (gross if several else 0))
        oracle = ORACLE_U * w.max() * reach.sum(dim=1)
        budgets[name] = (2 * moved + 2 * summed + 2 * out + oracle + p.step).reshape(x.shape)
    value = 2 * (w * delta).sum() + 2 * ROUNDINGS * p.u * (1 + loss.detach().abs())
    return Exact(loss.detach(), value, {name: g.detach() for name, g in zip(leaves, grads, strict=False)}, budgets)


def jumps(
    entry: Entry,
    inputs: dict[str, Any],
    leaves: list[str],
    p: Precision,
    monkeypatch: Any,
    budget: Exact,
    seed: int,
) -> bool:
    """Whether the oracle's own gradient leaves the budget when its scores are as far off as they may be: at a kink.

    The signs of the errors are random, and then the opposite ones; a kink that a rounding would cross, they cross.
    """
    _, seen = scored(entry, inputs, leaves, p, monkeypatch)
    sizes, g = errors_of(seen, inputs, p), torch.Generator().manual_seed(seed)
    for _ in range(6):  # patterns
        signs = [torch.randint(0, 2, x.shape, generator=g) * 2 - 1 for x in sizes]
        for way in (1, -1):
            off = [way * sign * size for sign, size in zip(signs, sizes, strict=True)]
            loss, _ = scored(entry, inputs, leaves, p, monkeypatch, off)
            found = torch.autograd.grad(loss, [inputs[name] for name in leaves])
            for name, grad in zip(leaves, found, strict=True):
                if not ((grad - budget.grads[name]).abs() <= budget.grad_budgets[name]).all():
                    return True
    return False


def _jacobian(y: Tensor, x: Tensor) -> Tensor:
    """|∂y/∂x|, (y.numel(), x.numel())."""
    if not y.requires_grad:  # a constant gradient
        return torch.zeros(y.numel(), x.numel(), dtype=x.dtype)
    units = torch.eye(y.numel(), dtype=y.dtype).view(y.numel(), *y.shape)
    (rows,) = torch.autograd.grad(y, x, units, retain_graph=True, allow_unused=True, is_grads_batched=True)
    return torch.zeros(y.numel(), x.numel(), dtype=x.dtype) if rows is None else rows.abs().reshape(y.numel(), -1)
