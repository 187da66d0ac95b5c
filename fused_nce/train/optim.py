"""Adam and its schedule."""

import math

import torch
from torch import nn

from fused_nce.train.config import OptimConfig


def adam(model: nn.Module, config: OptimConfig) -> torch.optim.Adam:
    """One fused Adam over everything, the online classifiers included, with weight decay in the gradient."""
    return torch.optim.Adam(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, update: int, updates_per_epoch: int) -> float:
    """The rate of an update (from 0): linear warm-up times the schedule.

    A function of the update alone, so that a resumed run needs no scheduler state.
    """
    warm = min(1.0, (update + 1) / config.warmup_updates) if config.warmup_updates else 1.0
    return config.lr * warm * _decay(config, update, updates_per_epoch)


def _decay(config: OptimConfig, update: int, updates_per_epoch: int) -> float:
    if config.schedule == "step":
        passed = sum(update >= milestone * updates_per_epoch for milestone in config.milestones)
        return config.gamma**passed
    if config.schedule == "cosine":
        total = config.epochs * updates_per_epoch
        start = min(config.warmup_updates, total - 1)
        progress = min(1.0, max(0.0, (update - start) / (total - start)))
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
