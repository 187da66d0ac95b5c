"""CLUB's upper bound on the mutual information (Cheng et al. 2020, arXiv:2006.12013).

mean_i log q(y_i|x_i) − mean_ij log q(y_j|x_i), q a Gaussian of diagonal covariance whose mean and variance a network
gives from x. Its normalisation is the same in both terms, and the mean over j of (y_j − μ_i)² needs only the mean and
the variance of y: the N² pairs cost O(N·D).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.common import check_same, fixed_mean, output, widened
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, features, register


def club(
    y: Tensor,  # (N, D)
    mu: Tensor,  # (N, D)
    logvar: Tensor,  # (N, D)
) -> NCEOutput:
    """mean_i log q(y_i|x_i) − mean_ij log q(y_j|x_i), q(·|x_i) = N(μ_i, σ²_i), in nats, to be minimised.

    It bounds the information from above while q is close to the true conditional: between its steps, q is fitted to
    matched pairs alone, by `torch.nn.functional.gaussian_nll_loss(mu, y, logvar.exp())`.

    Args:
        y: (N, D); any float dtype.
        mu: (N, D), q's means given x.
        logvar: (N, D), log σ² given x.

    Returns:
        NCEOutput; `stats` has mi_bound = loss and `log_likelihood`, mean_i log q(y_i|x_i), which tells how well q fits.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        club(torch.randn(8, 4), mu=torch.zeros(8, 4), logvar=torch.zeros(8, 4)).loss
        ```
    """
    for name, x in (("y", y), ("mu", mu), ("logvar", logvar)):
        checks.check_tensor(name, x, ("N", "D"))
        check_same(name, x, "y", y)
    t, m, v = (widened(x) for x in (y, mu, logvar))
    centre = t.mean(dim=0).detach()  # of both: far from 0, sums of them would cancel
    t, m = t - centre, m - centre
    inverse = torch.exp(-v)
    mean = t.mean(dim=0)
    centred = t - mean
    # (y_i − μ_i)² − mean_j (y_j − μ_i)², without the difference of two squares.
    excess = centred * (t + mean - 2 * m) - centred.square().mean(dim=0)
    loss = fixed_sum(-0.5 * inverse * excess) / y.shape[0]
    with torch.no_grad():
        density = -0.5 * fixed_mean((t - m).square() * inverse + v + math.log(2 * math.pi)) * y.shape[1]
    return output(loss, {"mi_bound": loss, "log_likelihood": density})


class CLUBLoss(nn.Module):
    """CLUB, an upper bound on the information of x and y (`club`).

    Shape:
        y, mu, logvar: (N, D), y and the Gaussian that predicts it from x.

    Example:
        ```
        CLUBLoss()(torch.randn(8, 4), torch.zeros(8, 4), torch.zeros(8, 4)).loss
        ```
    """

    def forward(self, y: Tensor, mu: Tensor, logvar: Tensor) -> NCEOutput:
        """`club` of the batch."""
        return club(y, mu, logvar)


def oracle(y: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The loss from all N² densities."""
    q = torch.distributions.Normal(mu[:, None], (logvar / 2).exp()[:, None])
    s = q.log_prob(y[None]).sum(dim=2)  # (N, N) log q(y_j|x_i)
    return s.diagonal().mean() - s.mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    x = features(seed, 3, size.n, size.d)
    return {"y": x[0] + 0.5 * x[1], "mu": x[0], "logvar": 0.5 * x[2]}


register(
    Entry(
        club,
        CLUBLoss,
        "mean_i log q(y_i|x_i) − mean_ij log q(y_j|x_i)",
        "Cheng et al. 2020, arXiv:2006.12013",
        _draw,
        oracle,
        closed=True,
    )
)
