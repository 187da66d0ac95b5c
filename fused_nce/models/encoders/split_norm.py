"""BatchNorm over parts of a batch: what several processes have each by itself, on one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Each of `splits` consecutive parts of the batch is normalised by its own statistics, in training.

    The running statistics move once a pass, towards the mean of the parts'. Parameters and names are `BatchNorm2d`'s.
    """

    splits: int = 1

    def forward(
        self,
        x: Tensor,  # (B, C, H, W)
    ) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(f"batch: must be a multiple of the {self.splits} splits, got {len(x)}")
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or self.momentum is None:
            raise ValueError("SplitBatchNorm2d: needs running statistics with a momentum")
        means, variances = ([old.clone() for _ in range(self.splits)] for old in (mean, var))
        parts = [
            F.batch_norm(part, m, v, self.weight, self.bias, True, self.momentum, self.eps)
            for part, m, v in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        mean.copy_(torch.stack(means).mean(0))
        var.copy_(torch.stack(variances).mean(0))
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return torch.cat(parts)


def split_batch_norm(model: nn.Module, splits: int) -> None:
    """Turn every `BatchNorm2d` of a model into one over `splits` parts, in place; the state keeps its keys."""
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SplitBatchNorm2d
            layer.splits = splits  # type: ignore[assignment]
