"""CPC on images in the loop (arXiv 1807.03748): a grid of overlapping patches, predicted from top to bottom."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fused_nce.models import CPC
from fused_nce.train.limits import AT_LEAST_0, AT_LEAST_1, Rule, optional, setting
from fused_nce.train.methods import presets
from fused_nce.train.methods.cpc import CPCLossConfig, optimizer
from fused_nce.train.methods.presets import CIFAR10_COLOURS, crops
from fused_nce.train.methods.projected import TINY_OPTIM
from fused_nce.train.settings import AugmentConfig, OptimConfig

THREE = Rule("three numbers, each at least 1", lambda v: len(v) == 3 and all(map(AT_LEAST_1.holds, v)))


@dataclass
class CPCVisionModelConfig:
    """A residual network without BatchNorm on each patch, and a context down the rows.

    Args:
        image_size: side in px.
        patch_size: px, of which a half overlaps the next patch; a quarter of the image gives 7×7.
        width: channels of the first layer; a patch's vector has 16 times as many.
        stages: residual blocks of the three stages.
        stem: "small" for patches of 16 px or fewer, "large" for the paper's 64.
        jitter: px by which each patch moves in training.
        context: "pixelcnn" (all columns), "gru" (each column by itself) or "none".
        hidden: channels of the context; the patch vector's if left out.
        layers: of the PixelCNN.
        steps: rows that are predicted, each by a matrix of its own.
        skip: rows left out before the first: half of a patch is in the next row's.
        init: of the encoder: torch's, or Kaiming's for ReLU.
    """

    image_size: int = setting(256, AT_LEAST_1)
    patch_size: int = setting(64, AT_LEAST_1)
    width: int = setting(64, AT_LEAST_1)
    stages: tuple[int, ...] = setting((3, 4, 23), THREE)
    stem: Literal["small", "large"] = "large"
    jitter: int = setting(4, AT_LEAST_0)
    context: Literal["pixelcnn", "gru", "none"] = "pixelcnn"
    hidden: int | None = setting(None, optional(AT_LEAST_1))
    layers: int = setting(4, AT_LEAST_1)
    steps: int = setting(5, AT_LEAST_1)
    skip: int = setting(1, AT_LEAST_0)
    init: Literal["torch", "kaiming"] = "torch"


# ResNet-50 without BatchNorm on patches of 16 px, as Greedy InfoMax has it.
SMALL: dict[str, Any] = {"image_size": 64, "patch_size": 16, "stages": [3, 4, 6], "stem": "small", "jitter": 0}
PATCHES_OF_8: dict[str, Any] = SMALL | {"image_size": 32, "patch_size": 8}
STL_COLOURS: dict[str, Any] = {"mean": [0.4313, 0.4156, 0.3663], "std": [0.2683, 0.2610, 0.2687]}

# `default` is the paper's on ImageNet: crops of 256 px from 300, gray, 32 GPUs × 16; it does not say how long. `stl10`
# is Greedy InfoMax's CPC, with all of the batch for negatives where it draws 16. `cifar10` has bolts' patches and rate.
# `digits` and `cifar10-tiny` are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "imagenet": {},
    "stl10": {
        "model": SMALL,
        "augment": {"crop_area": [4 / 9, 4 / 9], "gray_p": 0.0, **STL_COLOURS},
        "optim": {"epochs": 300, "batch_size": 32},
    },
    "cifar10": {
        "model": PATCHES_OF_8,
        "augment": {"geometry": "translate", "gray_p": 0.0, **CIFAR10_COLOURS},
        "optim": {"epochs": 300, "batch_size": 64, "lr": 1e-4},
    },
    "cifar10-tiny": {
        "model": {**PATCHES_OF_8, "width": 16, "stages": [1, 1, 1], "layers": 2, "init": "kaiming"},
        "augment": {"geometry": "translate", "gray_p": 0.0, **CIFAR10_COLOURS},
        "optim": {**TINY_OPTIM, "epochs": 6, "lr": 5e-4},  # one view an image
    },
    "digits": {
        "model": {
            **SMALL, "image_size": 16, "patch_size": 4, "width": 8, "stages": [1, 1, 1], "layers": 2,
            "init": "kaiming",
        },
        "augment": {
            "flip_p": 0.0, "geometry": "none", "gray_p": 0.0, "mean": [0.3] * 3, "std": [0.35] * 3
        },
        "optim": {"epochs": 20, "batch_size": 64, "lr": 1e-3, "warmup_updates": 20, "schedule": "cosine"},
        "run": {"log_every": 5},
    },
}  # fmt: skip


def _augment() -> AugmentConfig:
    area = (256 / 300) ** 2
    return crops(crop_area=(area, area), crop_ratio=(1.0, 1.0), jitter_p=0.0, gray_p=1.0)


@dataclass
class CPCVisionConfig(presets.TwoInits):
    method: ClassVar[str] = "cpc-vision"
    title: ClassVar[str] = "CPC"
    presets: ClassVar = PRESETS
    taps: ClassVar = ("c_t", "z_t")

    model: CPCVisionModelConfig = field(default_factory=CPCVisionModelConfig)
    loss: CPCLossConfig = field(default_factory=CPCLossConfig)
    augment: AugmentConfig = field(default_factory=_augment)
    optim: OptimConfig = field(default_factory=lambda: optimizer(epochs=300, batch_size=512))

    def build(self, *, images: int = 1) -> CPC:
        return self.drawn(CPC.vision(**self.arguments(), negatives=self.loss.negatives, loss=self.loss.build()))
