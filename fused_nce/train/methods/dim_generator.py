"""DIM's generator in the loop (arXiv 1808.06670, appendix): prior matching alone; `fused-nce eval` shows its images."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fused_nce.models import PriorGenerator
from fused_nce.train.limits import ABOVE_0, setting
from fused_nce.train.methods.coded import GAME_STATS, AutoencoderConfig, GameConfig, GeneratedConfig


@dataclass
class GeneratorConfig(AutoencoderConfig):
    __doc__ = (AutoencoderConfig.__doc__ or "").replace("units of Y", "units that an image is generated of")


@dataclass
class GeneratorLossConfig(GameConfig):
    __doc__ = f"""{GameConfig.__doc__}
        apart: between the means that the codes of images and of generated ones are matched to.
    """

    game: Literal["minimax", "non-saturating"] = "minimax"
    apart: float = setting(2.0, ABOVE_0)


@dataclass
class DIMGeneratorConfig(GeneratedConfig):
    method: ClassVar[str] = "dim-generator"
    title: ClassVar[str] = "DIM's generator"
    stats: ClassVar = GAME_STATS

    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)

    def build(self, *, images: int = 1) -> PriorGenerator:
        return self.drawn(PriorGenerator(**self.arguments(), **vars(self.loss)))

    def check_together(self) -> None:
        """A pass through the encoder whose weights are constants needs them whole, and cannot be made again."""
        for name, given, need in (
            ("run.shard", self.run.shard, "none"),
            ("scale.checkpoint_activations", self.scale.checkpoint_activations, False),
        ):
            if given != need:
                raise ValueError(f"{name}: must be {str(need).lower()} for {self.title}, got {str(given).lower()}")
        super().check_together()
