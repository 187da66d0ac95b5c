"""What the settings of MoCo, SimCLR, SupCon and NPID share: an encoder by name, a head, a temperature."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fused_nce.models.encoders.backbones import OWN
from fused_nce.train.limits import AT_LEAST_1, optional, setting
from fused_nce.train.method import Method
from fused_nce.train.settings import BACKBONE, SIDE

# The presets' encoders: 32 px from a ResNet's own stem, and the two small ones that are ours.
CIFAR_R18: dict[str, Any] = {"image_size": 32, "backbone": "resnet18", "stem": "cifar"}
CIFAR_R50: dict[str, Any] = {"image_size": 32, "backbone": "resnet50", "stem": "cifar"}
TINY: dict[str, Any] = {"image_size": 32, "backbone": "tiny", "layers": 2}
MINI: dict[str, Any] = {"image_size": 16, "backbone": "mini", "layers": 2, "dim": 64}
# As long as AMDIM's `cifar10-tiny`: 1,170 updates.
TINY_OPTIM: dict[str, Any] = {"epochs": 3, "batch_size": 128, "warmup_updates": 100, "schedule": "cosine"}
DIGITS_OPTIM: dict[str, Any] = {
    "name": "adam",
    "epochs": 40,
    "batch_size": 128,
    "lr": 1e-3,
    "betas": [0.9, 0.999],
    "warmup_updates": 20,
    "schedule": "cosine",
}


@dataclass
class EncoderConfig:
    """The encoder and its head.

    Args:
        image_size: side in px.
        backbone: "tiny" or "mini" (ours), a torchvision classifier, or "timm/NAME".
        stem: "imagenet", or "cifar": a ResNet's first layers for 32 px.
        init: "kaiming", or "zero": residual branches start at zero.
        dim: width of the projections.
        layers: of the head.
        hidden: width of its layers but the last; the features' if left out.
    """

    image_size: int = setting(224, SIDE)
    backbone: str = setting("resnet50", BACKBONE)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    init: Literal["kaiming", "zero"] = "kaiming"
    dim: int = setting(128, AT_LEAST_1)
    layers: int = setting(1, AT_LEAST_1)
    hidden: int | None = setting(None, optional(AT_LEAST_1))


@dataclass
class ProjectedConfig(Method):
    __doc__ = Method.__doc__

    taps: ClassVar = ("h", "z")

    def model_arguments(self) -> dict[str, Any]:
        """Of the model's constructor."""
        return {name: value for name, value in vars(self.model).items() if name != "image_size"}

    def untrained(self) -> dict[str, Method]:
        """Both inits where there are residual branches to start at zero."""
        if self.model.backbone not in OWN and not self.model.backbone.startswith(("resn", "wide_resn", "timm/resn")):
            return {"random": self}
        return {
            f"random, {name} init": dataclasses.replace(self, model=dataclasses.replace(self.model, init=init))
            for name, init in {"zero-branch": "zero", "Kaiming": "kaiming"}.items()
        }
