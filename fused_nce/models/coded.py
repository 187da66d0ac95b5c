"""What the models on DIM's encoder share: its taps, one view of an image, and a rival that learns by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.models.base import Embedded, Model, check_images, one_view
from fused_nce.models.decoder import Decoder
from fused_nce.models.encoders.dim import DIMEncoder


class Coded(Model):
    """A model of one view that DIM's encoder turns into a code.

    Args:
        architecture: a name in `encoders.dim.ARCHITECTURES`.
        code: units of Y.
        width: multiplies the encoder's channels.

    Attributes:
        rival: name of the sub-module that plays against the rest, if there is one.
    """

    rival = "prior"

    def __init__(self, architecture: str, code: int, width: float) -> None:
        super().__init__()
        self.encoder = DIMEncoder(architecture, code=code, width=width)
        self.image_size = self.encoder.image_size

    def rivals(self) -> nn.Module | None:
        """The discriminators, which have an optimizer of their own."""
        found: nn.Module | None = getattr(self, self.rival, None)
        return found

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        """`encoder` and, with a rival, `discriminator`: disjoint lists that hold every parameter."""
        rivals = self.rivals()
        apart = list(rivals.parameters()) if rivals is not None else []
        known = {id(p) for p in apart}
        groups = {"encoder": [p for p in self.parameters() if id(p) not in known]}
        return groups | ({"discriminator": apart} if apart else {})

    def encode(
        self,
        x: Tensor,  # (B, 3, H, H) normalised images, H = image_size
    ) -> dict[str, Tensor]:
        """Features of a batch of images.

        Returns:
            `conv (B, C, h, h)`, the last convolution; `fc (B, F)`, the last hidden layer; `Y (B, code)`, without an
            activation; and `local (B, C', M, M)`, the map that DIM's local objective reads.

        Raises:
            TypeError, ValueError: for images of integers, or of another shape.
        """
        check_images(x, self.image_size)
        taps: dict[str, Tensor] = self.encoder(x)
        return taps

    def embed(
        self,
        batch: Any,  # (B, 3, H, H), alone or as the one view of a batch
    ) -> Embedded:
        """The taps, and what the loss is called with: see the class.

        Raises:
            ValueError: for more than one view, images of another shape, or a single image, to which neither a loss nor
                BatchNorm has another.
        """
        return self.embedded(self.images(batch))

    def embedded(self, images: Tensor) -> Embedded:  # (B, 3, H, H), at least two
        """`embed` of the images."""
        raise NotImplementedError

    def images(self, batch: Tensor | Sequence[Tensor]) -> Tensor:
        """The images of a batch, at least two of them."""
        images = one_view(batch)
        check_images(images, self.image_size)
        if len(images) < 2:
            raise ValueError(f"batch: must hold at least 2 images, got {len(images)}: one has none to compare with")
        return images


class Decoded(Coded):
    """One that also makes images, in [−1, 1], of draws of N(0, 1).

    Args:
        architecture: of the encoder.
        code: units of Y.
        width: of the encoder.
        decoder: channels of the decoder's 4 × 4 map.
        noise: units of what the decoder is given; Y's if None.
    """

    def __init__(self, architecture: str, code: int, width: float, decoder: int, noise: int | None = None) -> None:
        super().__init__(architecture, code, width)
        decoder = checks.checked_int("decoder", decoder)
        if decoder < 8 or decoder % 8:
            raise ValueError(f"decoder: must be a multiple of 8, at least 8, got {decoder}")
        self.noise = code if noise is None else noise
        self.decoder = Decoder(self.noise, self.image_size, decoder)

    def decode(
        self,
        code: Tensor,  # (B, noise)
    ) -> Tensor:  # (B, 3, H, H) in [−1, 1]
        """The decoder's images."""
        images: Tensor = 2 * self.decoder(code) - 1
        return images

    def generate(self, count: int) -> Tensor:  # (count, 3, H, H) in [−1, 1]
        """New images, of noise that the CPU draws, on every device the same."""
        like = next(self.decoder.parameters())
        return self.decode(torch.randn(count, self.noise, dtype=like.dtype).to(like.device))
