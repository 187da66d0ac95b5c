"""Tensors of every process, side by side, with an exact gradient.

`gather` puts the processes' rows one after the other, so that what belongs together stays a plain offset. Its backward
is the adjoint: every process gets the sum of what all of them owe its rows. With DDP's averaging, the mean of the
processes' losses then has the gradient of one process on the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ReduceScatterOptions

from fused_nce.core.distributed.processes import Seen, agree, finish
from fused_nce.core.group import Peers, named_group

_lib = torch.library.Library("fused_nce", "FRAGMENT")
# The exchange of sizes as a node that data flows through: a compiler neither drops it nor moves it.
_lib.define(
    "agreed(Tensor x, SymInt[] sizes, str[] names, str group, float timeout_s) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _agreed(x: Tensor, sizes: list[int], names: list[str], group: str, timeout_s: float) -> Tensor:
    seen: dict[str, int | str] = dict(zip(names, sizes, strict=False))
    texts = dict(pair.split(" = ", 1) for pair in names[len(sizes) :])  # they stand after the numbers
    agree(group, timeout_s, seen | texts)
    return x.clone(memory_format=torch.contiguous_format)


def _agreed_fake(x: Tensor, sizes: Any, names: Any, group: str, timeout_s: float) -> Tensor:
    return x.new_empty(x.shape)


torch.library.impl("fused_nce::agreed", "CompositeExplicitAutograd", _agreed, lib=_lib)
torch.library.register_fake("fused_nce::agreed", _agreed_fake, lib=_lib)


def gather(xs: Sequence[Tensor], peers: Peers, seen: Seen | None) -> list[Tensor]:
    """Each (n, ...) tensor as the (size·n, ...) of all processes, by rank; floating ones are differentiable.

    Args:
        xs: contiguous or not, of the same shapes and dtypes on every process.
        peers: the processes.
        seen: what to agree on before, numbers before texts, that tell of every shape in `xs`; None where
            the processes have agreed already.

    Raises:
        ValueError: the processes disagree; all of them raise it.
        ProcessLostError: one does not come.
    """
    first, *rest = xs
    how = (peers.name, peers.size, peers.timeout_s, peers.wire_dtype)
    return [_Gather.apply(first, *how, seen), *(_Gather.apply(x, *how, None) for x in rest)]


class _Gather(torch.autograd.Function):
    """(n, ...) to (size·n, ...)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, size: int, timeout_s: float, wire: torch.dtype | None, seen: Seen | None
    ) -> Tensor:
        ctx.how = (name, size, timeout_s, wire)
        sent = _on_wire(x, wire)
        if torch.compiler.is_compiling():
            if seen is not None:
                numbers = {key: value for key, value in seen.items() if not isinstance(value, str)}
                texts = [f"{key} = {value}" for key, value in seen.items() if isinstance(value, str)]
                sent = torch.ops.fused_nce.agreed(sent, list(numbers.values()), [*numbers, *texts], name, timeout_s)
            return _functional("all_gather_into_tensor", sent, size, name).to(x.dtype)
        if seen is not None:
            agree(name, timeout_s, seen)
        out = sent.new_empty(size * sent.shape[0], *sent.shape[1:])
        on_host = sent.device.type == "cpu"
        finish("all-gather", timeout_s, lambda: named_group(name)._allgather_base(out, sent), host=on_host)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return _Scatter.apply(upstream[0], *ctx.how), None, None, None, None, None


class _Scatter(torch.autograd.Function):
    """(size·n, ...) to (n, ...): each process's rows, summed over the processes."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, name: str, size: int, timeout_s: float, wire: torch.dtype | None) -> Tensor:
        ctx.how = (name, size, timeout_s, wire)
        sent, on_host = _on_wire(g, wire), g.device.type == "cpu"
        shape = (g.shape[0] // size, *g.shape[1:])
        if sent.dtype.itemsize < 4:
            # A reduce-scatter would add in 16 bits, size times. The same bytes, each process adding its own in float32:
            if torch.compiler.is_compiling():
                parts = [shape[0]] * size
                got = _functional("all_to_all_single", sent, parts, parts, name)
            else:
                got = torch.empty_like(sent)
                finish(
                    "all-to-all", timeout_s, lambda: named_group(name).alltoall_base(got, sent, [], []), host=on_host
                )
            return got.view(size, *shape).sum(dim=0, dtype=torch.float32).to(g.dtype)
        if torch.compiler.is_compiling():
            return _functional("reduce_scatter_tensor", sent, "sum", size, name).to(g.dtype)
        out = sent.new_empty(shape)
        finish("reduce-scatter", timeout_s, lambda: _reduce_scatter(name, out, sent), host=on_host)
        return out.to(g.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        return _Gather.apply(upstream[0], *ctx.how, None), None, None, None, None


def _on_wire(x: Tensor, wire: torch.dtype | None) -> Tensor:
    """Contiguous, in the dtype of the wire; ids travel as they are."""
    return (x.to(wire) if wire is not None and x.is_floating_point() else x).contiguous()


def _reduce_scatter(name: str, out: Tensor, x: Tensor) -> Any:
    """Sum, started."""
    return named_group(name)._reduce_scatter_base(out, x, ReduceScatterOptions())


def _functional(op: str, *args: Any) -> Tensor:
    """A functional collective, which a compiler can trace, and its end."""
    ops = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(getattr(ops, op)(*args))
    return out
