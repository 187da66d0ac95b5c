"""What the settings of MoCo, SimCLR, SupCon, NPID and distillation share: encoder, head, temperature, presets."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fused_nce.models.encoders.backbones import OWN
from fused_nce.train.limits import ABOVE_0, AT_LEAST_1, optional, setting
from fused_nce.train.method import Method
from fused_nce.train.methods.presets import CIFAR_VIEWS, DIGITS_VIEWS
from fused_nce.train.settings import BACKBONE, BACKEND, SIDE, OptimConfig

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


ADAM: dict[str, Any] = {"name": "adam", "betas": [0.9, 0.999]}


def our_presets(digits: dict[str, Any], tiny: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`digits` and `cifar10-tiny`: what every method has in them, and the sections in which this one differs."""
    shared: dict[str, dict[str, Any]] = {
        "cifar10-tiny": {"model": TINY, "augment": CIFAR_VIEWS, "optim": TINY_OPTIM},
        "digits": {"model": MINI, "augment": DIGITS_VIEWS, "optim": DIGITS_OPTIM, "run": {"log_every": 5}},
    }
    for name, changes in (("cifar10-tiny", tiny), ("digits", digits)):
        shared[name] |= {section: shared[name].get(section, {}) | values for section, values in changes.items()}
    return shared


def lars(epochs: int) -> OptimConfig:
    """SimCLR's on ImageNet: 512 images on each of 8 processes, at a rate of 0.3·B/256."""
    return OptimConfig(
        name="lars", epochs=epochs, batch_size=512, lr=4.8, weight_decay=1e-6, decay_all=False, warmup_updates=3120,
        schedule="cosine",
    )  # fmt: skip


def steps() -> OptimConfig:
    """MoCo's and NPID's on ImageNet: SGD whose rate falls twice."""
    return OptimConfig(
        name="sgd", epochs=200, batch_size=256, lr=0.03, weight_decay=1e-4, warmup_updates=0,
        milestones=(120, 160), gamma=0.1,
    )  # fmt: skip


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
class TemperatureConfig:
    """The loss, a softmax over similarities.

    Args:
        temperature: of the softmax.
        backend: engine backend; chosen by the machine if left out.
    """

    temperature: float = setting(0.1, ABOVE_0)
    backend: str | None = setting(None, BACKEND)


@dataclass
class ProjectedConfig(Method):
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
