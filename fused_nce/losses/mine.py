"""MINE's loss (Belghazi et al. 2018, arXiv:1801.04062): the Donsker-Varadhan bound of a critic's scores, negated."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.losses.common import fixed_lse, fixed_mean, log_count, output, widened
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, features, register


def mine_dv(
    joint: Tensor,  # (P,)
    product: Tensor,  # (Q,)
    *,
    ema: float | Tensor | None = None,
) -> NCEOutput:
    """log mean_q e^(product_q) − mean_p joint_p, whose negative is a lower bound on the mutual information, in nats.

    The gradient of a batch's log-mean is biased, since it divides by that batch's own mean of e^T. `ema` replaces this
    divisor by a moving average (section 3.2); the value is the batch's all the same.

    Args:
        joint: (P,), scores of pairs that belong together; any float dtype.
        product: (Q,), scores of pairs drawn apart.
        ema: the log of the moving average of mean e^T, a number or a 0-d tensor; no gradient. `MINELoss` keeps one.

    Returns:
        NCEOutput; `stats` has pos_mean and mi_bound = −loss.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        mine_dv(torch.randn(8), torch.randn(64)).loss
        ```
    """
    _check_scores(joint, product)
    if ema is not None:
        checks.check_scale("ema", ema, joint.device)
    pos_mean, log_mean = fixed_mean(widened(joint)), _log_mean(product)
    if ema is not None:
        level = log_mean.detach()
        ratio = (level - (ema.detach() if isinstance(ema, Tensor) else ema)).exp()  # of the divisors
        ratio = ratio.clamp(max=torch.finfo(ratio.dtype).max)  # which ∞·0 would be a NaN of
        log_mean = level + ratio * (log_mean - level)
    loss = log_mean - pos_mean
    return output(loss, {"pos_mean": pos_mean, "mi_bound": -loss})


def _check_scores(joint: Tensor, product: Tensor) -> None:
    checks.check_tensor("joint", joint, ("P",))
    checks.check_tensor("product", product, ("Q",))
    if product.device != joint.device:
        raise ValueError(f"product: got device {product.device}, need joint's {joint.device}")


def _log_mean(product: Tensor) -> Tensor:
    """log mean e^product, 0-d."""
    total = fixed_lse(widened(product))
    return total - log_count(product.numel(), total)


class MINELoss(LossModule):
    """MINE's bound (`mine_dv`); with a rate it keeps the moving average of its gradient's denominator.

    Args:
        rate: of the moving average, 0 < rate < 1 (0.01 is usual); None for the batch's own mean.

    Shape:
        joint: (P,) scores of pairs that belong together.
        product: (Q,) scores of pairs that do not.

    Example:
        ```
        MINELoss(rate=0.01)(torch.randn(8), torch.randn(64)).loss
        ```

    Attributes:
        log_mean: 0-d, the log of the moving average, kept as a log so that no score overflows it.
        updates: 0-d int64, how many batches it has seen; both are saved in the state. A batch whose mean is not finite
            shows in the loss and leaves the average as it is.
    """

    log_mean: Tensor
    updates: Tensor

    def __init__(self, rate: float | None = None) -> None:
        super().__init__(rate=rate)
        if rate is not None:
            checks.check_number("rate", rate, above=0)
            if rate >= 1:
                raise ValueError(f"rate: got {rate!r}, need a number < 1")
        self.register_buffer("log_mean", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, joint: Tensor, product: Tensor) -> NCEOutput:
        """`mine_dv` of the batch."""
        if self.rate is None or not self.training:
            return mine_dv(joint, product)
        _check_scores(joint, product)  # a refused batch is no part of the average
        self._update(self.rate, product)
        return mine_dv(joint, product, ema=self.log_mean.clone())

    @torch.no_grad()
    def _update(self, rate: float, product: Tensor) -> None:
        """The batch's mean enters with weight `rate`; the first is taken whole."""
        batch = _log_mean(product).to(self.log_mean.dtype)
        mixed = torch.logaddexp(self.log_mean + math.log1p(-rate), batch + math.log(rate))
        found = torch.where(self.updates == 0, batch, mixed)
        self.log_mean.copy_(torch.where(batch.isfinite(), found, self.log_mean))
        self.updates.add_(batch.isfinite())


def oracle(joint: Tensor, product: Tensor) -> Tensor:
    """The loss as it is written."""
    return product.exp().mean().log() - joint.mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {"joint": 2 * features(seed, size.n), "product": 2 * features(seed + 1, size.m)}


register(
    Entry(
        mine_dv,
        MINELoss,
        "log mean_product e^T − mean_joint T",
        "Belghazi et al. 2018, arXiv:1801.04062",
        _draw,
        oracle,
        closed=True,
    )
)
