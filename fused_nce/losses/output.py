"""What every loss of the package returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_nce.core.parts import no_number


@no_number
class NCEOutput(NamedTuple):
    """A loss and its parts, each differentiable where a function says nothing else."""

    loss: Tensor  # 0-d: nce (its mean under reduction="none") + penalty
    nce: Tensor  # 0-d, or its elements under reduction="none"
    penalty: Tensor  # 0-d: λ·mean(s²)
    stats: dict[str, Tensor]  # 0-d each, detached, for logging: top1, pos_mean, …
