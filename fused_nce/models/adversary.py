"""A game of two sides: a discriminator tells one kind of sample from another, and whoever made them deceives it.

One backward trains both sides. The makers' term sees the discriminator's weights as constants, the discriminator's
term sees the samples as constants: no gradient crosses, and each side may have an optimiser of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_nce.core import checks
from fused_nce.core.statistics import softplus
from fused_nce.losses import NCEOutput
from fused_nce.losses.common import widened

GAMES = ("minimax", "non-saturating")


class GameOutput(NamedTuple):
    """The loss terms of encoder (or generator) and discriminator, 0-d, in nats; the discriminator's share of right."""

    encoder: Tensor
    discriminator: Tensor
    accuracy: Tensor


def as_constant(module: nn.Module, *inputs: Tensor) -> Any:
    """A module's output with its weights as constants, of which its running statistics learn nothing."""
    held = {name: buffer.clone() for name, buffer in module.named_buffers()}
    held |= {name: p.detach() for name, p in module.named_parameters()}  # fault: deceived-side-trains
    return functional_call(module, held, inputs)


class Adversary(nn.Module):
    """A discriminator, and both sides' losses.

    Args:
        discriminator: called with the parts of a sample, each (B, ...), for (B, 1); it is differentiated twice.
        game: the makers minimise −mean softplus(d) ("minimax") or mean softplus(−d) ("non-saturating", whose gradient
            lives on while the discriminator wins).
        gradient_penalty: weight of ½·(mean ‖∂d/∂y‖² over the real + over the fake) in the discriminator's term, of
            each part of a sample.
        both: the real samples are made as well, and their maker plays too.
    """

    def __init__(
        self, discriminator: nn.Module, *, game: str = "minimax", gradient_penalty: float = 1.0, both: bool = False
    ) -> None:
        super().__init__()
        checks.check_choice("game", game, GAMES)
        checks.check_number("gradient_penalty", gradient_penalty, at_least=0)
        self.discriminator, self.game, self.gradient_penalty, self.both = discriminator, game, gradient_penalty, both

    def play(self, real: Sequence[Tensor], fake: Sequence[Tensor]) -> GameOutput:
        """Both terms, of the parts of the samples, (B, ...) each."""
        passed = [self._judge(fake, frozen=True), *([-self._judge(real, frozen=True)] if self.both else [])]
        encoder = torch.stack([-softplus(d).mean() if self.game == "minimax" else softplus(-d).mean() for d in passed])

        penalised = self.gradient_penalty > 0 and torch.is_grad_enabled()
        known, made = ([x.detach().requires_grad_(penalised) for x in side] for side in (real, fake))
        on_real, on_fake = self._judge(known), self._judge(made)
        discriminator = softplus(-on_real).mean() + softplus(on_fake).mean()
        if penalised:
            with checks.uncast(on_real):  # as `_judge`
                slopes = torch.autograd.grad(on_real.sum() + on_fake.sum(), (*known, *made), create_graph=True)
            norms = torch.stack([slope.square().flatten(1).sum(1).mean() for slope in slopes])
            discriminator = discriminator + self.gradient_penalty * 0.5 * norms.sum()
        right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        return GameOutput(encoder.sum(), discriminator, right.detach())

    def _judge(self, parts: Sequence[Tensor], *, frozen: bool = False) -> Tensor:  # (B,)
        with checks.uncast(parts[0]):  # the penalty differentiates these layers twice
            net = self.discriminator
            parts = [x.to(next(net.parameters()).dtype) for x in parts]
            found: Tensor = as_constant(net, *parts) if frozen else net(*parts)
            return widened(found.squeeze(1))


class GameLoss(nn.Module):
    """What else the makers minimise, + γ·their terms of the games, + the discriminators' terms.

    Args:
        gamma: γ.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        checks.check_number("gamma", gamma, at_least=0)
        self.gamma = gamma

    def forward(
        self,
        error: Tensor,  # 0-d
        games: Sequence[GameOutput],
    ) -> NCEOutput:
        """`nce` is the makers' part, `penalty` the discriminators'; `stats` has each without its weight."""
        prior, discriminator, right = (torch.stack(parts) for parts in zip(*games, strict=True))
        nce, penalty = error + self.gamma * prior.sum(), discriminator.sum()
        stats = {"error": error, "prior": prior.sum(), "discriminator": penalty, "discriminator_acc": right.mean()}
        return NCEOutput(nce + penalty, nce, penalty, {name: value.detach() for name, value in stats.items()})
