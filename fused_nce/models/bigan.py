"""BiGAN as an `nn.Module`: images in, losses out."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from fused_nce.losses.common import widened
from fused_nce.models.adversary import Adversary, GameLoss
from fused_nce.models.base import Embedded
from fused_nce.models.coded import Decoded
from fused_nce.models.decoder import widths

SLOPE = 0.2  # of the leaky ReLUs, as in DCGAN's discriminator


class JointDiscriminator(nn.Module):
    """(image, code) to a logit: the decoder's sizes backwards, a layer on the code, and two layers on both.

    There is no BatchNorm: the gradient penalty is of each sample by itself.

    Args:
        code: units of the code.
        side: of the images.
        channels: twice those at 4 × 4 px.
    """

    def __init__(self, code: int, side: int, channels: int) -> None:
        super().__init__()
        sizes = [3, *widths(side, channels)[:0:-1]]
        convs = [
            layer for c_in, c_out in pairwise(sizes) for layer in (nn.Conv2d(c_in, c_out, 4, 2, 1), nn.LeakyReLU(SLOPE))
        ]
        self.image = nn.Sequential(*convs, nn.Flatten())
        self.code = nn.Sequential(nn.Linear(code, 2 * channels), nn.LeakyReLU(SLOPE))
        layers = list[nn.Module]()
        for c_in, c_out in ((16 * sizes[-1] + 2 * channels, channels), (channels, channels // 2)):
            layers += [nn.Linear(c_in, c_out), nn.LeakyReLU(SLOPE)]
        self.both = nn.Sequential(*layers, nn.Linear(channels // 2, 1))

    def forward(
        self,
        images: Tensor,  # (B, 3, H, H)
        code: Tensor,  # (B, D)
    ) -> Tensor:  # (B, 1)
        found: Tensor = self.both(torch.cat((self.image(images), self.code(code)), 1))
        return found


class BiGAN(Decoded):
    """Adversarial feature learning (Donahue et al. 2016, arXiv:1605.09782; also ALI, arXiv:1606.00704).

    ```
    model = BiGAN(architecture="dcgan32")
    optimizers = [torch.optim.Adam(p, lr=1e-4) for p in model.parameter_groups().values()]
    for images in loader:                                          # in [-1, 1]
        for optimizer in optimizers: optimizer.zero_grad()
        model(images).loss.backward()                              # both sides in one pass
        for optimizer in optimizers: optimizer.step()
    ```

    A discriminator tells an image with its code, (x, E(x)), from a draw of N(0, 1) with its image, (G(z), z); encoder
    and generator both deceive it.

    Args:
        architecture: of the encoder, see `DIM`.
        width: multiplies the encoder's channels; 1 is DIM's.
        code: units of Y.
        decoder: channels of the generator at 4 × 4 px; the discriminator has half as many.
        game: "minimax" or "non-saturating".
        gradient_penalty: of the discriminator, as DIM's, of images and codes.
        loss: called with 0 and a list of one `GameOutput`; `GameLoss()` if left out.

    Shape:
        batch: (B, 3, H, H) in [−1, 1], alone or as the one view of a batch.

    Raises:
        TypeError, ValueError: for a setting outside these.
    """

    rival = "adversary"

    def __init__(
        self,
        *,
        architecture: str = "dcgan32",
        width: float = 1.0,
        code: int = 64,
        decoder: int = 512,
        game: str = "non-saturating",
        gradient_penalty: float = 1.0,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(architecture, code, width, decoder)
        joint = JointDiscriminator(code, self.image_size, decoder)
        self.adversary = Adversary(joint, game=game, gradient_penalty=gradient_penalty, both=True)
        self.loss = GameLoss() if loss is None else loss

    def embedded(self, images: Tensor) -> Embedded:  # (B, 3, H, H)
        """The taps; no error, and the game."""
        taps = self.encode(images)
        code = widened(taps["Y"])
        drawn = torch.randn_like(code)
        made = widened(self.decode(drawn.to(taps["Y"].dtype)))
        # fault: bigan-pairs-crossed
        game = self.adversary.play((widened(images), code), (made, drawn))
        return Embedded((taps,), (code.new_zeros(()), [game]))
