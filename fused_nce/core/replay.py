"""A forward pass made a second time, to be differentiated: same random draws, and no trace in running statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint


class Draws(NamedTuple):
    """The state of the generators that a module on a device draws from."""

    cpu: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Draws:
        """As they stand."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        """Go on from there."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


Buffers = list[tuple[nn.Module, dict[str, torch.Tensor | None]]]


def copied(modules: Iterable[nn.Module]) -> Buffers:
    """Copies of each one's own buffers, one of a tensor that several have; what has no shape yet is left out."""
    copies: dict[int, torch.Tensor] = {}

    def copy(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is not None and id(x) not in copies:
            copies[id(x)] = x.detach().clone()
        return None if x is None else copies[id(x)]

    return [(m, {k: copy(x) for k, x in m._buffers.items() if x is None or not is_lazy(x)}) for m in modules]


@contextmanager
def swapped(copies: Buffers) -> Iterator[None]:
    """Copies move in the buffers' place: the operations, and what they save for the backward, are the first pass's."""
    kept = [dict(m._buffers) for m, _ in copies]
    for m, held in copies:
        m._buffers |= held
    try:
        yield
    finally:
        for (m, _), own in zip(copies, kept, strict=True):
            m._buffers |= own


def untracked(module: nn.Module) -> AbstractContextManager[None]:
    """BatchNorm normalises as it would, and its running statistics stay: they have seen this batch already."""
    return swapped(copied(m for m in module.modules() if isinstance(m, _BatchNorm) and m.training))


def checkpointed(module: nn.Module) -> None:
    """Keep of each pass through a module its inputs alone, and make the rest once more in the backward.

    In place; its parameters and their names stay. Numbers are those of the plain module.
    """
    plain = module.forward

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), untracked(module)

    def forward(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts)

    module.forward = forward
