"""The examples of registered losses, in a dtype and with gradients wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.losses.registry import LOSSES, Entry


def is_float(x: Any) -> bool:
    """A tensor of numbers, rather than of labels, or an option."""
    return isinstance(x, Tensor) and x.is_floating_point()


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The example in a dtype: numbers on which the softmax depends stay wide, as a model keeps them."""
    wide = torch.promote_types(dtype, torch.float32)
    return {name: x.to(wide if x.dim() == 0 else dtype) if is_float(x) else x for name, x in inputs.items()}


def widened(inputs: dict[str, Any], leaves: list[str]) -> dict[str, Any]:
    """The same values, float64; gradients wanted of `leaves`."""
    return {
        name: x.detach().double().requires_grad_(name in leaves) if is_float(x) else x for name, x in inputs.items()
    }


def posed(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Entry, dict[str, Any], list[str]]:
    """(entry, inputs with gradients wanted, the names of those)."""
    entry = LOSSES[name]
    inputs = cast(entry.example(seed), dtype)
    leaves = {key: x.detach().clone().requires_grad_() for key, x in entry.differentiable(inputs).items()}
    return entry, inputs | leaves, list(leaves)
