"""FLOP formulas of the ops, so that profilers count what is executed. One score GEMM is u = 2·N·M·D."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from fused_nce.core import dispatch, tails
from fused_nce.core import spec as specs
from fused_nce.core.cost import Call
from fused_nce.core.ops import COUNT, Scores


def call_of(op: str, x: Scores, tail: str = "", needs: list[bool] | None = None) -> Call:
    """What an op asks of a backend."""
    spec, (q, k) = specs.parse(x.spec), (needs or [False] * 2)[:2]
    cpu = dispatch.backend_module("cpu")
    symmetric = bool(tail) and x.k is None and q and cpu.mirrored(spec, tails.parse(tail), x.offset)
    call = Call(op, q, k and x.k is not None, x.k is None, symmetric=symmetric)
    return dispatch.planned(call, spec, x.q, x.k)


def executed(call: Call, x: Scores, requested: str) -> int:
    """FLOP of the products that a backend computes for these shapes: the CPU's, by the tiles of its plan.

    Those of guides come with the scores, as often as those are made; the C++ kernels have one for all prefixes.
    """
    spec, (n, d), m = specs.parse(x.spec), x.q.shape, x.keys.shape[0]
    name = requested or os.environ.get("FUSED_NCE_BACKEND", "")
    if name not in dispatch.BACKENDS:  # one is to be chosen, or the ring's
        scale = x.scale if x.scale_tensor is None else x.scale_tensor
        names = dispatch.automatic(x.q, x.k, call)
        name = next((name for name in names if not dispatch.why_not(name, spec, x.q, x.k, scale)), "chunked")
    tiles = dispatch.backend_module(name).tiles(spec, call, n, m, d, x.q.dtype)
    products = call.gemms(name, tiles)
    if name == "cuda" and spec.prefixes and x.q.dtype == torch.bfloat16:  # gradients of what rounding leaves too
        products += products - tiles.seen - tiles.again
    guides = 0 if x.guide_q is None else x.guide_q.shape[1] * (1 if name in ("cpu", "cuda") else spec.n_widths)
    return round(2 * n * m * (d * products + guides * (tiles.seen + tiles.again)))  # fault: flop-guides


@register_flop_formula(torch.ops.fused_nce.stats, get_raw=True)
def _stats_flop(*args: Any, **_: Any) -> int:
    x = Scores(*args[:COUNT])
    return executed(call_of("stats", x), x, args[-1])


@register_flop_formula(torch.ops.fused_nce.grads, get_raw=True)
def _grads_flop(*args: Any, **_: Any) -> int:
    x = Scores(*args[:COUNT])
    return executed(call_of("grads", x, needs=args[-2]), x, args[-1])


@register_flop_formula(torch.ops.fused_nce.loss, get_raw=True)
def _loss_flop(*args: Any, **_: Any) -> int:
    x, (tail, needs) = Scores(*args[:COUNT]), args[COUNT : COUNT + 2]
    return executed(call_of("loss", x, tail, needs), x, args[-1])


@register_flop_formula(torch.ops.fused_nce.losses)
def _losses_flop(q_shapes: Any, k_shapes: Any, *args: Any, **__: Any) -> int:
    """Of one column statistic or none; the kernels that take several problems keep a strip of scores."""
    needs, total = args[-2], 0.0
    for i, (q, k) in enumerate(zip(q_shapes, k_shapes, strict=True)):
        call = Call("loss", needs[2 * i], needs[2 * i + 1], k is None)
        total += 2 * q[0] * (k or q)[0] * q[1] * call.gemms("cuda")
    return int(total)
