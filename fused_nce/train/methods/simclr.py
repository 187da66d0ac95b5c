"""SimCLR in the loop (arXiv 2002.05709; the head of v2: 2006.10029)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from fused_nce.losses import NTXentLoss
from fused_nce.models import SimCLR
from fused_nce.train.limits import AT_LEAST_1, setting
from fused_nce.train.methods import projected
from fused_nce.train.methods.presets import CIFAR100_COLOURS, CIFAR_VIEWS, crops
from fused_nce.train.methods.projected import ADAM, CIFAR_R18, CIFAR_R50, TemperatureConfig, lars, our_presets
from fused_nce.train.settings import AugmentConfig, OptimConfig


@dataclass
class SimCLRModelConfig(projected.EncoderConfig):
    __doc__ = f"""{projected.EncoderConfig.__doc__}
        norm: BatchNorm in the head.
    """

    layers: int = setting(2, AT_LEAST_1)
    norm: bool = True


# `default` is the paper's ImageNet run of 100 epochs: 4,096 images, here 512 on each of 8 processes, LARS at 0.3·B/256.
# `imagenet-v2` has the head of three layers. `cifar10` is the paper's appendix B.9 (batch 1024, LARS at 1.0·B/256),
# `cifar10-resnet18` solo-learn's, `cifar10-supcontrast` SupContrast's (`--method SimCLR`), whose loss is multiplied by
# temperature / 0.07: under SGD a rate as many times as large and a decay as many times as small. A warm-up of 10 epochs
# is given in updates. `digits` and `cifar10-tiny` are ours.
SCALE = 0.5 / 0.07
CIFAR_OPTIM: dict[str, Any] = {"epochs": 1000, "batch_size": 1024, "lr": 4.0, "warmup_updates": 480}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "imagenet-v1": {},
    "imagenet-v2": {"model": {"layers": 3}},
    "cifar10": {"model": CIFAR_R50, "loss": {"temperature": 0.5}, "augment": CIFAR_VIEWS, "optim": CIFAR_OPTIM},
    "cifar100": {
        "model": CIFAR_R50,
        "loss": {"temperature": 0.5},
        "augment": CIFAR_VIEWS | CIFAR100_COLOURS,
        "optim": CIFAR_OPTIM,
    },
    "cifar10-resnet18": {
        "model": {**CIFAR_R18, "hidden": 2048, "dim": 256, "norm": False},
        "loss": {"temperature": 0.2},
        "augment": CIFAR_VIEWS | {"jitter": [0.8, 0.8, 0.8, 0.2]},
        "optim": {
            "epochs": 1000,
            "batch_size": 256,
            "lr": 0.4,
            "trust": 0.02,
            "weight_decay": 1e-4,
            "warmup_updates": 1950,
        },
    },
    "cifar10-supcontrast": {
        "model": {**CIFAR_R50, "norm": False},
        "loss": {"temperature": 0.5},
        "augment": CIFAR_VIEWS | {"crop_area": [0.2, 1.0]},
        "optim": {
            "name": "sgd",
            "epochs": 1000,
            "batch_size": 1024,
            "lr": 0.5 * SCALE,
            "weight_decay": 1e-4 / SCALE,
            "decay_all": True,
            "warmup_updates": 480,
        },
    },
    **our_presets(
        digits={"loss": {"temperature": 0.5}}, tiny={"loss": {"temperature": 0.5}, "optim": {**ADAM, "lr": 1e-3}}
    ),
}


@dataclass
class SimCLRConfig(projected.ProjectedConfig):
    method: ClassVar[str] = "simclr"
    title: ClassVar[str] = "SimCLR"
    in_parts: ClassVar[bool] = True
    presets: ClassVar = PRESETS
    processes: ClassVar = dict.fromkeys(("default", "imagenet-v1", "imagenet-v2"), 8)

    model: SimCLRModelConfig = field(default_factory=SimCLRModelConfig)
    loss: TemperatureConfig = field(default_factory=TemperatureConfig)
    augment: AugmentConfig = field(
        default_factory=lambda: crops(crop_area=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5)
    )
    optim: OptimConfig = field(default_factory=lambda: lars(epochs=100))

    def build(self, *, images: int = 1) -> SimCLR:
        return SimCLR(**self.model_arguments(), loss=NTXentLoss(**vars(self.loss)))
