"""What several losses do before the engine: check a temperature, normalise rows, and the dense parts of oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce.core import checks


def inverse(name: str, temperature: float | Tensor, device: torch.device) -> float | Tensor:
    """1 / temperature, checked; a 0-d tensor stays differentiable and is never read on the host.

    Raises:
        TypeError, ValueError: not a number > 0, or a tensor that is not a 0-d float one on the inputs' device.
    """
    if isinstance(temperature, Tensor):
        checks.check_scale(name, temperature, device)
        return temperature.reciprocal()
    checks.check_number(name, temperature, above=0)
    return 1 / temperature


def normalized(x: Tensor) -> Tensor:
    """Rows of unit norm, in x's dtype; the norm in float32 at least. A zero row stays zero."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1).to(x.dtype)


def check_rows(name_a: str, a: Tensor, name_b: str, b: Tensor, *, same_n: bool) -> None:
    """Two (N, D) tensors that a score can be taken of; under autocast they may differ in dtype.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    checks.check_tensor(name_a, a, ("N", "D"))
    checks.check_tensor(name_b, b, ("N" if same_n else "M", "D"))
    checks.check_pair(name_a, a, name_b, b)
    if same_n and a.shape[0] != b.shape[0]:
        raise ValueError(f"{name_b}: got N = {b.shape[0]}, need {name_a}'s {a.shape[0]}")


def dense_nce(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """−log(e^pos / (e^pos + Σ_neg e^s)) of every True of `positive`, in row order; masks (N, M) bool."""
    others = s.masked_fill(~negative, float("-inf")).logsumexp(dim=1, keepdim=True).expand_as(s)[positive]
    return torch.logaddexp(others, s[positive]) - s[positive]
