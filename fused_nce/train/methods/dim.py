"""Deep InfoMax in the loop (arXiv 1808.06670): one view, and a discriminator with an optimizer of its own."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fused_nce.models import DIM
from fused_nce.models.encoders.dim import ARCHITECTURES
from fused_nce.train import optim
from fused_nce.train.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, one_of, optional, setting
from fused_nce.train.methods import presets
from fused_nce.train.methods.presets import unmoved
from fused_nce.train.methods.projected import TINY_OPTIM
from fused_nce.train.settings import AugmentConfig, OptimConfig


@dataclass
class ModelConfig:
    """The encoder.

    Args:
        architecture: by layers and image size; see `fused_nce.models.DIM`.
        width: multiplies the channels; 1 is the paper's.
        code: units of Y.
        init: of the encoder: torch's, or Kaiming's for ReLU.
    """

    architecture: str = setting("dcgan32", one_of(tuple(ARCHITECTURES)))
    width: float = setting(1.0, ABOVE_0)
    code: int = setting(64, AT_LEAST_1)
    init: Literal["torch", "kaiming"] = "torch"

    @property
    def image_size(self) -> int:
        """Of the architecture, px."""
        return ARCHITECTURES[self.architecture].image_size


@dataclass
class LossConfig:
    """DIM(L) by the paper's weights; DIM(G) is alpha 1, beta 0, gamma 1.

    Args:
        estimator: of the information: Jensen-Shannon, Donsker-Varadhan, or infoNCE.
        anchor: of "nce": which side of a pair the negatives are found for.
        critic: "dot" embeds and multiplies, "concat" has a network behind every pair.
        mi_units: width of the "dot" embeddings.
        critic_negatives: other images that "concat" compares each with; null for all.
        alpha: weight of the global information.
        beta: weight of the local information.
        gamma: weight of the prior in the encoder's loss.
        game: the encoder's side of the prior: the paper's "minimax", or the "non-saturating" one of its code.
        gradient_penalty: of the discriminator.
        absolute: weight of the coordinates of a location.
        relative: weight of the coordinates between two.
        occlusion: side of the square hidden from the code, of the image's side.
    """

    estimator: Literal["jsd", "dv", "nce"] = "nce"
    anchor: Literal["global", "local", "both"] = "global"
    critic: Literal["dot", "concat"] = "dot"
    mi_units: int = setting(2048, AT_LEAST_1)
    critic_negatives: int | None = setting(1, optional(AT_LEAST_1))
    alpha: float = setting(0.0, AT_LEAST_0)
    beta: float = setting(1.0, AT_LEAST_0)
    gamma: float = setting(0.1, AT_LEAST_0)
    game: Literal["minimax", "non-saturating"] = "minimax"
    gradient_penalty: float = setting(1.0, AT_LEAST_0)
    absolute: float = setting(0.0, AT_LEAST_0)
    relative: float = setting(0.0, AT_LEAST_0)
    occlusion: float = setting(0.0, BELOW_1)


SHORTER = {"epochs": 200}
ALEXNET = {"architecture": "alexnet64"}
# A 64 px piece of an image of 96 px, unscaled, and a flip.
STL: dict[str, Any] = {"flip_p": 0.5, "geometry": "crop", "crop_area": [4 / 9, 4 / 9], "crop_ratio": [1.0, 1.0]}
COMPARED = {"mi_units": 1024, "gamma": 0.0}  # with CPC: the information alone

# `default` is DIM(L) as the paper and its code train it on CIFAR; the paper's other sets change encoder and length.
# `digits` and `cifar10-tiny` are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "digits": {
        "model": {"width": 0.25},
        "loss": {"mi_units": 128},
        "augment": {"mean": [0.3] * 3, "std": [0.35] * 3},
        "optim": {"epochs": 40, "batch_size": 64, "lr": 1e-3, "schedule": "cosine"},
        "run": {"log_every": 5},
    },
    "cifar10-tiny": {
        "model": {"architecture": "tiny32"},
        "loss": {"mi_units": 256},
        "optim": {**TINY_OPTIM, "epochs": 6, "lr": 1e-3},  # one view an image
    },
    "cifar10": {},
    "cifar100": {},
    "cifar10-jsd": {"loss": {"estimator": "jsd"}},
    "cifar10-dv": {"loss": {"estimator": "dv"}},
    "cifar10-global": {"loss": {"estimator": "jsd", "alpha": 1.0, "beta": 0.0, "gamma": 1.0}},
    "cifar10-global-local": {"loss": {"estimator": "jsd", "alpha": 0.5, "beta": 0.1}},
    "cifar10-occlude": {"loss": {"occlusion": 0.5}},
    "cifar10-coord": {"loss": {"absolute": 1.0, "relative": 1.0}},
    "cifar10-occlude-coord": {"loss": {"occlusion": 0.5, "absolute": 1.0, "relative": 1.0}},
    "cifar10-crops": {"model": {"architecture": "crops-resnet19-32"}, "loss": COMPARED},
    "cifar10-crops-several": {"model": {"architecture": "crops-resnet19-32-several"}, "loss": COMPARED},
    "stl10": {"model": ALEXNET, "augment": STL, "optim": SHORTER},
    "stl10-crops": {
        "model": {"architecture": "crops-alexnet64"}, "loss": COMPARED, "augment": STL, "optim": SHORTER
    },
    "stl10-crops-several": {
        "model": {"architecture": "crops-alexnet64-several"}, "loss": COMPARED, "augment": STL, "optim": SHORTER
    },
    "tinyimagenet": {"model": ALEXNET, "optim": SHORTER},
    "celeba": {"model": {"architecture": "dcgan64"}, "optim": SHORTER},
}  # fmt: skip


@dataclass
class DIMConfig(presets.TwoInits):
    method: ClassVar[str] = "dim"
    title: ClassVar[str] = "DIM"
    presets: ClassVar = PRESETS
    taps: ClassVar = ("fc", "conv", "Y")
    stats: ClassVar = (
        "local", "global", "prior", "discriminator", "discriminator_acc", "absolute_acc", "relative_acc", "js_bound"
    )  # fmt: skip

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=unmoved)  # the paper augments STL-10 alone
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            epochs=1000, batch_size=64, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, warmup_updates=0,
            schedule="constant",
        )
    )  # fmt: skip

    def build(self, *, images: int = 1) -> DIM:
        return self.drawn(DIM(**self.arguments(), **vars(self.loss)))

    def optimizers(self, module: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """`optimizer`, and `discriminator` where there is a prior."""
        prior: nn.Module | None = module.get_submodule("model").prior  # type: ignore[assignment]
        found = {"optimizer": optim.build(module, self.optim, without=prior)}
        return found if prior is None else found | {"discriminator": optim.build(prior, self.optim)}

    def leaves_some_unused(self) -> bool:
        """Several global vectors are taken before the fully connected layers, which the other parts alone train."""
        several, c = ARCHITECTURES[self.model.architecture].several, self.loss
        return several and not any((c.alpha, c.gamma, c.absolute, c.relative))
