"""MoCo v1 and v2 in the loop (arXiv 1911.05722, 2003.04297)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fused_nce.losses import MoCoLoss
from fused_nce.models import MoCo
from fused_nce.train.limits import ABOVE_0, AT_LEAST_1, SHARE, setting
from fused_nce.train.methods import projected
from fused_nce.train.methods.presets import CIFAR100_COLOURS, CIFAR_VIEWS, crops
from fused_nce.train.methods.projected import CIFAR_R18, TemperatureConfig, our_presets, steps
from fused_nce.train.settings import AugmentConfig, OptimConfig


@dataclass
class MoCoModelConfig(projected.EncoderConfig):
    __doc__ = f"""{projected.EncoderConfig.__doc__}
        queue_size: keys that are kept.
        momentum: of the key encoder.
        splits: parts of a batch with BatchNorm statistics of their own: 8 on one process is what 8 processes have.
        symmetric: the mean of both directions.
    """

    queue_size: int = setting(65536, AT_LEAST_1)
    momentum: float = setting(0.999, SHARE)
    splits: int = setting(8, AT_LEAST_1)
    symmetric: bool = False


@dataclass
class MoCoLossConfig(TemperatureConfig):
    __doc__ = TemperatureConfig.__doc__

    temperature: float = setting(0.07, ABOVE_0)


# `default` is moco's main_moco.py: v1 on ImageNet, 256 images on 8 GPUs. Here it is one process of 8 splits; on 8
# processes take --batch-size 32 --model.splits 1. The cosine falls at every update, theirs at every epoch. `cifar10`
# is lightly's benchmark. `digits` and `cifar10-tiny` are ours.
V2: dict[str, Any] = {
    "model": {"layers": 2},
    "loss": {"temperature": 0.2},
    "augment": {"jitter": [0.4, 0.4, 0.4, 0.1], "jitter_p": 0.8, "blur_p": 0.5},
    "optim": {"schedule": "cosine"},
}
CIFAR: dict[str, Any] = {
    "model": {**CIFAR_R18, "layers": 2, "queue_size": 4096, "momentum": 0.99, "symmetric": True},
    "loss": {"temperature": 0.1},
    "optim": {"lr": 0.06, "weight_decay": 5e-4, "batch_size": 128, "schedule": "cosine"},
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "imagenet-v1": {},
    "imagenet-v2": V2,
    "cifar10": {**CIFAR, "augment": CIFAR_VIEWS},
    "cifar100": {**CIFAR, "augment": CIFAR_VIEWS | CIFAR100_COLOURS},
    **our_presets(
        digits={"model": {"queue_size": 512, "momentum": 0.99}, "loss": {"temperature": 0.2}},
        tiny={
            "model": {"queue_size": 4096, "momentum": 0.99, "symmetric": True},
            "loss": {"temperature": 0.1},
            "optim": {"lr": 0.06, "weight_decay": 5e-4},
        },
    ),
}


@dataclass
class MoCoConfig(projected.ProjectedConfig):
    method: ClassVar[str] = "moco"
    title: ClassVar[str] = "MoCo"
    presets: ClassVar = PRESETS

    model: MoCoModelConfig = field(default_factory=MoCoModelConfig)
    loss: MoCoLossConfig = field(default_factory=MoCoLossConfig)
    augment: AugmentConfig = field(default_factory=lambda: crops(jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1.0))
    optim: OptimConfig = field(default_factory=steps)

    def build(self, *, images: int = 1) -> MoCo:
        return MoCo(**self.model_arguments(), loss=MoCoLoss(**vars(self.loss)))

    def check_together(self) -> None:
        super().check_together()
        if self.optim.batch_size % self.model.splits:
            raise ValueError(
                f"model.splits: must divide optim.batch_size {self.optim.batch_size}, got {self.model.splits}"
            )
