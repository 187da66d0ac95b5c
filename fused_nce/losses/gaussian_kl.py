"""The variational upper bound on the information that a Gaussian code keeps (Kingma, Welling 2014, arXiv:1312.6114).

I(X; C) <= E_x KL(N(μ(x), σ²(x)) ‖ N(0, 1)), the code's divergence from a standard normal marginal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.common import check_same, output, widened
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, features, register


def gaussian_kl(
    mu: Tensor,  # (N, D)
    logvar: Tensor,  # (N, D)
) -> NCEOutput:
    """mean_i ½ Σ_d (σ² + μ² − 1 − log σ²)_id, an upper bound on the information in nats, to be minimised.

    Args:
        mu: (N, D), the codes' means; any float dtype.
        logvar: (N, D), log σ².

    Returns:
        NCEOutput; `stats` has mi_bound = loss.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        gaussian_kl(torch.randn(8, 4), torch.zeros(8, 4)).loss
        ```
    """
    checks.check_tensor("mu", mu, ("N", "D"))
    checks.check_tensor("logvar", logvar, ("N", "D"))
    check_same("logvar", logvar, "mu", mu)
    m, v = widened(mu), widened(logvar)
    # Near σ = 1, where a code says nothing, σ² − 1 would lose the digits that log σ² still has.
    each = m.square() + (torch.expm1(v) - v)
    loss = fixed_sum(each) / (2 * mu.shape[0])
    return output(loss, {"mi_bound": loss})


class GaussianKLLoss(nn.Module):
    """The divergence of diagonal Gaussians from the standard one (`gaussian_kl`).

    Shape:
        mu, logvar: (N, D).

    Example:
        ```
        GaussianKLLoss()(torch.randn(8, 4), torch.zeros(8, 4)).loss
        ```
    """

    def forward(self, mu: Tensor, logvar: Tensor) -> NCEOutput:
        """`gaussian_kl` of the batch."""
        return gaussian_kl(mu, logvar)


def oracle(mu: Tensor, logvar: Tensor) -> Tensor:
    """The loss by torch's own distributions."""
    code = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    return torch.distributions.kl_divergence(code, prior).sum(dim=1).mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {"mu": features(seed, size.n, size.d), "logvar": features(seed + 1, size.n, size.d)}


register(
    Entry(
        gaussian_kl,
        GaussianKLLoss,
        "mean_i ½ Σ_d (σ² + μ² − 1 − log σ²)",
        "Kingma, Welling 2014, arXiv:1312.6114",
        _draw,
        oracle,
        closed=True,
    )
)
