"""Scores of chosen columns, s_ij = scale·⟨q_i, k_(index_ij)⟩: for sampled negatives, of which every row has its own.

No GEMM and no statistic: (N, m) scores are no more than the indices themselves, so they are returned, for any torch.
What is never held are the (N, m, D) rows that they are of. The op, its fake kernel and its autograd stand here once; a
backend that has `gathered_scores` and `gathered_grads` runs it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import register_flop_formula

from fused_nce.core import checks, dispatch, twice, upstream, workspace
from fused_nce.core.engine import as_matmul
from fused_nce.core.problem import ASIDE, Backend, GatheredGradients, GatheredGrads, GatheredScores

_lib = torch.library.Library("fused_nce", "FRAGMENT")


class _Inputs(NamedTuple):
    """The arguments with which both ops begin, in the schema's order."""

    q: Tensor
    k: Tensor
    indices: Tensor
    scale_tensor: Tensor | None  # scale·scale_tensor multiplies the dot product
    scale: float

    @property
    def wide(self) -> torch.dtype:
        """What everything is accumulated in."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def factor(self) -> float | Tensor:
        """Of the dot product."""
        return self.scale if self.scale_tensor is None else self.scale_tensor.to(self.wide) * self.scale

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What `needs` and the gradients speak of, in their order."""
        return self.q, self.k, self.scale_tensor


COUNT = len(_Inputs._fields)
_INPUTS = "Tensor q, Tensor k, Tensor indices, Tensor? scale_tensor, float scale"
for _schema in (
    f"gathered_scores({_INPUTS}, str backend) -> Tensor",
    f"gathered_grads({_INPUTS}, Tensor d, bool[] needs, str backend) -> (Tensor dq, Tensor dk, Tensor dscale)",
):
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def gathered_scores(
    q: Tensor,  # (N, D)
    k: Tensor,  # (M, D)
    indices: Tensor,  # (N, m) int64
    *,
    scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """s_ij = scale·⟨q_i, k_(indices_ij)⟩, (N, m), differentiable in q, k and a tensor `scale`.

    The (N, m, D) gathered rows are never held. Every backward reads them once more; k must not change before it.

    Args:
        q: (N, D), float64, 32, 16 or bfloat16.
        k: (M, D), any float dtype; no gradient where it wants none.
        indices: (N, m) int64, rows of k; one may come several times. On a GPU one out of range gives a NaN.
        scale: factor of the dot product, any finite number; a 0-d tensor is learnable.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        (N, m) float32, float64 for float64 q.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        gathered_scores(torch.randn(8, 16), torch.randn(100, 16), torch.randint(100, (8, 5)), scale=10.0)
        ```
    """
    q, k = as_matmul(q), as_matmul(k)
    for name, x, letter in (("q", q, "N"), ("k", k, "M")):
        checks.check_no_transform(name, x)
        checks.check_tensor(name, x, (letter, "D"))
    if k.device != q.device:
        raise ValueError(f"k: got device {k.device}, need q's {q.device}")
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k: got width D = {k.shape[1]}, need q's {q.shape[1]}")
    checks.check_indices("indices", indices, q.shape[0], k.shape[0], q.device)
    checks.check_scale("scale", scale, q.device)
    factor, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    found: Tensor = torch.ops.fused_nce.gathered_scores(q, k, indices, tensor, factor, backend or "")
    return found


def _prepared(x: _Inputs, backend: str) -> tuple[str, Backend]:
    def why_not(name: str) -> str | None:
        return None if dispatch.backend_module(name).gathered_scores is not None else "it gathers no columns"

    return dispatch.choose_by(why_not, ("chunked",), backend, f"gathered on {x.q.device}", "no kernel gathers columns")


def _as_is(x: _Inputs) -> torch.autocast:
    return torch.autocast(x.q.device.type, enabled=False)


def _scores(*args: Any) -> Tensor:
    x = _Inputs(*args[:COUNT])
    name, module = _prepared(x, args[-1])
    with _as_is(x), torch.profiler.record_function(f"fused_nce::gathered_scores[{name}]"):
        return cast(GatheredScores, module.gathered_scores)(x.q.detach(), x.k.detach(), x.indices) * x.factor


def _grads(*args: Any) -> tuple[Tensor, ...]:
    x, (d, needs, backend) = _Inputs(*args[:COUNT]), args[COUNT:]
    name, module = _prepared(x, backend)
    with _as_is(x), torch.profiler.record_function(f"fused_nce::gathered_grads[{name}]"):
        raw = GatheredGradients(
            *cast(GatheredGrads, module.gathered_grads)(x.q, x.k, x.indices, d.contiguous(), *needs)
        )
    # In the inputs' dtype at the last: a factor of 16 bits more would be lost in theirs.
    none = x.q.new_empty(0, dtype=x.wide)
    return (
        (raw.dq * x.factor).to(x.q.dtype) if needs[0] else none,
        (raw.dk * x.factor).to(x.k.dtype) if needs[1] else none.clone(),
        raw.dscale * x.scale if needs[2] else none.clone(),
    )


def _fake_scores(*args: Any) -> Tensor:
    x = _Inputs(*args[:COUNT])
    return x.q.new_empty(x.indices.shape, dtype=x.wide)


def _fake_grads(*args: Any) -> tuple[Tensor, ...]:
    x, (_, needs, _) = _Inputs(*args[:COUNT]), args[COUNT:]
    shapes = [
        tuple(leaf.shape) if leaf is not None and need else (0,)
        for leaf, need in zip(x.differentiable, needs, strict=True)
    ]
    dtypes = [leaf.dtype if need else x.wide for leaf, need in zip((x.q, x.k), needs[:2], strict=True)] + [x.wide]
    return tuple(x.q.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    x = _Inputs(*inputs[:COUNT])
    ctx.save_for_backward(*x[:4])
    ctx.scale, ctx.backend = x.scale, inputs[-1]
    ctx.needs = [leaf is not None and leaf.requires_grad for leaf in x.differentiable]


def _backward(ctx: Any, d: Tensor | None) -> tuple[Any, ...]:
    rest = (None, None)
    q, k, indices, scale_tensor = ctx.saved_tensors
    x = _Inputs(q, k, indices, scale_tensor, ctx.scale)
    if d is None:
        return None, None, None, None, *rest
    if torch.is_grad_enabled():
        twice.check_asked_for(ctx.backend.removeprefix(ASIDE), True)
        leaf = None if scale_tensor is None else scale_tensor.view_as(scale_tensor)
        views = x._replace(q=q.view_as(q), k=k.view_as(k), scale_tensor=leaf)  # none is a function of another
        with checks.uncast(q):
            dq, dk, dscale = twice.gradients([_differentiable(views)], [d], views.differentiable, ctx.needs)
        return dq, dk, None, dscale, *rest
    upstream.refuse_batched(d)
    found = torch.ops.fused_nce.gathered_grads(*x, d, ctx.needs, ctx.backend)
    dq, dk, dscale = (
        g.to(leaf.dtype) if leaf is not None and need else None
        for g, leaf, need in zip(found, x.differentiable, ctx.needs, strict=True)
    )
    return dq, dk, None, dscale, *rest


def _differentiable(x: _Inputs) -> Tensor:
    """The scores in plain torch, a strip of rows at a time, each gathered anew wherever autograd needs it."""
    n, m = x.indices.shape
    strip = max(1, workspace.limit_bytes(x.q.device.type) // (4 * m * x.q.shape[1] * x.wide.itemsize))

    def rows(i: int) -> Tensor:
        part = slice(i, i + strip)
        return torch.bmm(x.k[x.indices[part]].to(x.wide), x.q[part, :, None].to(x.wide)).squeeze(2)

    parts = [checkpoint(rows, i, use_reentrant=False, preserve_rng_state=False) for i in range(0, n, strip)]
    return torch.cat(parts) * x.factor


torch.library.impl("fused_nce::gathered_scores", "CompositeExplicitAutograd", _scores, lib=_lib)
torch.library.impl("fused_nce::gathered_grads", "CompositeExplicitAutograd", _grads, lib=_lib)
torch.library.register_fake("fused_nce::gathered_scores", _fake_scores, lib=_lib)
torch.library.register_fake("fused_nce::gathered_grads", _fake_grads, lib=_lib)
torch.library.register_autograd("fused_nce::gathered_scores", _backward, setup_context=_setup, lib=_lib)


@register_flop_formula(torch.ops.fused_nce.gathered_scores)
def _scores_flop(q_shape: Any, k_shape: Any, indices_shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * indices_shape[0] * indices_shape[1] * q_shape[1])


@register_flop_formula(torch.ops.fused_nce.gathered_grads)
def _grads_flop(q_shape: Any, k_shape: Any, indices_shape: Any, *args: Any, **__: Any) -> int:
    return _scores_flop(q_shape, k_shape, indices_shape) * sum(args[-2])
