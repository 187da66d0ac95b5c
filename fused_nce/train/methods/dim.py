"""Deep InfoMax in the loop (arXiv 1808.06670): one view, and a discriminator with an optimizer of its own."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fused_nce.models import DIM
from fused_nce.models.encoders.dim import ARCHITECTURES
from fused_nce.train.limits import AT_LEAST_0, AT_LEAST_1, BELOW_1, optional, setting
from fused_nce.train.methods.coded import PRESETS as SHARED
from fused_nce.train.methods.coded import SHORTER, STL, CodeConfig, CodedConfig


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


COMPARED = {"mi_units": 1024, "gamma": 0.0}  # with CPC: the information alone

# `default` is DIM(L) as the paper and its code train it on CIFAR.
PRESETS: dict[str, dict[str, Any]] = {
    **SHARED,
    "digits": SHARED["digits"] | {"loss": {"mi_units": 128}, "augment": {"mean": [0.3] * 3, "std": [0.35] * 3}},
    "cifar10-tiny": SHARED["cifar10-tiny"] | {"loss": {"mi_units": 256}},
    "cifar10-jsd": {"loss": {"estimator": "jsd"}},
    "cifar10-dv": {"loss": {"estimator": "dv"}},
    "cifar10-global": {"loss": {"estimator": "jsd", "alpha": 1.0, "beta": 0.0, "gamma": 1.0}},
    "cifar10-global-local": {"loss": {"estimator": "jsd", "alpha": 0.5, "beta": 0.1}},
    "cifar10-occlude": {"loss": {"occlusion": 0.5}},
    "cifar10-coord": {"loss": {"absolute": 1.0, "relative": 1.0}},
    "cifar10-occlude-coord": {"loss": {"occlusion": 0.5, "absolute": 1.0, "relative": 1.0}},
    "cifar10-crops": {"model": {"architecture": "crops-resnet19-32"}, "loss": COMPARED},
    "cifar10-crops-several": {"model": {"architecture": "crops-resnet19-32-several"}, "loss": COMPARED},
    "stl10-crops": {
        "model": {"architecture": "crops-alexnet64"}, "loss": COMPARED, "augment": STL, "optim": SHORTER
    },
    "stl10-crops-several": {
        "model": {"architecture": "crops-alexnet64-several"}, "loss": COMPARED, "augment": STL, "optim": SHORTER
    },
}  # fmt: skip


@dataclass
class DIMConfig(CodedConfig):
    method: ClassVar[str] = "dim"
    title: ClassVar[str] = "DIM"
    presets: ClassVar = PRESETS
    stats: ClassVar = (
        "local", "global", "prior", "discriminator", "discriminator_acc", "absolute_acc", "relative_acc", "js_bound"
    )  # fmt: skip

    model: CodeConfig = field(default_factory=CodeConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def build(self, *, images: int = 1) -> DIM:
        return self.drawn(DIM(**self.arguments(), **vars(self.loss)))

    def leaves_some_unused(self) -> bool:
        """Several global vectors are taken before the fully connected layers, which the other parts alone train."""
        several, c = ARCHITECTURES[self.model.architecture].several, self.loss
        return several and not any((c.alpha, c.gamma, c.absolute, c.relative))
