"""Input checks: before any work, one line each, naming the argument, the value seen and the value needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_nce.core.spec import Spec, TanhClip

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # what `matmul` casts under autocast; float64 it leaves alone


def check_tensor(name: str, x: Tensor, shape: tuple[str, ...]) -> None:
    """A dense float tensor of the given rank, e.g. ("N", "D").

    Raises:
        TypeError: not a tensor, a DTensor, sparse or quantized, or a dtype outside `DTYPES`.
        ValueError: another rank, or an empty dimension.
    """
    wanted = f"({', '.join(shape)})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, need a {wanted} tensor")
    if type(x).__name__ == "DTensor":
        raise TypeError(f"{name}: got a DTensor, need a local {wanted} tensor (x.to_local() or x.full_tensor())")
    if x.layout != torch.strided or x.is_quantized:
        raise TypeError(f"{name}: got layout {x.layout} ({x.dtype}), need a dense {wanted} tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, need float64, float32, bfloat16 or float16")
    if x.dim() != len(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, need {wanted}")
    for size, letter in zip(x.shape, shape, strict=True):
        if size == 0:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, need {wanted} with {letter} >= 1")


def check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Two tensors of one dtype, device and last dimension.

    Raises:
        TypeError: two dtypes (outside autocast).
        ValueError: two devices or widths.
    """
    if a.dtype != b.dtype:
        raise TypeError(f"{name_b}: got {b.dtype}, need {name_a}'s {a.dtype} (torch.autocast casts both)")
    if a.device != b.device:
        raise ValueError(f"{name_b}: got device {b.device}, need {name_a}'s {a.device}")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{name_b}: got width D = {b.shape[-1]}, need {name_a}'s {a.shape[-1]}")


def check_number(name: str, value: float, *, above: float | None = None, at_least: float | None = None) -> None:
    """A finite Python number within a bound.

    Raises:
        TypeError: not a number.
        ValueError: NaN, infinite or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, need a number")
    need = "a finite number" + (
        f" > {above}" if above is not None else f" >= {at_least}" if at_least is not None else ""
    )
    low = (above is not None and not value > above) or (at_least is not None and not value >= at_least)
    if not math.isfinite(value) or low:
        raise ValueError(f"{name}: got {value!r}, need {need}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """One of a few values.

    Raises:
        ValueError: anything else.
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, need one of {', '.join(map(repr, choices))}")


def check_scale(name: str, scale: float | Tensor, device: torch.device) -> None:
    """A finite number, or a 0-d float tensor on the inputs' device (never read on the host)."""
    if not isinstance(scale, Tensor):
        check_number(name, scale)
    elif scale.dim() or not scale.is_floating_point():
        raise ValueError(f"{name}: got a {scale.dtype} tensor of shape {tuple(scale.shape)}, need a 0-d float tensor")
    elif scale.device != device:
        raise ValueError(f"{name}: got device {scale.device}, need the inputs' {device}")


def check_no_tangent(name: str, x: object) -> None:
    """Not a forward-mode dual: the ops would drop its tangent in silence.

    Raises:
        RuntimeError: for one.
    """
    if isinstance(x, Tensor) and not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"fused_nce: forward-mode differentiation (jvp) is not supported: {name} carries a tangent")


def check_scores(q: Tensor, k: Tensor, spec: Spec, scale: float | Tensor, offset: int) -> None:
    """Everything that the engine needs of one problem."""
    check_tensor("q", q, ("N", "D"))
    check_tensor("k", k, ("M", "D"))
    check_pair("q", q, "k", k)
    check_scale("scale", scale, q.device)
    for name, x in (("q", q), ("k", k), ("scale", scale)):
        check_no_tangent(name, x)
    if isinstance(spec.transform, TanhClip):
        check_number("clip", spec.transform.c, above=0)
    n_c, per_image = spec.layout.n_c, spec.layout.rows_per_image
    if n_c < 1 or k.shape[0] % n_c:
        raise ValueError(f"k: got M = {k.shape[0]}, need a multiple of n_c = {n_c}")
    if per_image < 1 or q.shape[0] % per_image:
        raise ValueError(f"q: got N = {q.shape[0]}, need a multiple of rows_per_image = {per_image}")
    images, owned = k.shape[0] // n_c, q.shape[0] // per_image
    if offset < 0 or offset + owned > images:
        raise ValueError(f"offset: got {offset} with {owned} images of rows, need 0 <= offset <= {images - owned}")
