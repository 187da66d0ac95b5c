"""NPID's non-parametric softmax (Wu, Xiong, Yu, Lin 2018, arXiv:1805.01978, equation 2): every image its own class.

The classes' vectors are a memory bank of unit features, one an image: −log(e^(⟨v_i,f⟩/τ) / Σ_j e^(⟨v_j,f⟩/τ)), exact
over all of it. The bank has no gradient: two GEMMs, the fewest there can be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.spec import Index, Spec
from fused_nce.core.tails import Nce, fixed_sum
from fused_nce.losses.common import dense_nce, inverse, widened
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, places, register
from fused_nce.losses.registry import features as random_features

SPEC = Spec(Index(), stats=Nce().stats)
TAIL = Nce()


def npid_softmax(
    features: Tensor,  # (N, D)
    bank: Tensor,  # (n, D)
    indices: Tensor,  # (N,) int64
    *,
    temperature: float | Tensor = 0.07,
    proximal: float = 0.0,
    backend: str | None = None,
) -> NCEOutput:
    """mean_i −log softmax_j(⟨f_i, v_j⟩ / temperature)_indices(i) over the whole bank, the (N, n) logits never held.

    The bank may be written to before the backward: the gradients have left with the forward. `nce` is thus detached.

    Args:
        features: (N, D), unit rows; float64, 32, 16 or bfloat16.
        bank: (n, D), a unit row an image, any float dtype; no gradient.
        indices: (N,) int64, each image's row of the bank. On a GPU one out of range gives a NaN.
        temperature: of the softmax, > 0; a 0-d tensor is learnable.
        proximal: λ >= 0 of λ·mean_i ‖f_i − v_i‖², which holds an image near where it last was (section 3.3).
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats, `penalty` being the proximal part; chance is log n. `stats["top1"]` is the share of images
        that choose themselves.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        features, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (8, 100))
        npid_softmax(features, bank, torch.arange(8)).loss
        ```
    """
    check_bank(features, bank, indices)
    scale = inverse("temperature", temperature, features.device)
    parts = loss_of(features, bank.detach(), SPEC, TAIL, scale=scale, row_ids=indices, parts=False, backend=backend)
    found = NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)
    return proximal_to(found, features, bank, indices, proximal)


def check_bank(features: Tensor, bank: Tensor, indices: Tensor) -> None:
    """What every loss on a bank is given.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    checks.check_tensor("features", features, ("N", "D"))
    checks.check_tensor("bank", bank, ("n", "D"))
    if bank.device != features.device:
        raise ValueError(f"bank: got device {bank.device}, need features's {features.device}")
    if bank.shape[1] != features.shape[1]:
        raise ValueError(f"bank: got width D = {bank.shape[1]}, need features's {features.shape[1]}")
    checks.check_ids("indices", indices, features.shape[0], "N", features.device)
    checks.check_indices("indices", indices[:, None], features.shape[0], bank.shape[0], features.device)


def proximal_to(found: NCEOutput, features: Tensor, bank: Tensor, indices: Tensor, weight: float) -> NCEOutput:
    """A loss on a bank, plus λ·mean_i ‖f_i − v_i‖²."""
    checks.check_number("proximal", weight, at_least=0)
    if not weight:
        return found
    apart = widened(features) - widened(bank.detach()[indices])
    pull = weight * fixed_sum(apart.square()) / len(features)
    return NCEOutput(found.loss + pull, found.nce, found.penalty + pull, found.stats)


class NPIDSoftmaxLoss(LossModule):
    """NPID's exact softmax over the whole bank (`npid_softmax`), its settings kept.

    Args:
        temperature: of the softmax, > 0.
        proximal: λ >= 0 of the squared distance to the bank's vector.
        backend: as in `npid_softmax`.

    Shape:
        features: (N, D).
        bank: (n, D).
        indices: (N,) int64, the image of each row.

    Example:
        ```
        features, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (8, 100))
        NPIDSoftmaxLoss()(features, bank, torch.arange(8)).loss
        ```
    """

    def __init__(self, temperature: float = 0.07, *, proximal: float = 0.0, backend: str | None = None) -> None:
        super().__init__(temperature=temperature, proximal=proximal, backend=backend)
        inverse("temperature", temperature, torch.device("cpu"))
        checks.check_number("proximal", proximal, at_least=0)

    def forward(self, features: Tensor, bank: Tensor, indices: Tensor) -> NCEOutput:
        """`npid_softmax` of the batch."""
        return npid_softmax(features, bank, indices, **self.kept())


def oracle(features: Tensor, bank: Tensor, indices: Tensor, *, temperature: float | Tensor = 0.07) -> Tensor:
    """The loss, dense."""
    own = indices[:, None] == torch.arange(len(bank))
    return dense_nce(dense_scores(features, bank, 1 / temperature), own, ~own).mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "features": random_features(seed, size.n, size.d, unit=True),
        "bank": random_features(seed + 1, size.m, size.d, unit=True),
        "indices": places(seed + 2, size.m, size.n),  # an image may come twice in a batch
        "temperature": torch.tensor(0.2),
    }


register(
    Entry(
        npid_softmax,
        NPIDSoftmaxLoss,
        "mean_i −log softmax_j(⟨f_i, v_j⟩ / τ)_i",
        "Wu et al. 2018, arXiv:1805.01978",
        _draw,
        oracle,
        frozen=("bank",),
    )
)
