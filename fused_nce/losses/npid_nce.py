"""NPID by noise-contrastive estimation (Wu, Xiong, Yu, Lin 2018, arXiv:1805.01978, equations 4 to 7).

Instead of the whole bank's softmax, a constant Z and m noise images an image: is v_j the image's own, or one of m of
the n, drawn alike? The odds are e^(⟨v_j,f_i⟩/τ)/Z to m/n, each answer a logistic loss of Δ = s − log Z − log(m/n).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.gathered import gathered_scores
from fused_nce.losses.binary_nce import binary
from fused_nce.losses.common import exposed, fixed_lse, inverse, log_count
from fused_nce.losses.module import LossModule
from fused_nce.losses.npid import check_bank, proximal_to
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, places, register


def npid_nce(
    features: Tensor,  # (N, D)
    bank: Tensor,  # (n, D)
    indices: Tensor,  # (N,) int64
    noise: Tensor,  # (N, m) int64
    *,
    z: float | Tensor,
    temperature: float | Tensor = 0.07,
    proximal: float = 0.0,
    backend: str | None = None,
) -> NCEOutput:
    """mean_i softplus(−Δ_i) + Σ_j softplus(Δ_ij), the (N, m, D) sampled rows of the bank never held.

    The bank must not change before the backward.

    Args:
        features: (N, D), unit rows; float64, 32, 16 or bfloat16.
        bank: (n, D), a unit row an image, any float dtype; no gradient.
        indices: (N,) int64, each image's row of the bank. On a GPU one out of range gives a NaN.
        noise: (N, m) int64, the sampled rows, uniform over n; the image's own may be among them.
        z: Z > 0, the estimate of Σ_j e^(⟨v_j,f⟩/τ) over the bank, constant: no gradient. `NPIDNCELoss` makes one.
        temperature: of the scores, > 0; a 0-d tensor is learnable.
        proximal: λ >= 0 of λ·mean_i ‖f_i − v_i‖², which holds an image near where it last was (section 3.3).
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats, `penalty` being the proximal part; of untrained features about
        log(1 + m) + m·log(1 + 1/m). `stats` as of `binary_nce`: pos_mean (Δ_i), data_right and noise_right.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        features, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (8, 100))
        npid_nce(features, bank, torch.arange(8), torch.randint(100, (8, 20)), z=1000.0).loss
        ```
    """
    s = _scores(features, bank, indices, noise, temperature, backend)
    checks.check_scale("z", z, features.device, above=0)
    if isinstance(z, Tensor):
        return _nce(features, bank, indices, s, z.detach().to(s.dtype).log(), proximal)
    return _nce(features, bank, indices, s, math.log(z), proximal)


def _scores(
    features: Tensor,
    bank: Tensor,
    indices: Tensor,
    noise: Tensor,
    temperature: float | Tensor,
    backend: str | None,
) -> Tensor:
    """(N, 1 + m), the image's own first."""
    check_bank(features, bank, indices)
    checks.check_indices("noise", noise, features.shape[0], bank.shape[0], features.device)
    columns = torch.cat((indices[:, None], noise), dim=1)
    scale = inverse("temperature", temperature, features.device)
    return gathered_scores(features, bank.detach(), columns, scale=scale, backend=backend)


def _nce(
    features: Tensor, bank: Tensor, indices: Tensor, s: Tensor, log_z: float | Tensor, proximal: float
) -> NCEOutput:
    """The loss of the scores."""
    m = s.shape[1] - 1
    delta = exposed(s) - log_z - log_count(m / bank.shape[0], s)  # fault: npid-noise-if
    return proximal_to(binary(delta[:, 0], delta[:, 1:]), features, bank, indices, proximal)


class NPIDNCELoss(LossModule):
    """NPID's sampled loss (`npid_nce`): draws its noise and, if z is None, estimates Z from its first batch.

    Args:
        temperature: of the scores, > 0.
        m: noise images an image, drawn from torch's generator of the device.
        z: Z > 0; None for n·mean e^s over all scores of the first batch in training, frozen after.
        proximal: λ >= 0.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Shape:
        features: (N, D).
        bank: (n, D).
        indices: (N,) int64, the image of each row.
        noise: (N, m) int64, rows of the bank; drawn here if left out.

    Example:
        ```
        features, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (8, 100))
        NPIDNCELoss(m=20)(features, bank, torch.arange(8)).loss
        ```

    Attributes:
        log_z: 0-d, where no Z is given; saved in the state. NaN until it is known: a batch is then judged by its own.
    """

    log_z: Tensor

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        m: int = 4096,
        z: float | None = None,
        proximal: float = 0.0,
        backend: str | None = None,
    ) -> None:
        m = checks.checked_int("m", m, at_least=1)
        super().__init__(temperature=temperature, m=m, z=z, proximal=proximal, backend=backend)
        inverse("temperature", temperature, torch.device("cpu"))
        if z is not None:
            checks.check_number("z", z, above=0)
        checks.check_number("proximal", proximal, at_least=0)
        self.register_buffer("log_z", torch.tensor(math.nan))

    def forward(
        self,
        features: Tensor,  # (N, D)
        bank: Tensor,  # (n, D)
        indices: Tensor,  # (N,)
        noise: Tensor | None = None,  # (N, m)
    ) -> NCEOutput:
        """`npid_nce` of the batch, with `noise` where it is given."""
        checks.check_tensor("features", features, ("N", "D"))
        checks.check_tensor("bank", bank, ("n", "D"))
        if noise is None:
            noise = torch.randint(bank.shape[0], (features.shape[0], self.m), device=features.device)
        s = _scores(features, bank, indices, noise, self.temperature, self.backend)
        log_z = self._known(s.detach(), bank.shape[0]) if self.z is None else math.log(self.z)
        return _nce(features, bank, indices, s, log_z, self.proximal)

    @torch.no_grad()
    def _known(self, s: Tensor, n: int) -> Tensor:
        """log Z; of a batch that is not finite none is kept."""
        own = (fixed_lse(s) + log_count(n / s.numel(), s)).to(self.log_z.dtype)
        log_z = torch.where(self.log_z.isnan(), own, self.log_z)  # fault: npid-every-batch
        if self.training:
            self.log_z.copy_(torch.where(log_z.isfinite(), log_z, self.log_z))
        return log_z.to(s.dtype)


def oracle(
    features: Tensor,
    bank: Tensor,
    indices: Tensor,
    noise: Tensor,
    *,
    z: float | Tensor,
    temperature: float | Tensor = 0.07,
) -> Tensor:
    """The loss by the posteriors h = P / (P + m/n), as sigmoids of the log odds."""
    shift = math.log(z * noise.shape[1] / bank.shape[0])
    # Each its own scores: where a row's own is sampled too, its two weights are two roundings.
    own, others = (
        dense_scores(features, bank, 1 / temperature).gather(1, columns) - shift
        for columns in (indices[:, None], noise)
    )
    return -torch.cat((nn.functional.logsigmoid(own), nn.functional.logsigmoid(-others)), dim=1).sum(dim=1).mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "features": features(seed, size.n, size.d, unit=True),
        "bank": features(seed + 1, size.m, size.d, unit=True),
        "indices": places(seed + 2, size.m, size.n),
        "noise": places(seed + 3, size.m, size.n, size.p),
        "z": 60.0,
        "temperature": torch.tensor(0.2),
    }


register(
    Entry(
        npid_nce,
        NPIDNCELoss,
        "mean_i softplus(−Δ_i) + Σ_j softplus(Δ_ij), Δ = ⟨f_i, v_j⟩ / τ − log Z − log(m/n)",
        "Wu et al. 2018, arXiv:1805.01978",
        _draw,
        oracle,
        frozen=("bank",),
    )
)
