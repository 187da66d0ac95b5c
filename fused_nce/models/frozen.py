"""A trained encoder without the parts that only training needs: inputs to taps."""

from __future__ import annotations

from torch import Tensor, nn

from fused_nce.models.base import Model

Tensors = dict[str, Tensor]


class FrozenEncoder(nn.Module):
    """The encoder of a model, in eval mode, without head, critics, queue or bank; they are taken out of the model.

    Its state has the encoder's own keys: torchvision's or timm's where the encoder is one.

    Args:
        model: any; it is of no other use afterwards.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        for name, _ in list(model.named_children()):
            if name not in model.encoders:
                setattr(model, name, nn.Identity())  # `encode` may still call it, and a tap of it is left out below
        self.model = model.requires_grad_(False)
        self.eval()

    def forward(
        self,
        x: Tensor,  # (B, ...) as `encode` wants it
    ) -> Tensors:
        """The taps of a batch."""
        taps = self.model.encode(x)
        return {name: tap for name, tap in taps.items() if name not in self.model.head_taps}

    def encoder_state(self) -> Tensors:
        """The weights, by the encoder's own keys; with several parts, each below its name."""
        state = self.model.state_dict()
        return {self._public(key): value for key, value in state.items()}

    def load_encoder_state(self, state: Tensors) -> None:
        """The inverse of `encoder_state`.

        Raises:
            RuntimeError: for a missing or unknown key, or another shape.
        """
        self.model.load_state_dict({self._private(key): value for key, value in state.items()})

    def _public(self, key: str) -> str:
        return key.partition(".")[2] if len(self.model.encoders) == 1 else key

    def _private(self, key: str) -> str:
        return f"{self.model.encoders[0]}.{key}" if len(self.model.encoders) == 1 else key
