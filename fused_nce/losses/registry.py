"""Every loss with its oracle and an example: what the tests, the benchmark and the docs' table are generated from.

An entry is the loss's own file saying what it must equal. A test draws the example, runs the function on each backend
and dtype, and holds value and gradients to the oracle's within the error budget; nothing is written for a loss twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_nce.losses.output import NCEOutput


class Size(NamedTuple):
    """How large an example is; a loss takes of it what it has."""

    n: int = 6  # rows: images, positions, features; 2 at the least
    m: int = 11  # what they are compared with besides each other: a bank, a queue, pairs drawn apart
    d: int = 5  # width
    p: int = 3  # of a row: locations, steps, samples


SMALL = Size()
"""What a dense oracle takes at once, with all its second derivatives."""


@dataclass(frozen=True)
class Entry:
    """One loss.

    Attributes:
        function: returns an `NCEOutput`; takes `backend=`, unless closed.
        module: its `nn.Module` twin.
        formula: one line, for the table.
        source: paper, with its arXiv id or year.
        draw: seed and size to keyword arguments of `function`, float32 tensors and static options. The float tensors
            are the differentiable inputs but where `frozen` names them.
        oracle: the same arguments, float64, to the loss, dense and in plain torch; it scores by `dense_scores`.
        frozen: arguments without a gradient.
        two_paths: arguments whose gradient is a sum of several, each rounded to their dtype: an op's and torch's own.
        paths: how many at most.
        closed: plain torch, linear in its inputs' size: no scores of pairs, so no `dense_scores` and no backend.
        stopped: its gradient holds a part of the value still, so differences of values are not it.
        kinked: its slope jumps, at a hinge or between two scores that are the highest.
    """

    function: Callable[..., NCEOutput]
    module: type[nn.Module]
    formula: str
    source: str
    draw: Callable[[int, Size], dict[str, Any]]
    oracle: Callable[..., Tensor]
    frozen: tuple[str, ...] = ()
    two_paths: tuple[str, ...] = ()
    paths: int = 2
    closed: bool = False
    stopped: bool = False
    kinked: bool = False

    @property
    def name(self) -> str:
        """Of the function."""
        return self.function.__name__

    def example(self, seed: int, size: Size = SMALL) -> dict[str, Any]:
        """One of this size; the same seed and size draw the same numbers."""
        return self.draw(seed, size)

    def differentiable(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Those of the inputs that have a gradient."""
        floats = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
        return {name: x for name, x in floats.items() if name not in self.frozen}


LOSSES: dict[str, Entry] = {}
"""By name, with a variant behind a slash: `info_nce/symmetric`."""


def register(entry: Entry, variant: str = "") -> None:
    """Add a loss, or another example of one."""
    LOSSES[f"{entry.name}/{variant}" if variant else entry.name] = entry


def dense_scores(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """s = scale·q kᵀ, (N, M): where a test lets in the error that a score may have."""
    return scale * (q @ k.T)


def features(seed: int, *shape: int, unit: bool = False) -> Tensor:
    """Normal features, each row of unit norm if asked; on the CPU, float32."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(x, dim=-1) if unit else x


def ids(seed: int, n: int, kinds: int) -> Tensor:
    """(n,) int64 of as many kinds at most, a negative one among them; on the CPU."""
    return torch.randint(-1, kinds - 1, (n,), generator=torch.Generator().manual_seed(seed))


def places(seed: int, columns: int, *shape: int) -> Tensor:
    """int64 in 0 .. columns - 1, some more than once; on the CPU."""
    return torch.randint(columns, shape, generator=torch.Generator().manual_seed(seed))
