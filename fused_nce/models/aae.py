"""The adversarial autoencoder as an `nn.Module`: images in, losses out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fused_nce.losses.common import widened
from fused_nce.models.adversary import GameLoss
from fused_nce.models.base import Embedded
from fused_nce.models.coded import Decoded
from fused_nce.models.dim_prior import PriorMatching


class AAE(Decoded):
    """The adversarial autoencoder (Makhzani et al. 2015, arXiv:1511.05644), deterministic.

    ```
    model = AAE(architecture="dcgan32")
    optimizers = [torch.optim.Adam(p, lr=1e-4) for p in model.parameter_groups().values()]
    for images in loader:                                          # in [-1, 1]
        for optimizer in optimizers: optimizer.zero_grad()
        model(images).loss.backward()                              # both sides in one pass
        for optimizer in optimizers: optimizer.step()
    ```

    The loss is the mean squared error of a pixel + γ·(how well the discriminator tells the codes from N(0, 1)) + the
    discriminator's own, whose gradient reaches the discriminator alone.

    Args:
        architecture: of the encoder, see `DIM`.
        width: multiplies the encoder's channels; 1 is DIM's.
        code: units of Y.
        decoder: channels of the decoder's 4 × 4 map; 512 is DIM's.
        gamma: weight of the prior in the encoder's loss.
        game: "minimax" or "non-saturating".
        gradient_penalty: of the discriminator, DIM's.
        loss: called with the squared error and a list of one `GameOutput`; `GameLoss(gamma)` if left out.

    Shape:
        batch: (B, 3, H, H) in [−1, 1], alone or as the one view of a batch.

    Raises:
        TypeError, ValueError: for a setting outside these.
    """

    def __init__(
        self,
        *,
        architecture: str = "dcgan32",
        width: float = 1.0,
        code: int = 64,
        decoder: int = 512,
        gamma: float = 1.0,
        game: str = "non-saturating",
        gradient_penalty: float = 1.0,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(architecture, code, width, decoder)
        self.prior = PriorMatching(code, game=game, gradient_penalty=gradient_penalty, prior="normal")
        own = GameLoss(gamma)
        self.loss = own if loss is None else loss

    def embedded(self, images: Tensor) -> Embedded:  # (B, 3, H, H)
        """The taps; the squared error, and the game."""
        taps = self.encode(images)
        error = F.mse_loss(widened(self.decode(taps["Y"])), widened(images))
        return Embedded((taps,), (error, [self.prior(taps["Y"])]))
