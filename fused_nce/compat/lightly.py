"""lightly's `NTXentLoss`, `DCLLoss` and `DCLWLoss` (lightly.loss, 1.6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.compat.processes import everyone, gathered
from fused_nce.core import checks
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.tails import Nce
from fused_nce.losses.common import check_rows, fixed_mean, normalized, widened
from fused_nce.losses.moco import SPEC as BANK
from fused_nce.losses.nt_xent import SPEC as TWINS
from fused_nce.losses.queue import MemoryQueue

SMALLEST_TEMPERATURE = 1e-8


def _check_temperature(temperature: float) -> None:
    checks.check_number("temperature", temperature)
    if abs(temperature) < SMALLEST_TEMPERATURE:
        raise ValueError(f"temperature: got {temperature!r}, need |temperature| >= {SMALLEST_TEMPERATURE}")


class NTXentLoss(nn.Module):
    """NT-Xent of two views, or, with a memory bank, of view 0 among its twin and the bank.

    The bank is a `MemoryQueue`: it keeps the rows of a batch that wraps around its end, and is saved in the state. A
    state without it, as upstream's is, loads too and leaves the bank as it stands.

    Args:
        temperature: of the softmax; any sign, |temperature| >= 1e-8.
        memory_bank_size: (K, D) of the bank; 0 for none.
        gather_distributed: negatives of all processes, whose rows the bank then takes in too. A process reports its own
            part of the loss; under DDP every gradient is the whole batch's.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        sizes = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if not (sizes == (0,) or len(sizes) == 2) or min(sizes) < 0:
            raise ValueError(f"memory_bank_size: got {memory_bank_size!r}, need (K, D), or 0 for no bank")
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.memory_bank = MemoryQueue(*sizes) if sizes[0] else None

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"

    def forward(
        self,
        out0: Tensor,  # (N, D)
        out1: Tensor,  # (N, D)
    ) -> Tensor:
        """The mean loss in nats, 0-d. Rows are normalised here; the bank takes in view 1 if view 0 has a gradient."""
        check_rows("out0", out0, "out1", out1, same_n=True)
        z0, z1 = normalized(out0), normalized(out1)
        if self.memory_bank is None:
            z, group = torch.stack((z0, z1), dim=1).flatten(0, 1), everyone() if self.gather_distributed else None
            return tile_loss(z, None, TWINS, Nce(), scale=1 / self.temperature, group=group).loss
        loss = self._against_bank(z0, z1, self.memory_bank)
        if out0.requires_grad:  # the loss has its gradients: the bank may change under it
            self.memory_bank.update(gathered(z1) if self.gather_distributed else z1.detach())
        return loss

    def _against_bank(self, z0: Tensor, z1: Tensor, bank: MemoryQueue) -> Tensor:
        """−log(e^(s⁺) / (e^(s⁺) + Σ_bank e^s)), differentiable in both views through s⁺."""
        if z0.shape[1] != bank.dim:
            raise ValueError(f"out0: got width D = {z0.shape[1]}, need the memory bank's {bank.dim}")
        scale = 1 / self.temperature
        wide = torch.promote_types(torch.promote_types(z0.dtype, z1.dtype), torch.float32)
        with torch.autocast(z0.device.type, enabled=False):  # a score never goes through 16 bits
            positives = scale * (z0.to(wide) * z1.to(wide)).sum(dim=1, keepdim=True)
        return tile_loss(z0, bank.keys, BANK, Nce(), scale=scale, positives=positives, parts=False).loss

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Upstream saves no bank: the one that is there stands in."""
        if self.memory_bank is not None:
            for name, value in self.memory_bank.state_dict(prefix=f"{prefix}memory_bank.").items():
                state_dict.setdefault(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)


WeightFunction = Callable[[Tensor, Tensor], Tensor]


def negative_mises_fisher_weights(
    out0: Tensor,  # (N, D)
    out1: Tensor,  # (N, D)
    sigma: float = 0.5,
) -> Tensor:
    """2 − N·softmax(⟨out0, out1⟩ / sigma), (N,), without a gradient: pairs that agree already count for less."""
    with torch.autocast(out0.device.type, enabled=False):
        similarity = (widened(out0.detach()) * widened(out1.detach())).sum(dim=1) / sigma
    return 2 - len(out0) * similarity.softmax(dim=0)


class DCLLoss(nn.Module):
    """NT-Xent without the positive in the denominator (Yeh et al. 2022, arXiv:2110.06848, equation 6).

    Its gradients cannot leave with the forward, for a weight may depend on the whole batch: four GEMMs.

    Args:
        temperature: of the softmax, |temperature| >= 1e-8.
        weight_fn: (normalised view, the other) to the (N,) weights of the positive terms; None for 1.
        gather_distributed: negatives of all processes, as in `NTXentLoss`. Weights are of each process's own rows.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: WeightFunction | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.weight_fn, self.gather_distributed = temperature, weight_fn, gather_distributed

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"

    def forward(
        self,
        out0: Tensor,  # (N, D)
        out1: Tensor,  # (N, D)
    ) -> Tensor:
        """mean(LSE of the other images' rows − weight·s⁺) over both views, in nats, 0-d. Rows are normalised here."""
        check_rows("out0", out0, "out1", out1, same_n=True)
        group = everyone() if self.gather_distributed else None
        if len(out0) < 2 and group is None:
            raise ValueError("out0: got N = 1, need N >= 2: one image has no negatives, and log 0 is no loss")
        z0, z1 = normalized(out0), normalized(out1)
        z = torch.stack((z0, z1), dim=1).flatten(0, 1)
        found = tile_stats(z, None, TWINS, scale=1 / self.temperature, group=group)
        positive = found["pos"].squeeze(1)
        if self.weight_fn is not None:
            weights = [self.weight_fn(z0, z1), self.weight_fn(z1, z0)]
            positive = positive * torch.stack(weights, dim=1).flatten()
        return fixed_mean(found["neg_lse"] - positive)


class DCLWLoss(DCLLoss):
    """`DCLLoss` with the paper's weights (`negative_mises_fisher_weights`).

    Args:
        temperature: of the softmax, |temperature| >= 1e-8.
        sigma: of the weights' softmax.
        gather_distributed: as in `DCLLoss`.
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        super().__init__(temperature, partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)
