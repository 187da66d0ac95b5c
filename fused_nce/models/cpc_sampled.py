"""CPC against a few sampled negatives, in plain torch: each prediction has columns of its own, which no GEMM shares.

Greedy InfoMax's code (Löwe et al. 2019) draws 10 for audio and 16 for images. All of the batch, `CPCLoss`, is both more
negatives and, a sweep of tiles instead of gathered rows, less time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_nce.losses import NCEOutput
from fused_nce.losses.common import output, widened


class SampledCPCLoss(nn.Module):
    """−log(e^(s_ii) / (e^(s_ii) + Σ_j e^(s_ij))), mean over predictions, j drawn with replacement from all but i.

    The sum is over the sample as it is: the loss has log(1 + count) at chance, not log N.

    Args:
        count: negatives of each prediction.

    Raises:
        ValueError: for a count below 1.
    """

    def __init__(self, count: int = 10) -> None:
        super().__init__()
        if count < 1:
            raise ValueError(f"sampled: must be at least 1, got {count}")
        self.count = count

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"count={self.count}"

    def forward(
        self,
        predictions: Tensor,  # (1, N, D)
        targets: Tensor,  # (1, N, D)
        drawn: Tensor | None = None,  # (N, count) int64, of the targets; drawn here if left out
    ) -> NCEOutput:
        """The loss of a step; N·count·D numbers are gathered.

        Raises:
            ValueError: for a single target, which has no negative.
        """
        n = targets.shape[1]
        if n < 2:
            raise ValueError(f"targets: got N = {n}, need at least 2: one has no negatives")
        if drawn is None:
            drawn = torch.randint(n - 1, (n, self.count), device=targets.device)
            drawn = drawn + (drawn >= torch.arange(n, device=targets.device)[:, None])
        with torch.autocast(targets.device.type, enabled=False):  # a score never goes through 16 bits
            q, k = widened(predictions[0]), widened(targets[0])
            own = (q * k).sum(1)
            others = torch.einsum("nd,nsd->ns", q, k[drawn])
            every = torch.logsumexp(torch.cat((own[:, None], others), 1), 1)
            loss = (every - own).mean()
            top1 = (own > others.amax(1)).to(own.dtype).mean()
        chance = math.log(1 + self.count)
        stats = {"top1": top1, "pos_mean": own.mean(), "nce_minus_chance": loss - chance, "mi_bound": chance - loss}
        return output(loss, stats)
