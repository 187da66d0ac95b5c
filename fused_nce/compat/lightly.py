"""lightly's `NTXentLoss`, `DCLLoss` and `DCLWLoss` (lightly.loss, 1.6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_nce.compat.base import Adapter, inverse, number
from fused_nce.compat.processes import everyone
from fused_nce.core import checks
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.group import gathered
from fused_nce.core.tails import Nce
from fused_nce.losses.common import check_rows, fixed_mean, normalized, widened
from fused_nce.losses.moco import SPEC as BANK
from fused_nce.losses.nt_xent import SPEC as TWINS

SMALLEST_TEMPERATURE = 1e-8


def _check_temperature(name: str, temperature: float) -> None:
    checks.check_number(name, temperature)
    if abs(temperature) < SMALLEST_TEMPERATURE:
        raise ValueError(f"{name}: got {temperature!r}, need |temperature| >= {SMALLEST_TEMPERATURE}")


class _Views(Adapter):
    """A loss of two views of N images, whose negatives may be of all processes."""

    SHOWN = ("temperature", "gather_distributed")

    def __init__(self, temperature: float | Tensor, gather_distributed: bool) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature, _check_temperature)
        self.gather_distributed = gather_distributed
        if gather_distributed and not torch.distributed.is_available():
            raise ValueError("gather_distributed: got True, need a torch with torch.distributed")


class MemoryBank(Adapter):
    """lightly's bank of the last K rows, which keeps those of a batch that wraps around its end (upstream drops them).

    It stays on its device and in its dtype, whatever the rows' are.

    Args:
        size: (K, D), or 0 for none.

    Attributes:
        bank: (K, D) unit rows, random at first.
        bank_ptr: (1,) int64, where the next row goes. A state has both in its metadata, not in its keys.
    """

    CARRIED = ("bank", "bank_ptr")
    FORMERLY: ClassVar[dict[str, str]] = {"bank": "keys", "bank_ptr": "pointer"}  # keys of this package's older states
    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if not (self.size == (0,) or len(self.size) == 2) or min(self.size) < 0:
            raise ValueError(f"memory_bank_size: got {size!r}, need (K, D), or 0 for no bank")
        rows = torch.randn(self.size) if self.size[0] else torch.empty(self.size)
        self.register_buffer("bank", normalized(rows), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)

    @property
    def keys(self) -> Tensor:
        """`bank`, by a `MemoryQueue`'s name."""
        return self.bank

    @property
    def pointer(self) -> Tensor:
        """`bank_ptr`, 0-d."""
        return self.bank_ptr[0]

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Put (N, D) rows in, over the oldest; of more than K the last K stay."""
        kept = rows[-self.size[0] :].to(self.bank)
        first = self.bank_ptr + (len(rows) - len(kept))
        slots = (first + torch.arange(len(kept), device=self.bank.device)) % self.size[0]
        self.bank.index_copy_(0, slots, kept)
        self.bank_ptr.copy_((self.bank_ptr + len(rows)) % self.size[0])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        for name, formerly in self.FORMERLY.items():
            value = state_dict.pop(prefix + formerly, None)
            if value is not None:
                local_metadata = {**local_metadata, name: value.reshape(getattr(self, name).shape)}
        state_dict.pop(f"{prefix}fill", None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


class NTXentLoss(_Views):
    """NT-Xent of two views, or, with a memory bank, of view 0 among its twin and the bank.

    Args:
        temperature: of the softmax; any sign, |temperature| >= 1e-8; a 0-d tensor may be learned.
        memory_bank_size: (K, D) of the `MemoryBank`; 0 for none.
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
        super().__init__(temperature, gather_distributed)
        self.memory_bank = MemoryBank(memory_bank_size)

    def forward(
        self,
        out0: Tensor,  # (N, D)
        out1: Tensor,  # (N, D)
    ) -> Tensor:
        """The mean loss in nats, 0-d. Rows are normalised here; the bank takes in view 1 if view 0 has a gradient."""
        check_rows("out0", out0, "out1", out1, same_n=True)
        z0, z1 = normalized(out0), normalized(out1)
        if not self.memory_bank.size[0]:
            z, group = torch.stack((z0, z1), dim=1).flatten(0, 1), everyone() if self.gather_distributed else None
            return tile_loss(z, None, TWINS, Nce(), scale=inverse(self.temperature, z), group=group).loss
        loss = self._against_bank(z0, z1, self.memory_bank)
        # fault: lightly-bank-moves
        if z0.requires_grad:  # the loss has its gradients: the bank may change under it
            # fault: processes-lightly-bank
            self.memory_bank.update(gathered(z1) if self.gather_distributed else z1.detach())
        return loss

    def _against_bank(self, z0: Tensor, z1: Tensor, memory: MemoryBank) -> Tensor:
        """−log(e^(s⁺) / (e^(s⁺) + Σ_bank e^s)), differentiable in both views through s⁺."""
        if z0.shape[1] != memory.size[1]:
            raise ValueError(f"out0: got width D = {z0.shape[1]}, need the memory bank's {memory.size[1]}")
        scale = inverse(self.temperature, z0)
        wide = torch.promote_types(torch.promote_types(z0.dtype, z1.dtype), torch.float32)
        with checks.uncast(z0):
            positives = scale * (z0.to(wide) * z1.to(wide)).sum(dim=1, keepdim=True)
        bank = memory.bank.to(z0.device)
        return tile_loss(z0, bank, BANK, Nce(), scale=scale, positives=positives, parts=False).loss


WeightFunction = Callable[[Tensor, Tensor], Tensor]


def negative_mises_fisher_weights(
    out0: Tensor,  # (N, D)
    out1: Tensor,  # (N, D)
    sigma: float = 0.5,
) -> Tensor:
    """2 − N·softmax(⟨out0, out1⟩ / sigma), (N,), without a gradient: pairs that agree already count for less."""
    with checks.uncast(out0):
        similarity = (widened(out0.detach()) * widened(out1.detach())).sum(dim=1) / sigma
    return 2 - len(out0) * similarity.softmax(dim=0)


class DCLLoss(_Views):
    """NT-Xent without the positive in the denominator (Yeh et al. 2022, arXiv:2110.06848, equation 6).

    Its gradients cannot leave with the forward, for a weight may depend on the whole batch: four GEMMs.

    Args:
        temperature: of the softmax, |temperature| >= 1e-8.
        weight_fn: (normalised view, the other) to the (N,) weights of the positive terms; None for 1.
        gather_distributed: negatives of all processes, as in `NTXentLoss`. Weights are of each process's own rows.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    HOOKS = ("_loss",)

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: WeightFunction | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, gather_distributed)
        self.weight_fn = weight_fn

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
        # fault: processes-decoupled-loss
        found = tile_stats(z, None, TWINS, scale=inverse(self.temperature, z), group=group)
        positive = found["pos"].squeeze(1)
        if self.weight_fn is not None:
            weights = [self.weight_fn(z0, z1), self.weight_fn(z1, z0)]
            positive = positive * torch.stack(weights, dim=1).flatten()  # fault: decoupled-loss-weights
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
