"""Input checks: before any work, one line each, naming the argument, the value seen and the value needed."""

from __future__ import annotations

import contextlib
import difflib
import math
import numbers
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_nce.core.spec import Bias, Block, Hardness, Identity, Index, Labels, Separate, Several, Spec, TanhClip
from fused_nce.core.statistics import STATISTIC

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CASTABLE = (torch.float32, torch.bfloat16, torch.float16)  # what `matmul` casts under autocast; float64 it leaves alone


def is_cast(x: Tensor) -> bool:
    """Under autocast, of which the meta device has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def uncast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Without autocast: a score never goes through 16 bits."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_tensor(name: str, x: Tensor, shape: tuple[str, ...]) -> None:
    """A dense float tensor of the given rank, e.g. ("N", "D").

    Raises:
        TypeError: not a tensor, a DTensor, sparse or quantized, or a dtype outside `DTYPES`.
        ValueError: another rank, or an empty dimension.
    """
    wanted = f"({', '.join(shape)}{',' * (len(shape) == 1)})"
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
        TypeError: two dtypes, unless autocast makes them one.
        ValueError: two devices or widths.
    """
    if a.dtype != b.dtype and not (is_cast(a) and {a.dtype, b.dtype} <= {*CASTABLE}):
        raise TypeError(
            f"{name_b}: got {b.dtype}, need {name_a}'s {a.dtype} (torch.autocast casts both, but for float64)"
        )
    if a.device != b.device:
        raise ValueError(f"{name_b}: got device {b.device}, need {name_a}'s {a.device}")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"{name_b}: got width D = {b.shape[-1]}, need {name_a}'s {a.shape[-1]}")


def check_number(
    name: str, value: float, *, above: float | None = None, at_least: float | None = None, others: str = ""
) -> None:
    """A finite number within a bound.

    Raises:
        TypeError: neither Python's nor NumPy's; bool is none.
        ValueError: NaN, infinite or out of bounds.
    """
    if not isinstance(value, (int, float)):
        value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, need a number (int, float or NumPy's){others}")
    need = "a finite number" + (
        f" > {above}" if above is not None else f" >= {at_least}" if at_least is not None else ""
    )
    low = (above is not None and not value > above) or (at_least is not None and not value >= at_least)
    if low or not -math.inf < value < math.inf:  # which the symbol of a traced graph can answer too
        raise ValueError(f"{name}: got {value!r}, need {need}")


def plain(value: Any) -> Any:
    """A number of NumPy's as Python's, which meets others unrounded and is written as it is; anything else as it is."""
    if type(value).__module__ != "numpy" or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def checked_items(name: str, value: Any) -> tuple[Any, ...]:
    """The items of a sequence, or of anything else that has some.

    Raises:
        TypeError: for what has none.
    """
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}: got {type(value).__name__}, need a sequence")
    return tuple(value)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """One of a few values.

    Raises:
        ValueError: anything else.
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, need one of {', '.join(map(repr, choices))}")


def check_names(owner: str, names: Iterable[str], known: Collection[str]) -> None:
    """Keywords among those that are known.

    Raises:
        TypeError: naming another one, and the known one that is most like it.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"{owner}: got {name}, need {near[0] if near else 'one of ' + ', '.join(known)}")


def check_scale(name: str, scale: float | Tensor, device: torch.device, *, above: float | None = None) -> None:
    """A finite number within a bound, or a 0-d float tensor on the inputs' device (never read on the host)."""
    if not isinstance(scale, Tensor):
        check_number(name, scale, above=above, others=" or a 0-d tensor")
    elif scale.dim() or not scale.is_floating_point():
        raise ValueError(f"{name}: got a {scale.dtype} tensor of shape {tuple(scale.shape)}, need a 0-d float tensor")
    elif scale.device != device:
        raise ValueError(f"{name}: got device {scale.device}, need the inputs' {device}")


def check_no_transform(name: str, x: object) -> None:
    """Not inside `torch.func`'s grad, vjp or jvp: the ops' gradients leave with the forward, and have no such rule.

    Raises:
        RuntimeError: for one.
    """
    if not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_batchedtensor(x):  # a vmap inside of them
        x = torch._C._functorch.get_unwrapped(x)
    if torch._C._functorch.is_gradtrackingtensor(x) and forward_ad.unpack_dual(x).tangent is None:
        raise RuntimeError(
            f"fused_nce: torch.func.grad, vjp and jacrev are not supported: got {name} from one, need torch.autograd"
        )
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"fused_nce: forward-mode differentiation (jvp) is not supported: {name} carries a tangent")


def checked_int(name: str, value: Any, *, at_least: float = -math.inf) -> int:
    """An int, NumPy's as Python's, or the symbol that stands for one while a graph is traced.

    Raises:
        TypeError: anything else; bool and float are not row numbers.
        ValueError: a smaller one than `at_least`.
    """
    if not isinstance(value, (int, torch.SymInt)):
        value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, need an int")
    if value < at_least:
        raise ValueError(f"{name}: got {value}, need >= {at_least}")
    return value  # type: ignore[return-value]


def check_ids(name: str, ids: Tensor | None, length: int, letter: str, device: torch.device) -> None:
    """int64 ids of rows or columns on the inputs' device.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: got {type(ids).__name__}, need a ({letter},) int64 tensor")
    if ids.dtype != torch.int64:
        raise TypeError(f"{name}: got {ids.dtype}, need int64")
    if ids.dim() != 1 or ids.shape[0] != length:
        raise ValueError(f"{name}: got shape {tuple(ids.shape)}, need ({letter},) = ({length},)")
    if ids.device != device:
        raise ValueError(f"{name}: got device {ids.device}, need the inputs' {device}")


def check_indices(name: str, indices: Tensor, n: int, m: int, device: torch.device) -> None:
    """(N, m) int64 row numbers below M. Only a CPU can look at them without waiting; elsewhere they give a NaN.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device, or an index out of range.
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: got {type(indices).__name__}, need a (N, m) int64 tensor")
    if indices.dtype != torch.int64:
        raise TypeError(f"{name}: got {indices.dtype}, need int64")
    if indices.dim() != 2 or indices.shape[0] != n or indices.shape[1] < 1:
        raise ValueError(f"{name}: got shape {tuple(indices.shape)}, need (N, m) = ({n}, m) with m >= 1")
    if indices.device != device:
        raise ValueError(f"{name}: got device {indices.device}, need the inputs' {device}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        check_within(name, indices, m)


def check_within(name: str, indices: Tensor, m: int) -> None:
    """Indices among M columns, before anything is indexed by them, where -1 would be the last.

    Only a CPU's are read, through `torch.vmap` too; a GPU checks its own, without a wait. Fake ones have no numbers.

    Raises:
        ValueError: for one out of range.
    """
    compiling = torch.compiler.is_compiling()
    while torch._C._functorch.is_batchedtensor(indices):
        if compiling:  # nothing looks into a compiled vmap
            return
        indices = torch._C._functorch.get_unwrapped(indices)
    if indices.device.type == "cpu" and not compiling:
        if type(indices) is Tensor and torch._C._len_torch_dispatch_stack() == 0:
            check_range(name, indices, m)
    else:
        torch._assert_async(((indices >= 0) & (indices < m)).all(), f"{name}: got others, need 0 <= index < M")


def is_wrong(wrong: Tensor, need: str) -> bool:
    """Whether any is, on a CPU, through `torch.vmap` too; a GPU looks by itself, without a wait, and says `need`."""
    compiling = torch.compiler.is_compiling()
    while torch._C._functorch.is_batchedtensor(wrong):
        if compiling:  # nothing looks into a compiled vmap
            return False
        wrong = torch._C._functorch.get_unwrapped(wrong)
    if wrong.device.type == "cpu" and not compiling:
        fake = type(wrong) is not Tensor or torch._C._len_torch_dispatch_stack() > 0
        return not fake and bool(wrong.any())
    torch._assert_async(~wrong.any(), need)
    return False


def is_batched(*tensors: Tensor) -> bool:
    """Whether any is a vmap's, of which no one element can be told in an error."""
    return any(torch._C._functorch.is_batchedtensor(x) for x in tensors)


def check_range(name: str, indices: Tensor, m: int) -> None:
    """As `check_within`, of numbers that can be read.

    Raises:
        ValueError: for one out of range.
    """
    low, high = (int(x) for x in torch.aminmax(indices))
    if low < 0 or high >= m:
        raise ValueError(f"{name}: got {low if low < 0 else high}, need 0 <= index < {m}")


def check_targets(targets: Tensor, m: int, itself: int | None) -> None:
    """Targets within the M columns. Reads them, so for the CPU alone: elsewhere one out of range gives its row a NaN.

    Args:
        targets: (N,) int64.
        m: columns M.
        itself: the column that row 0 is, where rows are left out; None where they are not.

    Raises:
        ValueError: for one out of range, or a row that is its own target and left out.
    """
    check_range("targets", targets, m)
    if itself is not None:
        own = targets == torch.arange(itself, itself + targets.shape[0])
        if own.any():
            row = int(own.to(torch.int64).argmax())
            raise ValueError(f"targets: got row {row} itself, which drop_self leaves out, need another column")


def check_statistics(spec: Spec) -> None:
    """Statistics beside those that they are derived from.

    Raises:
        ValueError: where one is missing, or none is named.
    """
    for names in (spec.stats, spec.columns):
        for name in names:
            missing = set(STATISTIC[name].reads) - set(names)
            if missing:
                raise ValueError(f"spec: got statistics {names}, need {', '.join(sorted(missing))} beside {name}")
    if not spec.stats:
        raise ValueError("spec: got no statistics, need at least one")


def check_scores(
    q: Tensor,
    k: Tensor | None,
    spec: Spec,
    scale: float | Tensor,
    offset: int,
    *,
    bias: float | Tensor | None = None,
    positives: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    ceilings: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Everything that the engine needs of one problem; `k` None is `q`."""
    check_tensor("q", q, ("N", "D"))
    if k is None:
        k = q
    check_tensor("k", k, ("M", "D"))
    if isinstance(spec.layout, (Separate, Index)) and not k.requires_grad:
        check_pair("q", q.to(k.dtype) if q.dtype != k.dtype else q, "k", k)  # a frozen bank may have its own dtype
    else:
        check_pair("q", q, "k", k)
    check_scale("scale", scale, q.device)
    checked_int("offset", offset)
    tensors = {"q": q, "k": k, "scale": scale, "bias": bias, "positives": positives}
    for name, x in tensors.items():
        check_no_transform(name, x)
    check_statistics(spec)
    if isinstance(spec.transform, TanhClip):
        check_number("clip", spec.transform.c, above=0)
    check_number("hardness", spec.hardness, at_least=0)
    if spec.hardness and not isinstance(scale, Tensor) and scale + spec.hardness == 0:
        raise ValueError(f"scale: got {scale} with hardness {spec.hardness}, need a sum that is not 0")
    if isinstance(spec.transform, Bias):
        check_scale("bias", 0.0 if bias is None else bias, q.device)
    elif bias is not None:
        raise ValueError(f"bias: got one with {spec.transform.code}, need the transform Bias()")
    _check_prefixes(q, spec)
    _check_layout(q, k, spec, offset, positives, row_ids, column_ids)
    _check_filters(q, k, spec, ceilings, guide)


def _check_prefixes(q: Tensor, spec: Spec) -> None:
    """Ascending widths, and what they go with."""
    if not spec.prefixes:
        return
    if (
        list(spec.prefixes) != sorted(set(spec.prefixes))
        or not 1 <= spec.prefixes[0] <= spec.prefixes[-1] <= q.shape[1]
    ):
        raise ValueError(f"prefixes: got {spec.prefixes}, need ascending widths from 1 to D = {q.shape[1]}")
    if spec.columns or spec.whole_rows or not isinstance(spec.transform, (Identity, TanhClip, Hardness)):
        seen = f"{spec.transform.code}, stats {spec.stats} and columns {spec.columns}"
        raise ValueError(
            f"prefixes: got them with {seen}, need an identity, a clip or hardness, and statistics of rows that merge"
        )


def _check_filters(
    q: Tensor, k: Tensor, spec: Spec, ceilings: Tensor | None, guide: tuple[Tensor, Tensor] | None
) -> None:
    """What the filters read, in the accumulation dtype."""
    if not spec.filters and (ceilings is not None or guide is not None):
        raise ValueError(f"{'guide' if ceilings is None else 'ceilings'}: got one without filters, need None")
    if not spec.filters:
        return
    wide, (n, m) = torch.promote_types(q.dtype, torch.float32), (q.shape[0], k.shape[0])
    if spec.distance:
        raise ValueError(f"spec: got filters {spec.filters} with {spec.transform.code}, need scores of dot products")
    if ("guide" in spec.filters) != (guide is not None):
        raise ValueError(f"guide: got {'none' if guide is None else 'one'} with the filters {spec.filters}, need both")
    given = [("ceilings", ceilings, (spec.n_widths * len(spec.filters), n), "(F, N)")]
    if guide is not None:
        width = guide[0].shape[-1]
        given += [("guide rows", guide[0], (n, width), "(N, G)"), ("guide columns", guide[1], (m, width), "(M, G)")]
    for name, x, shape, letters in given:
        check_tensor(name, x, ("N", "D"))  # type: ignore[arg-type]
        if x.shape != shape or x.device != q.device or x.dtype != wide:  # type: ignore[union-attr]
            seen = f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"  # type: ignore[union-attr]
            raise ValueError(f"{name}: got {seen}, need {wide} of {letters} = {shape} on {q.device}")


def _check_layout(
    q: Tensor,
    k: Tensor,
    spec: Spec,
    offset: int,
    positives: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> None:
    n, m, layout = q.shape[0], k.shape[0], spec.layout
    given = {"positives": positives, "row_ids": row_ids, "column_ids": column_ids}
    names = {Separate: ("positives",), Labels: ("row_ids", "column_ids"), Index: ("row_ids",), Several: ("row_ids",)}
    wanted = names.get(type(layout), ())
    for name, x in given.items():
        if x is not None and name not in wanted:
            raise ValueError(f"{name}: got a tensor with the layout {layout.code}, need None")
    if isinstance(layout, Separate):
        check_tensor("positives", positives, ("N", "P"))  # type: ignore[arg-type]
        if positives.shape != (n, spec.n_widths * layout.p) or positives.device != q.device:  # type: ignore[union-attr]
            seen = f"shape {tuple(positives.shape)} on {positives.device}"  # type: ignore[union-attr]
            raise ValueError(f"positives: got {seen}, need (N, P) = {(n, spec.n_widths * layout.p)} on {q.device}")
    if isinstance(layout, Several):
        if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64 or row_ids.shape != (n, layout.p):
            seen = f"{row_ids.dtype} {tuple(row_ids.shape)}" if isinstance(row_ids, Tensor) else type(row_ids).__name__
            raise ValueError(f"row_ids: got {seen}, need int64 of (N, p) = {(n, layout.p)}")
    elif "row_ids" in wanted:
        check_ids("targets" if isinstance(layout, Index) else "row_ids", row_ids, n, "N", q.device)
    if "column_ids" in wanted:
        check_ids("column_ids", column_ids, m, "M", q.device)
    if not isinstance(layout, Block):
        if spec.drop_self and not 0 <= offset <= m - n:
            raise ValueError(f"offset: got {offset} with N = {n} rows of M = {m}, need 0 <= offset <= {m - n}")
        return
    n_c, per_image = layout.n_c, layout.rows_per_image
    if n_c < 1 or m % n_c:
        raise ValueError(f"k: got M = {m}, need a multiple of n_c = {n_c}")
    if per_image < 1 or n % per_image:
        raise ValueError(f"q: got N = {n}, need a multiple of rows_per_image = {per_image}")
    if spec.drop_self and n_c != per_image:
        raise ValueError(f"spec: got n_c = {n_c}, rows_per_image = {per_image}, need the same of both to drop the self")
    images, owned = m // n_c, n // per_image
    if offset < 0 or offset + owned > images:
        raise ValueError(f"offset: got {offset} with {owned} images of rows, need 0 <= offset <= {images - owned}")
