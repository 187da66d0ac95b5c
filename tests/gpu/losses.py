"""The registered losses' examples on a device, held to their budgets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.losses.registry import LOSSES
from tests.budget import eta, precision
from tests.losses.test_registry import budget_of, posed, run

OPEN = [name for name, entry in LOSSES.items() if not entry.closed]


def placed(x: Any, device: str) -> Any:
    """An argument on the device, as the leaf that it was."""
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def etas_of(
    name: str, device: str, backend: str, dtype: torch.dtype, seed: int = 0, upstream: float = 1.0
) -> dict[str, float]:
    """η of the registered example's value and gradients."""
    entry, inputs, leaves = posed(name, seed, dtype)
    budget = budget_of(name, seed, dtype, precision(dtype, backend))
    here = {key: placed(x, device) for key, x in inputs.items()}
    out, grads = run(entry, here, leaves, backend, upstream)
    etas = {"loss": eta(out.loss, budget.loss.numpy(), budget.loss_budget.numpy())}
    for key in leaves:
        value, allowed = upstream * budget.grads[key], abs(upstream) * budget.grad_budgets[key]
        etas[key] = eta(grads[key], value.numpy(), allowed.numpy())
    return etas
