"""DIM's adversarial prior: a discriminator separates codes from draws of a prior, which the encoder deceives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.losses.common import widened
from fused_nce.models.adversary import Adversary, GameOutput

PRIORS = ("uniform", "normal")


class PriorMatching(Adversary):
    """The discriminator, 1000 and 200 units with ReLU, and both sides' losses.

    Args:
        code: units of the code.
        hidden: units of the discriminator's layers.
        game: see `Adversary`: the paper's is "minimax", its code's "non-saturating".
        gradient_penalty: see `Adversary`. Every sample counts: the paper's code takes the last one of the batch.
        prior: "uniform" on [0, 1]^n, of the codes' sigmoids, or "normal", N(0, 1), of the codes themselves.
    """

    def __init__(
        self,
        code: int,
        *,
        hidden: tuple[int, ...] = (1000, 200),
        game: str = "minimax",
        gradient_penalty: float = 1.0,
        prior: str = "uniform",
    ) -> None:
        checks.check_choice("prior", prior, PRIORS)
        layers = list[nn.Module]()
        size = code
        for units in hidden:
            layers += [nn.Linear(size, units), nn.ReLU()]
            size = units
        net = nn.Sequential(*layers, nn.Linear(size, 1))
        super().__init__(net, game=game, gradient_penalty=gradient_penalty)
        self.prior = prior

    def forward(
        self,
        code: Tensor,  # (B, code), without an activation
        prior: Tensor | None = None,  # (B, code); drawn if left out
    ) -> GameOutput:
        """Both terms."""
        uniform, code = self.prior == "uniform", widened(code)
        matched = code.sigmoid() if uniform else code
        if prior is None:
            prior = torch.rand_like(matched) if uniform else torch.randn_like(matched)
        return self.play((prior,), (matched,))
