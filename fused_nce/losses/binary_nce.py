"""Noise-contrastive estimation of an unnormalised model (Gutmann, Hyvärinen 2010; Mnih, Teh 2012, arXiv:1206.6426).

Is a word of the data or of k samples of a noise distribution q? The model's odds are e^s / (k·q), its normalisation
being fixed to 1: each answer is a logistic loss of Δ = s − log(k·q).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.statistics import softplus
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.common import check_same, fixed_mean, output, widened
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, features, register


def binary_nce(
    data_scores: Tensor,  # (N,)
    noise_scores: Tensor,  # (N, k)
    log_kq_data: Tensor,  # (N,)
    log_kq_noise: Tensor,  # (N, k)
) -> NCEOutput:
    """mean_i (softplus(−Δ_i) + Σ_k softplus(Δ_ik)), Δ = s − log(k·q): a sum over the noise, a mean over the data.

    Args:
        data_scores: (N,), log of the unnormalised model at the data; any float dtype.
        noise_scores: (N, k), at k noise samples of each.
        log_kq_data: (N,), log of k times the noise's density at the data.
        log_kq_noise: (N, k), at the noise.

    Returns:
        NCEOutput, in nats; odds of 1 to 1 everywhere give (1 + k)·log 2. `stats` has pos_mean, the mean Δ of the data,
        and data_right and noise_right, the shares on the right side of 0.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        data, noise = torch.randn(8), torch.randn(8, 5)
        binary_nce(data, noise, torch.zeros(8), torch.zeros(8, 5)).loss
        ```
    """
    checks.check_tensor("data_scores", data_scores, ("N",))
    checks.check_tensor("noise_scores", noise_scores, ("N", "k"))
    if noise_scores.shape[0] != data_scores.shape[0]:
        raise ValueError(f"noise_scores: got N = {noise_scores.shape[0]}, need data_scores's {data_scores.shape[0]}")
    checks.check_tensor("log_kq_data", log_kq_data, ("N",))
    checks.check_tensor("log_kq_noise", log_kq_noise, ("N", "k"))
    check_same("log_kq_data", log_kq_data, "data_scores", data_scores)
    check_same("log_kq_noise", log_kq_noise, "noise_scores", noise_scores)
    return binary(widened(data_scores) - widened(log_kq_data), widened(noise_scores) - widened(log_kq_noise))


def binary(
    data: Tensor,  # (N,)
    noise: Tensor,  # (N, k)
) -> NCEOutput:
    """The loss of log odds Δ, wide."""
    loss = fixed_mean(softplus(-data)) + fixed_sum(softplus(noise)) / noise.shape[0]
    stats = {
        "pos_mean": fixed_mean(data),
        "data_right": fixed_mean((data > 0).to(data.dtype)),
        "noise_right": fixed_mean((noise < 0).to(noise.dtype)),
    }
    return output(loss, stats)


class BinaryNCELoss(nn.Module):
    """Noise-contrastive estimation as binary classification (`binary_nce`).

    Shape:
        data_scores, log_kq_data: (N,).
        noise_scores, log_kq_noise: (N, k).

    Example:
        ```
        data, noise = torch.randn(8), torch.randn(8, 5)
        BinaryNCELoss()(data, noise, torch.zeros(8), torch.zeros(8, 5)).loss
        ```
    """

    def forward(
        self, data_scores: Tensor, noise_scores: Tensor, log_kq_data: Tensor, log_kq_noise: Tensor
    ) -> NCEOutput:
        """`binary_nce` of the batch."""
        return binary_nce(data_scores, noise_scores, log_kq_data, log_kq_noise)


def oracle(data_scores: Tensor, noise_scores: Tensor, log_kq_data: Tensor, log_kq_noise: Tensor) -> Tensor:
    """The loss by the posteriors, P(data) = e^s / (e^s + k·q), as sigmoids of the log odds."""
    data = nn.functional.logsigmoid(data_scores - log_kq_data)
    noise = nn.functional.logsigmoid(log_kq_noise - noise_scores)
    return -(data + noise.sum(dim=1)).mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    n, k = size.n, size.p
    return {
        "data_scores": features(seed, n),
        "noise_scores": features(seed + 1, n, k),
        "log_kq_data": features(seed + 2, n) - 1,
        "log_kq_noise": features(seed + 3, n, k) - 1,
    }


register(
    Entry(
        binary_nce,
        BinaryNCELoss,
        "mean_i softplus(−Δ_i) + Σ_k softplus(Δ_ik), Δ = s − log kq",
        "Gutmann, Hyvärinen 2010; Mnih, Teh 2012, arXiv:1206.6426",
        _draw,
        oracle,
        closed=True,
    )
)
