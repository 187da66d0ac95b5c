"""What several losses do before the engine: check a temperature, normalise rows, and the dense parts of oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import as_matmul, normalized, widened  # noqa: F401  (what losses do themselves)
from fused_nce.core.statistics import poison
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.output import NCEOutput

LARGEST = torch.finfo(torch.float32).max


def inverse(name: str, temperature: float | Tensor, device: torch.device) -> float | Tensor:
    """1 / temperature, checked; a 0-d tensor stays differentiable and is never read on the host.

    Raises:
        TypeError, ValueError: not a number > 0 whose inverse float32 holds, or a tensor that is no 0-d float one on the
            inputs' device.
    """
    checks.check_scale(name, temperature, device, above=0)
    if isinstance(temperature, Tensor):
        return widened(temperature).reciprocal()  # of 16 bits, it would be rounded to 16
    if 1 / float(temperature) > LARGEST:
        raise ValueError(f"{name}: got {temperature!r}, need a number whose inverse float32 holds")
    return 1 / float(temperature)


def row_dots(q: Tensor, k: Tensor) -> Tensor:
    """⟨q_i, k_i⟩, (N,), or, of (N, H, D), ⟨q_i, k_ih⟩, (N, H): as `matmul` would cast them, in float32 at least."""
    q, k = widened(as_matmul(q)), widened(as_matmul(k))
    return ((q if k.dim() == 2 else q[:, None]) * k).sum(dim=-1)


def fixed_mean(x: Tensor) -> Tensor:
    """Mean of all elements, 0-d, in `fixed_sum`'s order."""
    return fixed_sum(x) / x.numel()


def fixed_lse(x: Tensor) -> Tensor:
    """log Σ e^x of all elements, 0-d, in `fixed_sum`'s order."""
    top = x.detach().amax()
    return top + fixed_sum((x - top).exp()).log()


def log_count(n: float, like: Tensor) -> Tensor:
    """log n of a size or a ratio of sizes, 0-d: `math.log` would be a constant, each batch size a graph of its own."""
    return torch.full((), n, dtype=torch.float64, device=like.device).log().to(like.dtype)


def exposed(s: Tensor) -> Tensor:
    """(N, m) scores; a row with a NaN or Inf becomes NaN throughout, or logsigmoid(±Inf) would give a finite loss."""
    return s * (1 + poison(s))[:, None]


def output(loss: Tensor, stats: dict[str, Tensor]) -> NCEOutput:
    """A loss of one part, without a penalty; the stats are detached here."""
    return NCEOutput(loss, loss, torch.zeros_like(loss), {name: x.detach() for name, x in stats.items()})


def check_rows(name_a: str, a: Tensor, name_b: str, b: Tensor, *, same_n: bool, other: str = "") -> None:
    """Two (N, D) tensors that a score can be taken of; under autocast they may differ in dtype.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    checks.check_tensor(name_a, a, ("N", "D"))
    checks.check_tensor(name_b, b, ("N" if same_n else "M", "D"))
    checks.check_pair(name_a, a, name_b, b)
    if same_n and a.shape[0] != b.shape[0]:
        raise ValueError(f"{name_b}: got N = {b.shape[0]}, need {name_a}'s {a.shape[0]}{other}")


def check_same(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Two tensors of one shape and device; they are widened before they meet, so dtypes may differ.

    Raises:
        ValueError: naming the argument, the value seen and the value needed.
    """
    if a.shape != b.shape:
        raise ValueError(f"{name_a}: got shape {tuple(a.shape)}, need {name_b}'s {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"{name_a}: got device {a.device}, need {name_b}'s {b.device}")


def dense_distances(s: Tensor) -> Tensor:
    """‖x_i − x_j‖² from (N, N) dot products, whose diagonal holds the norms; 0 on it."""
    square = s.diagonal()
    return (square[:, None] + square - 2 * s).masked_fill(torch.eye(len(s), dtype=torch.bool), 0.0)


def masked_lse(s: Tensor, mask: Tensor) -> Tensor:
    """LSE over the last dimension where the mask is True; of nothing −1e4 and more: as good as log 0, with a slope."""
    return torch.where(mask, s, -1e4).logsumexp(dim=-1)


def dense_nce(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """−log(e^pos / (e^pos + Σ_neg e^s)) of every True of `positive`, in row order; masks (N, M) bool.

    As a logistic loss of the difference, whose slope keeps its digits where p − 1 has none left.
    """
    others = masked_lse(s, negative)[:, None].expand_as(s)
    return -torch.nn.functional.logsigmoid(s[positive] - others[positive])
