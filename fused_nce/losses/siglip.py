"""SigLIP's loss (Zhai, Mustafa, Kolesnikov, Beyer 2023, arXiv:2303.15343): every pair a binary question of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.group import Group
from fused_nce.core.spec import Bias, Block, Spec
from fused_nce.core.tails import Sigmoid
from fused_nce.losses.common import check_rows
from fused_nce.losses.heard import heard
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register

SPEC = Spec(Block(1), Bias(), stats=Sigmoid().stats)
TAIL = Sigmoid()


@heard
def siglip_loss(
    image: Tensor,  # (N, D)
    text: Tensor,  # (N, D)
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """1/N Σ_ij softplus(−z_ij·t_ij), z = 1 for i = j and −1 otherwise, t = logit_scale·⟨image_i, text_j⟩ + logit_bias.

    Args:
        image: (N, D), unit rows; float64, 32, 16 or bfloat16.
        text: (N, D), unit rows, same dtype and device.
        logit_scale: factor of the dot product, > 0; a 0-d tensor is learnable.
        logit_bias: added to every score; a 0-d tensor is learnable.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats, summed over each image's N pairs. `stats` has top1 and pos_mean.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        siglip_loss(image, text, logit_scale=10.0, logit_bias=-10.0).loss
        ```
    """
    check_rows("image", image, "text", text, same_n=True)
    checks.check_scale("logit_scale", logit_scale, image.device, above=0)
    checks.check_scale("logit_bias", logit_bias, image.device)
    parts = loss_of(image, text, SPEC, TAIL, scale=logit_scale, bias=logit_bias, group=group, backend=backend)
    return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)


class SigLIPLoss(LossModule):
    """SigLIP's sigmoid loss (`siglip_loss`). Scale and bias belong to the model and come with each call.

    Args:
        group, backend: as in `siglip_loss`.

    Shape:
        image, text: (N, D), rows of norm 1.
        logit_scale, logit_bias: a number or 0-d each.

    Example:
        ```
        image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        SigLIPLoss()(image, text, logit_scale=10.0, logit_bias=-10.0).loss
        ```
    """

    def __init__(self, *, group: Group = None, backend: str | None = None) -> None:
        super().__init__(group=group, backend=backend)

    def forward(
        self, image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor
    ) -> NCEOutput:
        """`siglip_loss` of the batch."""
        return siglip_loss(image, text, logit_scale, logit_bias, **self.kept())


def oracle(image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor) -> Tensor:
    """The loss, dense."""
    z = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    t = dense_scores(image, text, logit_scale) + logit_bias
    return torch.logaddexp(torch.zeros_like(t), -z * t).sum() / len(image)


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "image": features(seed, size.n, size.d, unit=True),
        "text": features(seed + 1, size.n, size.d, unit=True),
        "logit_scale": torch.tensor(6.5),
        "logit_bias": torch.tensor(-3.25),
    }


register(
    Entry(
        siglip_loss,
        SigLIPLoss,
        "1/N Σ_ij softplus(−z_ij(s_ij + b))",
        "Zhai et al. 2023, arXiv:2303.15343",
        _draw,
        oracle,
    )
)
