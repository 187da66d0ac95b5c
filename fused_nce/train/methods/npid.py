"""NPID in the loop (arXiv 1805.01978)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from fused_nce.losses import NPIDNCELoss, NPIDSoftmaxLoss
from fused_nce.models import NPID
from fused_nce.train.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, setting
from fused_nce.train.methods import projected
from fused_nce.train.methods.presets import CIFAR10_COLOURS, CIFAR100_COLOURS, crops
from fused_nce.train.methods.projected import ADAM, CIFAR_R18, TemperatureConfig, our_presets, steps
from fused_nce.train.settings import BACKBONE, AugmentConfig, OptimConfig


@dataclass
class NPIDModelConfig(projected.EncoderConfig):
    __doc__ = f"""{projected.EncoderConfig.__doc__}
        momentum: of the bank.
    """

    backbone: str = setting("resnet18", BACKBONE)
    momentum: float = setting(0.5, BELOW_1)


@dataclass
class NPIDLossConfig(TemperatureConfig):
    __doc__ = f"""{TemperatureConfig.__doc__}
        loss: "softmax", exact over the bank, or "nce" with sampled noise.
        noise: of "nce", images sampled for each one.
        proximal: weight of the squared distance to the bank's vector.
    """

    temperature: float = setting(0.07, ABOVE_0)
    loss: Literal["softmax", "nce"] = "softmax"
    noise: int = setting(4096, AT_LEAST_1)
    proximal: float = setting(0.0, AT_LEAST_0)


# `default` is lemniscate's main.py (ImageNet), by NCE, `cifar10` its cifar.py with the exact softmax that its README
# recommends: no flip there. `digits` and `cifar10-tiny` are ours.
CIFAR: dict[str, Any] = {
    "model": CIFAR_R18,
    "loss": {"temperature": 0.1},
    "optim": {"batch_size": 128, "weight_decay": 5e-4},
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"loss": {"loss": "nce"}},
    "cifar10": {**CIFAR, "augment": {"flip_p": 0.0, **CIFAR10_COLOURS}},
    "cifar100": {**CIFAR, "augment": {"flip_p": 0.0, **CIFAR100_COLOURS}},
    # One view an image, hence twice the epochs. At the other methods' rate an image's vector in the bank is out of date
    # before the image comes again, and kNN stays where it started; the crop is cifar.py's.
    **our_presets(
        digits={"loss": {"temperature": 0.1}},
        tiny={
            "loss": {"temperature": 0.1},
            "augment": {"crop_area": [0.2, 1.0]},
            "optim": {**ADAM, "epochs": 6, "lr": 3e-4},
        },
    ),
}


@dataclass
class NPIDConfig(projected.ProjectedConfig):
    method: ClassVar[str] = "npid"
    title: ClassVar[str] = "NPID"
    presets: ClassVar = PRESETS
    view_count: ClassVar[int] = 1
    extras: ClassVar = ("indices",)

    model: NPIDModelConfig = field(default_factory=NPIDModelConfig)
    loss: NPIDLossConfig = field(default_factory=NPIDLossConfig)
    augment: AugmentConfig = field(default_factory=lambda: crops(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0))
    optim: OptimConfig = field(default_factory=steps)

    def build(self, *, images: int = 1) -> NPID:
        settings: dict[str, Any] = {"proximal": self.loss.proximal, "backend": self.loss.backend}
        loss: nn.Module = (
            NPIDSoftmaxLoss(self.loss.temperature, **settings)
            if self.loss.loss == "softmax"
            else NPIDNCELoss(self.loss.temperature, m=self.loss.noise, **settings)
        )
        return NPID(size=images, **self.model_arguments(), loss=loss)
