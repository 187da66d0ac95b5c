"""lightly's `NTXentLoss` (lightly.loss.NTXentLoss, 1.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import tile_loss
from fused_nce.core.tails import Nce
from fused_nce.losses.common import check_rows, normalized
from fused_nce.losses.moco import SPEC as BANK
from fused_nce.losses.nt_xent import SPEC as TWINS
from fused_nce.losses.queue import MemoryQueue

SMALLEST_TEMPERATURE = 1e-8


class NTXentLoss(nn.Module):
    """NT-Xent of two views, or, with a memory bank, of view 0 among its twin and the bank.

    The bank is a `MemoryQueue`: it keeps the rows of a batch that wraps around its end, and is saved in the state. A
    state without it, as upstream's is, loads too and leaves the bank as it stands.

    Args:
        temperature: of the softmax; any sign, |temperature| >= 1e-8.
        memory_bank_size: (K, D) of the bank; 0 for none.
        gather_distributed: negatives of all processes; refused where there are several.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
        NotImplementedError: at a call with `gather_distributed` among several processes.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        checks.check_number("temperature", temperature)
        if abs(temperature) < SMALLEST_TEMPERATURE:
            raise ValueError(f"temperature: got {temperature!r}, need |temperature| >= {SMALLEST_TEMPERATURE}")
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
        if self.gather_distributed and _world_size() > 1:
            raise NotImplementedError(
                f"gather_distributed: got True among {_world_size()} processes, need False: "
                "no negatives cross processes yet"
            )
        z0, z1 = normalized(out0), normalized(out1)
        if self.memory_bank is None:
            z = torch.stack((z0, z1), dim=1).flatten(0, 1)
            return tile_loss(z, None, TWINS, Nce(), scale=1 / self.temperature).loss
        loss = self._against_bank(z0, z1, self.memory_bank)
        if out0.requires_grad:  # the loss has its gradients: the bank may change under it
            self.memory_bank.update(z1.detach())
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


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
