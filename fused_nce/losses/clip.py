"""CLIP's loss (Radford et al. 2021, arXiv:2103.00020): InfoNCE of images among texts and of texts among images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import tile_loss
from fused_nce.core.group import Group
from fused_nce.core.spec import Block, Spec
from fused_nce.core.tails import Nce
from fused_nce.losses.common import check_rows, dense_nce
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register

SPEC = Spec(Block(1), stats=Nce().stats, columns=("neg_lse",))


def clip_loss(
    image: Tensor,  # (N, D)
    text: Tensor,  # (N, D)
    logit_scale: float | Tensor,
    *,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """½(mean_i −log softmax_j(s_ij)_i + mean_j −log softmax_i(s_ij)_j), without holding the (N, N) scores s.

    Args:
        image: (N, D), unit rows; float64, 32, 16 or bfloat16.
        text: (N, D), unit rows, same dtype and device.
        logit_scale: factor of the dot product, the exponential of CLIP's parameter; a 0-d tensor is learnable.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats; chance is log N. `stats` is of images among texts.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    check_rows("image", image, "text", text, same_n=True)
    checks.check_scale("logit_scale", logit_scale, image.device)
    parts = tile_loss(image, text, SPEC, Nce(), scale=logit_scale, group=group, backend=backend)
    return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)


class CLIPLoss(LossModule):
    """CLIP's loss (`clip_loss`). The scale belongs to the model, as in CLIP, and comes with each call.

    Args:
        group, backend: as in `clip_loss`.

    Shape:
        image, text: (N, D), rows of norm 1.
        logit_scale: a number or 0-d, the factor itself, not its log.

    Example:
        ```
        image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
        CLIPLoss()(image, text, logit_scale=1 / 0.07).loss
        ```
    """

    def __init__(self, *, group: Group = None, backend: str | None = None) -> None:
        super().__init__(group=group, backend=backend)

    def forward(self, image: Tensor, text: Tensor, logit_scale: float | Tensor) -> NCEOutput:
        """`clip_loss` of the batch."""
        return clip_loss(image, text, logit_scale, **self.kept())


def oracle(image: Tensor, text: Tensor, logit_scale: float | Tensor) -> Tensor:
    """The loss, dense."""
    s, own = dense_scores(image, text, logit_scale), torch.eye(len(image), dtype=torch.bool)
    return (dense_nce(s, own, ~own).mean() + dense_nce(s.T, own, ~own).mean()) / 2


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "image": features(seed, size.n, size.d, unit=True),
        "text": features(seed + 1, size.n, size.d, unit=True),
        "logit_scale": torch.tensor(9.5),
    }


register(
    Entry(
        "clip_loss",
        clip_loss,
        CLIPLoss,
        "½(mean_i −log softmax_j(s_ij)_i + mean_j −log softmax_i(s_ij)_j)",
        "Radford et al. 2021, arXiv:2103.00020",
        _draw,
        oracle,
    )
)
