"""Supervised contrastive learning in the loop (arXiv 2004.11362)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fused_nce.losses import SupConLoss
from fused_nce.models import SupCon
from fused_nce.train.data.loader import Loader
from fused_nce.train.data.recordings import WindowLoader
from fused_nce.train.limits import AT_LEAST_1, setting
from fused_nce.train.methods import projected
from fused_nce.train.methods.presets import CIFAR10_COLOURS, CIFAR100_COLOURS, crops
from fused_nce.train.methods.projected import ADAM, CIFAR_R50, TemperatureConfig, our_presets
from fused_nce.train.settings import SIDE, AugmentConfig, OptimConfig


@dataclass
class SupConModelConfig(projected.EncoderConfig):
    __doc__ = f"""{projected.EncoderConfig.__doc__}
        norm: BatchNorm in the head.
    """

    image_size: int = setting(32, SIDE)
    stem: Literal["imagenet", "cifar"] = "cifar"
    layers: int = setting(2, AT_LEAST_1)
    norm: bool = False


@dataclass
class SupConLossConfig(TemperatureConfig):
    __doc__ = f"""{TemperatureConfig.__doc__}
        variant: "out" (equation 2) or "in" (equation 3).
    """

    variant: Literal["out", "in"] = "out"


# `default` is SupContrast's main_supcon.py with its README's options: ResNet-50 on CIFAR-10, rate 0.5, decay 1e-4. It
# multiplies the loss by temperature / 0.07, which under SGD is a rate 1/0.7 as large and a decay of 0.7. Its warm-up of
# ten epochs starts at rate 0.01 and its cosine ends at 5e-4; ours at 0. `digits` and `cifar10-tiny` are ours.
SCALE = 0.1 / 0.07
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cifar10": {"model": CIFAR_R50},
    "cifar100": {"model": CIFAR_R50, "augment": CIFAR100_COLOURS},
    **our_presets(digits={}, tiny={"optim": {**ADAM, "lr": 1e-3}}),
}


def _optim() -> OptimConfig:
    return OptimConfig(
        name="sgd", epochs=1000, batch_size=1024, lr=0.5 * SCALE, weight_decay=1e-4 / SCALE, warmup_updates=480,
        schedule="cosine",
    )  # fmt: skip


@dataclass
class SupConConfig(projected.ProjectedConfig):
    method: ClassVar[str] = "supcon"
    title: ClassVar[str] = "SupCon"
    in_parts: ClassVar[bool] = True
    presets: ClassVar = PRESETS
    extras: ClassVar = ("labels",)

    model: SupConModelConfig = field(default_factory=SupConModelConfig)
    loss: SupConLossConfig = field(default_factory=SupConLossConfig)
    augment: AugmentConfig = field(
        default_factory=lambda: crops(
            jitter=(0.4, 0.4, 0.4, 0.1), **{name: tuple(value) for name, value in CIFAR10_COLOURS.items()}
        )
    )
    optim: OptimConfig = field(default_factory=_optim)

    def build(self, *, images: int = 1) -> SupCon:
        return SupCon(**self.model_arguments(), loss=SupConLoss(**vars(self.loss)))

    def open_loader(self, rank: int, world: int) -> Loader | WindowLoader:
        """With a label for every image.

        Raises:
            ValueError: if one has none: -1 would be taken for a class.
        """
        loader = super().open_loader(rank, world)
        if unlabelled := int((loader.labels < 0).sum()):
            raise ValueError(f"data: {unlabelled} of {loader.count} images have no label; supcon needs one for each")
        return loader
