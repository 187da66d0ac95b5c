"""The optimizers and their schedule."""

import math
from typing import Any

import torch
from torch import nn

from fused_nce.train.settings import OptimConfig
from fused_nce.train.sharding import is_sharded


def build(module: nn.Module, config: OptimConfig, *, without: nn.Module | None = None) -> torch.optim.Optimizer:
    """One over all that is trained, the online classifiers included, with weight decay in the gradient.

    Args:
        module: what is trained.
        config: the settings.
        without: a part of it that has an optimizer of its own.
    """
    apart = {id(p) for p in without.parameters()} if without is not None else set()
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [{"params": trained}]
    if not config.decay_all:
        groups = [{"params": [p for p in trained if p.dim() > 1]}]
        groups += [{"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0, "trust": None}]
    shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "lars":
        return LARS(groups, **shared, momentum=config.momentum, trust=config.trust)
    if config.name == "sgd":
        whole = not any(map(is_sharded, trained))  # torch's fused SGD knows no sharded weights
        return torch.optim.SGD(groups, **shared, momentum=config.momentum, fused=whole)
    return torch.optim.Adam(groups, **shared, betas=config.betas, eps=config.eps, fused=True)  # fault: adamw-adam


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
