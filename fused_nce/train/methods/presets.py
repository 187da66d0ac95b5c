"""What the methods' presets share: the data sets' own numbers, views, and the two ways to draw an encoder's weights."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn

from fused_nce.models.base import Model
from fused_nce.train.method import Method
from fused_nce.train.settings import AugmentConfig

STL_CROPS: dict[str, Any] = {"geometry": "crop", "mean": [0.43, 0.42, 0.39], "std": [0.27, 0.26, 0.27]}
IMAGENET_COLOURS: dict[str, Any] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
IMAGENET_CROPS: dict[str, Any] = {"geometry": "crop", "jitter": [0.4, 0.4, 0.4, 0.1], **IMAGENET_COLOURS}
CIFAR10_COLOURS: dict[str, Any] = {
    "mean": [125.3 / 255, 123.0 / 255, 113.9 / 255],
    "std": [63.0 / 255, 62.1 / 255, 66.7 / 255],
}
CIFAR100_COLOURS: dict[str, Any] = {"mean": [0.5071, 0.4867, 0.4408], "std": [0.2675, 0.2565, 0.2761]}

# Digits have no colour and no mirror image.
DIGITS_VIEWS: dict[str, Any] = {
    "flip_p": 0.0,
    "geometry": "affine",
    "geometry_p": 1.0,
    "jitter": [0.4, 0.4, 0.0, 0.0],
    "gray_p": 0.0,
    "mean": [0.3, 0.3, 0.3],
    "std": [0.35, 0.35, 0.35],
}
# SimCLR's for CIFAR-10: half the colour strength, no blur (appendix B.9); lightly, solo-learn and SupContrast agree.
CIFAR_VIEWS: dict[str, Any] = {
    "crop_area": [0.08, 1.0],
    "jitter": [0.4, 0.4, 0.4, 0.1],
    "jitter_p": 0.8,
    "gray_p": 0.2,
    "blur_p": 0.0,
    **CIFAR10_COLOURS,
}


def crops(**changes: Any) -> AugmentConfig:
    """Random resized crops of ImageNet, each view flipped by itself: the ground that MoCo, SimCLR and NPID share."""
    shared: dict[str, Any] = {
        "flip_shared": False,
        "geometry": "crop",
        "crop_area": (0.2, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "gray_p": 0.2,
        "mean": tuple(IMAGENET_COLOURS["mean"]),
        "std": tuple(IMAGENET_COLOURS["std"]),
    }
    return AugmentConfig(**shared | changes)


def unmoved() -> AugmentConfig:
    """The image as it is, in [−1, 1]."""
    return AugmentConfig(
        flip_p=0.0, geometry="none", jitter_p=0.0, gray_p=0.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )


Init = Literal["torch", "kaiming"]
Drawn = TypeVar("Drawn", bound=Model)


def draw_(encoder: nn.Module, init: Init) -> None:
    """As torch does it, or every convolution by Kaiming's rule for ReLU (He et al. 2015), its bias 0."""
    for layer in encoder.modules() if init == "kaiming" else ():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@dataclass
class TwoInits(Method):
    """A method whose `model.init` says how its encoder is drawn: an evaluation compares with both."""

    view_count: ClassVar[int] = 1

    def arguments(self) -> dict[str, Any]:
        """Of the model's constructor."""
        return {name: value for name, value in vars(self.model).items() if name != "init"}

    def drawn(self, model: Drawn) -> Drawn:
        """The model, its encoder's weights as `model.init` has them."""
        draw_(model.encoder, self.model.init)  # type: ignore[arg-type]
        return model

    def untrained(self) -> dict[str, Method]:
        """With each `model.init`, by the names that an evaluation prints."""
        names = {"random, torch's init": "torch", "random, Kaiming init": "kaiming"}
        return {
            name: dataclasses.replace(self, model=dataclasses.replace(self.model, init=init))
            for name, init in names.items()
        }

    def check_together(self) -> None:
        """Refuse settings that do not fit each other: the model's own checks, on weights that nothing stores."""
        super().check_together()
        with torch.device("meta"):
            self.build()
