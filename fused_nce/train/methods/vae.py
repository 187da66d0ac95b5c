"""The variational autoencoder in the loop (arXiv 1312.6114), and β-VAE: two of DIM's baselines."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fused_nce.models import VAE
from fused_nce.train.limits import AT_LEAST_0, setting
from fused_nce.train.methods.coded import DECODED, AutoencoderConfig, DecodedConfig


@dataclass
class VAELossConfig:
    """The squared error of an image, and the divergence of its code from N(0, 1).

    Args:
        beta: weight of the divergence; 1 is the VAE.
    """

    beta: float = setting(1.0, AT_LEAST_0)


BETA: dict[str, Any] = {"loss": {"beta": 0.5}}  # ours
PRESETS: dict[str, dict[str, Any]] = {
    **DECODED,
    **{f"{name}-beta": DECODED[name] | BETA for name in ("cifar10", "cifar100", "digits", "cifar10-tiny")},
}


@dataclass
class VAEConfig(DecodedConfig):
    method: ClassVar[str] = "vae"
    title: ClassVar[str] = "VAE"
    presets: ClassVar = PRESETS
    stats: ClassVar = ("error", "kl")

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)

    def build(self, *, images: int = 1) -> VAE:
        return self.drawn(VAE(**self.arguments(), beta=self.loss.beta))
