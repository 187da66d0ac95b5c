"""BatchNorm over parts of a batch: on one process, what each of several processes would compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Each of `splits` consecutive parts of the batch is normalised by its own statistics, in training.

    The running statistics move once a pass, towards the mean of the parts'. Parameters and names are `BatchNorm2d`'s.
    A batch that the splits do not divide has parts that differ by one image.
    """

    splits: int = 1

    def forward(
        self,
        x: Tensor,  # (B, C, H, W)
    ) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean, var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if mean is None or var is None or count is None:
            raise ValueError("SplitBatchNorm2d: needs running statistics, got track_running_stats=False")
        count.add_(1)
        step = 1 / int(count) if self.momentum is None else self.momentum  # None is the plain mean over the passes
        k = min(self.splits, len(x))
        # `tensor_split` would be slices, and each slice's gradient is a map of the whole batch.
        pieces = x.split([(len(x) + i) // k for i in reversed(range(k))])  # the first are the larger ones
        means, variances = ([old.clone() for _ in pieces] for old in (mean, var))
        parts = [
            F.batch_norm(piece, m, v, self.weight, self.bias, True, step, self.eps)
            for piece, m, v in zip(pieces, means, variances, strict=True)
        ]
        mean.copy_(torch.stack(means).mean(0))  # fault: split-batchnorm-keeps
        var.copy_(torch.stack(variances).mean(0))
        return torch.cat(parts)


def split_batch_norm(model: nn.Module, splits: int) -> None:
    """Turn every `BatchNorm2d` of a model into one over `splits` parts, in place; the state keeps its keys."""
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SplitBatchNorm2d
            layer.splits = splits  # type: ignore[assignment]
