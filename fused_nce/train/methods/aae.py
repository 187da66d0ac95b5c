"""The adversarial autoencoder in the loop (arXiv 1511.05644), one of DIM's baselines."""

from dataclasses import dataclass, field
from typing import ClassVar

from fused_nce.models import AAE
from fused_nce.train.limits import AT_LEAST_0, setting
from fused_nce.train.methods.coded import GAME_STATS, AutoencoderConfig, DecodedConfig, GameConfig


@dataclass
class AAELossConfig(GameConfig):
    __doc__ = f"""{GameConfig.__doc__}
        gamma: weight of the prior beside the squared error of a pixel.
    """

    gamma: float = setting(1.0, AT_LEAST_0)


@dataclass
class AAEConfig(DecodedConfig):
    method: ClassVar[str] = "aae"
    title: ClassVar[str] = "AAE"
    stats: ClassVar = GAME_STATS

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: AAELossConfig = field(default_factory=AAELossConfig)

    def build(self, *, images: int = 1) -> AAE:
        return self.drawn(AAE(**self.arguments(), **vars(self.loss)))
