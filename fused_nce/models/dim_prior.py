"""DIM's adversarial prior: a discriminator separates codes from draws of U[0, 1]^n, which the encoder deceives.

One backward trains both sides. The encoder's term sees the discriminator's weights as constants, the discriminator's
term sees the codes as constants: no gradient crosses, and each side may have an optimiser of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_nce.core import checks
from fused_nce.core.statistics import softplus
from fused_nce.losses.common import widened

GAMES = ("minimax", "non-saturating")


class PriorOutput(NamedTuple):
    """The loss terms of encoder and discriminator, 0-d, in nats, and the discriminator's accuracy in [0, 1]."""

    encoder: Tensor
    discriminator: Tensor
    accuracy: Tensor


class PriorMatching(nn.Module):
    """The discriminator, 1000 and 200 units with ReLU, and both sides' losses.

    Args:
        code: units of the code.
        hidden: units of the discriminator's layers.
        game: the encoder minimises −mean softplus(d) ("minimax", the paper) or mean softplus(−d) ("non-saturating", its
            code, whose gradient lives on while the discriminator wins).
        gradient_penalty: weight of ½·(mean ‖∂d/∂y‖² over the prior + over the codes) in the discriminator's term. Every
            sample counts: the paper's code takes the last one of the batch.
    """

    def __init__(
        self,
        code: int,
        *,
        hidden: tuple[int, ...] = (1000, 200),
        game: str = "minimax",
        gradient_penalty: float = 1.0,
    ) -> None:
        super().__init__()
        checks.check_choice("game", game, GAMES)
        checks.check_number("gradient_penalty", gradient_penalty, at_least=0)
        layers = list[nn.Module]()
        size = code
        for units in hidden:
            layers += [nn.Linear(size, units), nn.ReLU()]
            size = units
        self.discriminator = nn.Sequential(*layers, nn.Linear(size, 1))
        self.game, self.gradient_penalty = game, gradient_penalty

    def forward(
        self,
        code: Tensor,  # (B, code), without an activation
        prior: Tensor | None = None,  # (B, code) in [0, 1]; drawn if left out
    ) -> PriorOutput:
        """Both terms, of the sigmoid of the codes."""
        squashed = widened(code).sigmoid()
        drawn = torch.rand_like(squashed) if prior is None else prior
        passed = self._judge(squashed, frozen=True)
        encoder = -softplus(passed).mean() if self.game == "minimax" else softplus(-passed).mean()

        penalised = self.gradient_penalty > 0 and torch.is_grad_enabled()
        real, fake = drawn.detach().requires_grad_(penalised), squashed.detach().requires_grad_(penalised)
        on_real, on_fake = self._judge(real), self._judge(fake)
        discriminator = softplus(-on_real).mean() + softplus(on_fake).mean()
        if penalised:
            slopes = torch.autograd.grad(on_real.sum() + on_fake.sum(), (real, fake), create_graph=True)
            norms = [slope.square().sum(1).mean() for slope in slopes]
            discriminator = discriminator + self.gradient_penalty * 0.5 * (norms[0] + norms[1])
        right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        return PriorOutput(encoder, discriminator, right.detach())

    def _judge(self, codes: Tensor, *, frozen: bool = False) -> Tensor:  # (B, code) -> (B,)
        with torch.autocast(codes.device.type, enabled=False):  # the penalty differentiates these layers twice
            if frozen:
                constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
                return functional_call(self.discriminator, constants, (codes,)).squeeze(1)
            found: Tensor = self.discriminator(codes)
            return found.squeeze(1)
