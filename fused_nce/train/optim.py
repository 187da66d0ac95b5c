"""The optimizers and their schedule."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.train.machine.host import use_bf16
from fused_nce.train.saving import sharding
from fused_nce.train.settings import OptimConfig


def build(
    module: nn.Module,
    config: OptimConfig,
    *,
    name: str = "optimizer",
    without: nn.Module | None = None,
    precision: str = "fp32",
) -> dict[str, torch.optim.Optimizer]:
    """One over all that is trained, the online classifiers included, by `name`; Muon has Adam beside it, `name`-adam.

    Args:
        module: what is trained.
        config: the settings.
        name: what the optimizer is called in a checkpoint.
        without: a part of the module that has an optimizer of its own.
        precision: of the products within Muon, as the method's setting.
    """
    apart = {id(p) for p in without.parameters()} if without is not None else set()
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    if config.name == "muon":
        matrices, rest = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
        dtype = torch.bfloat16 if use_bf16(precision, matrices[0].device) else torch.float32
        shared: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
        adam = replace(config, name="adam", weight_decay=config.weight_decay if config.decay_all else 0.0)
        return {name: Muon(matrices, **shared, dtype=dtype)} | ({f"{name}-adam": _of(rest, adam)} if rest else {})
    return {name: _of(trained, config)}


def _of(trained: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": trained}]
    if not config.decay_all:
        groups = [{"params": [p for p in trained if p.dim() > 1]}]
        groups += [{"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "trust": None}]
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "lars":
        return LARS(groups, **shared, momentum=config.momentum, trust=config.trust)
    if config.name == "sgd":
        whole = not any(map(sharding.is_sharded, trained))  # torch's fused SGD knows no sharded weights
        return torch.optim.SGD(groups, **shared, momentum=config.momentum, fused=whole)
    return torch.optim.Adam(groups, **shared, betas=config.betas, eps=config.eps, fused=True)  # fault: adamw-adam


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, each weight as a matrix of (its first side, all the rest) (Jordan et al. 2024).

    `v ← μv + g`, `w ← (1 − lr·λ)·w − lr·0.2·√max(rows, columns)·O(g + μv)`: O brings the singular values near 1, and
    the factor gives an update the size of Adam's, whose rate it takes (Liu et al. 2025, arXiv:2502.16982, section 2.2).
    `torch.optim.Muon` is this without kernels of convolutions, and in bfloat16 whatever the hardware.

    Args:
        params: parameters of two dimensions or more, or groups of them.
        lr: learning rate.
        momentum: μ.
        weight_decay: λ.
        dtype: of the products.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; a parameter without a gradient stays."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                velocity = self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                ahead = p.grad.add(velocity, alpha=group["momentum"]).flatten(1)  # fault: muon-nesterov
                size = 0.2 * math.sqrt(max(ahead.shape))  # fault: muon-size
                update = sharding.placed(_orthogonal(ahead, group["dtype"]).view(p.shape), p)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * size)
        return loss


def _orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """U·S·Vᵀ of (M, N), with each singular value of 0.002 of the Frobenius norm or more brought to 0.68 to 1.2.

    Five steps of y ← 3.4445·y − 4.7750·(y·yᵀ)·y + 2.0315·(y·yᵀ)²·y.
    """
    tall = x.shape[0] > x.shape[1]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return (y.mT if tall else y).to(x.dtype)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate follows each weight's own size (You, Gitman, Ginsburg 2017, arXiv:1708.03888).

    `v ← μv + lr·r·(g + λw)`, `w ← w − v`, `r = trust·|w| / |g + λw|` for each tensor, as SimCLR has it (1 where either
    norm is 0). torch has none.

    Args:
        params: parameters or groups; a group with `trust=None` has r = 1.
        lr: learning rate.
        momentum: μ.
        weight_decay: λ.
        trust: trust coefficient.
    """

    def __init__(
        self, params: Any, *, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float | None = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; a parameter without a gradient stays."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad.add(p, alpha=group["weight_decay"])
                if group["trust"] is not None:
                    own, other = p.norm(), update.norm()  # fault: lars-ratio-without
                    ratio = group["trust"] * own / other
                    update = update * torch.where((own > 0) & (other > 0), ratio, 1.0)
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                velocity = self.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(velocity)
        return loss


def updates(config: OptimConfig, batches_per_epoch: int) -> int:
    """Of all epochs together: an epoch whose batches `accumulate` does not divide goes on in the next one's update."""
    return config.epochs * batches_per_epoch // config.accumulate


def learning_rate(config: OptimConfig, update: int, batches_per_epoch: int) -> float:
    """The rate of an update (from 0): linear warm-up times the schedule.

    A function of the update alone, so that a resumed run needs no scheduler state.
    """
    # fault: warm-up-starts-rate
    warm = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    return config.lr * warm * _decay(config, update, batches_per_epoch)


def _decay(config: OptimConfig, update: int, batches_per_epoch: int) -> float:
    if config.schedule == "step":
        batch = update * config.accumulate
        passed = sum(batch >= milestone * batches_per_epoch for milestone in config.milestones)
        return config.gamma**passed
    if config.schedule == "cosine":
        total = updates(config, batches_per_epoch)
        start = min(config.warmup_updates, total - 1)
        progress = min(1.0, max(0.0, (update - start) / (total - start)))
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
