"""FLOP formulas of the ops, so that profilers count them. One score GEMM is u = 2·N·M·D."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fused_nce.core import spec as specs
from fused_nce.core.ops import COUNT


def _score_gemm(q_shape: Any, k_shape: Any) -> int:
    return int(2 * q_shape[0] * (k_shape or q_shape)[0] * q_shape[1])


def _gemms(q_shape: Any, k_shape: Any, needs: list[bool]) -> int:
    """The scores, and a GEMM a gradient; of one tensor in both roles, two."""
    return 1 + (sum(needs[:2]) if k_shape else 2 * needs[0])


@register_flop_formula(torch.ops.fused_nce.stats)
def _stats_flop(q_shape: Any, k_shape: Any, *_: Any, **__: Any) -> int:
    return _score_gemm(q_shape, k_shape)


@register_flop_formula(torch.ops.fused_nce.grads)
def _grads_flop(q_shape: Any, k_shape: Any, *args: Any, **__: Any) -> int:
    return _score_gemm(q_shape, k_shape) * _gemms(q_shape, k_shape, args[-2])


@register_flop_formula(torch.ops.fused_nce.loss)
def _loss_flop(q_shape: Any, k_shape: Any, *args: Any, **__: Any) -> int:
    again = bool(specs.parse(args[COUNT - 4]).columns and any(args[-4]))  # weights need the columns' statistics first
    return _score_gemm(q_shape, k_shape) * (_gemms(q_shape, k_shape, args[-4]) + again)
