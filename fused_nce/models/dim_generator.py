"""DIM's generator, trained by prior matching alone, as an `nn.Module`: images in, losses out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.group import gathered
from fused_nce.losses.common import widened
from fused_nce.models.adversary import GameLoss, as_constant
from fused_nce.models.base import Embedded
from fused_nce.models.coded import Decoded
from fused_nce.models.dim_prior import PriorMatching


class PriorGenerator(Decoded):
    """A generator without a game of its own (Hjelm et al. 2019, arXiv:1808.06670, appendix).

    ```
    model = PriorGenerator(architecture="dcgan32")
    optimizers = [torch.optim.Adam(p, lr=1e-4) for p in model.parameter_groups().values()]
    for images in loader:                                          # in [-1, 1]
        for optimizer in optimizers: optimizer.zero_grad()
        model(images).loss.backward()
        for optimizer in optimizers: optimizer.step()
    pictures = model.eval().generate(64)
    ```

    The encoder's one number is matched to N(0, 1) for images and to N(−a, 1) for generated ones, by a discriminator
    each; the two overlap, whatever the images are. The generator moves the mean of its own towards 0: it minimises
    (mean E(G(z)))² of all processes' codes, in which the encoder is constant. Both kinds of images are one batch to
    BatchNorm, which would hide from the generator how its own differ in the mean.

    Args:
        architecture: of the encoder, see `DIM`.
        width: multiplies the encoder's channels; 1 is DIM's.
        code: units of z, of which an image is generated, drawn from N(0, 1).
        decoder: channels of the generator's 4 × 4 map.
        apart: a, between the two means.
        game: the encoder's side: "minimax" or "non-saturating".
        gradient_penalty: of the discriminators.
        loss: called with the squared mean and a list of two `GameOutput`; `GameLoss()` if left out.

    Shape:
        batch: (B, 3, H, H) in [−1, 1], alone or as the one view of a batch.

    Raises:
        TypeError, ValueError: for a setting outside these.
    """

    rival = "priors"

    def __init__(
        self,
        *,
        architecture: str = "dcgan32",
        width: float = 1.0,
        code: int = 64,
        decoder: int = 512,
        apart: float = 2.0,
        game: str = "minimax",
        gradient_penalty: float = 1.0,
        loss: nn.Module | None = None,
    ) -> None:
        checks.checked_int("code", code, at_least=1)
        checks.check_number("apart", apart, above=0)
        super().__init__(architecture, 1, width, decoder, noise=code)
        self.apart = apart
        self.priors = nn.ModuleList(
            PriorMatching(1, game=game, gradient_penalty=gradient_penalty, prior="normal") for _ in range(2)
        )
        self.loss = GameLoss() if loss is None else loss

    def embedded(self, images: Tensor) -> Embedded:  # (B, 3, H, H)
        """The taps; the generator's term, and the games."""
        count = len(images)
        made = self.decode(torch.randn(count, self.noise, device=images.device, dtype=images.dtype))
        seen = self.encode(torch.cat((images, made.detach())))
        code = widened(seen["Y"])
        # fault: generated-prior-shifted
        games = [self.priors[0](code[:count]), self.priors[1](code[count:] + self.apart)]
        mean = widened(as_constant(self.encoder, torch.cat((images, made)))["Y"])[count:].mean()
        # Of all processes: DDP's average of these gradients is then that of the square, which no average of squares is.
        mean = mean + (gathered(mean[None]).mean() - mean.detach())  # fault: generator-own-mean
        return Embedded(({name: tap[:count] for name, tap in seen.items()},), (mean.square(), games))
