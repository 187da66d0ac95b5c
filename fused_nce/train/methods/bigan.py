"""BiGAN in the loop (arXiv 1605.09782), one of DIM's baselines."""

from dataclasses import dataclass, field
from typing import ClassVar

from fused_nce.models import BiGAN
from fused_nce.train.methods.coded import GAME_STATS, AutoencoderConfig, GameConfig, GeneratedConfig


@dataclass
class BiGANConfig(GeneratedConfig):
    method: ClassVar[str] = "bigan"
    title: ClassVar[str] = "BiGAN"
    stats: ClassVar = GAME_STATS

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    loss: GameConfig = field(default_factory=GameConfig)

    def build(self, *, images: int = 1) -> BiGAN:
        return self.drawn(BiGAN(**self.arguments(), **vars(self.loss)))
