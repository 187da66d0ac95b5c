"""AMDIM in the loop (arXiv 1906.00910): two views, three pairs of maps."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fused_nce.losses import AMDIMLoss, MultiscaleMixtureLoss
from fused_nce.models import AMDIM
from fused_nce.models.encoders.amdim import IMAGE_SIZES, trunk_width
from fused_nce.train.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Rule, one_of, optional, setting
from fused_nce.train.method import Method
from fused_nce.train.methods.presets import DIGITS_VIEWS
from fused_nce.train.methods.presets import IMAGENET_CROPS as IMAGENET
from fused_nce.train.methods.presets import STL_CROPS as STL
from fused_nce.train.settings import BACKEND

MAPS = ("1", "5", "7")  # what an encoder offers to a loss
PAIRS = Rule(
    "different pairs A>C of the maps 1, 5 and 7, at least one, such as 1>5",
    lambda pairs: (
        len(pairs) > 0
        and len(set(pairs)) == len(pairs)
        and all(len(sides := pair.split(">")) == 2 and set(sides) <= set(MAPS) for pair in pairs)
    ),
)
IMAGENET_OPTIM = {"epochs": 50, "milestones": [30, 45]}


@dataclass
class ModelConfig:
    """The encoder.

    Args:
        image_size: 32, 64 or 128 px.
        ndf: channels of the first stage.
        n_rkhs: width of the embeddings.
        n_depth: layers of each residual block.
        use_bn: BatchNorm inside the blocks.
        init: zero-initialised branches ("amdim") or Kaiming.
        mixture: components in the place of f1 in the loss; 1 is f1 itself.
    """

    image_size: int = setting(32, one_of(IMAGE_SIZES))
    ndf: int = setting(128, AT_LEAST_1)
    n_rkhs: int = setting(1024, AT_LEAST_1)
    n_depth: int = setting(3, AT_LEAST_1)
    use_bn: bool = False
    init: Literal["amdim", "kaiming"] = "amdim"
    mixture: int = setting(1, AT_LEAST_1)


@dataclass
class LossConfig:
    """The AMDIM loss.

    Args:
        pairs: antecedent and consequent maps, "1>5" for f1 against all of f5.
        antecedents: one sampled location an image, or all of them.
        scale: of the dot products; 1/sqrt(D) if left out.
        clip: soft limit of the scores, clip * tanh(s / clip); null for none.
        penalty: weight of the mean squared raw score: 0.05 in amdim-public, 0.04 in the paper.
        tau: of a mixture: how sharply its components compete.
        backend: engine backend; chosen by the machine if left out.
    """

    pairs: tuple[str, ...] = setting(("1>5", "1>7", "5>5"), PAIRS)
    antecedents: Literal["sample", "all"] = "sample"
    scale: float | None = setting(None, optional(ABOVE_0))
    clip: float | None = setting(20.0, optional(ABOVE_0))
    penalty: float = setting(0.05, AT_LEAST_0)  # fault: upstream-presets-paper
    tau: float = setting(1.0, ABOVE_0)
    backend: str | None = setting(None, BACKEND)


# `default` is amdim-public's train.py, loss and optimiser included, and all the others start from it. `cifar10-small`
# and `stl10-small` are its settings for those sets, `imagenet-small` its recipe for four V100, `imagenet-medium` and
# `imagenet-large` its released models. The encoder sizes of `*-large` are lightning-bolts' too (which trains them with
# eps 1e-7 and, since its clip is not passed on, a clip of 10). `digits`, `cifar10-tiny` and `cifar10-*min` are ours.
SMALL: dict[str, Any] = {"model": {"ndf": 128, "n_rkhs": 1024, "n_depth": 3}}
LARGE: dict[str, Any] = {"model": {"ndf": 320, "n_rkhs": 1280, "n_depth": 10}}
PAPER_PENALTY = {"penalty": 0.04}
TINY: dict[str, Any] = {
    "model": {"ndf": 64, "n_rkhs": 256, "n_depth": 2},
    "loss": PAPER_PENALTY,
    "optim": {"epochs": 3, "batch_size": 128, "lr": 2e-3, "warmup_updates": 100, "schedule": "cosine"},
}
MUON: dict[str, Any] = {"name": "muon", "lr": 5e-3, "momentum": 0.95}
TIMED: dict[str, Any] = TINY | {"model": {"ndf": 80, "n_rkhs": 448, "n_depth": 2}}
EPOCHS = {12: 3, 30: 8, 60: 16}  # in so many minutes, start and save included, at 227 images/s: two Zen 5 cores
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "digits": {
        "model": {"ndf": 32, "n_rkhs": 256, "n_depth": 2},
        "loss": PAPER_PENALTY,
        "augment": DIGITS_VIEWS,
        "optim": TINY["optim"] | MUON | {"epochs": 30, "lr": 3e-3, "warmup_updates": 30},
        "run": {"log_every": 5},
    },
    "cifar10-tiny": TINY,
    **{f"cifar10-{m}min": TIMED | {"optim": TINY["optim"] | MUON | {"epochs": n}} for m, n in EPOCHS.items()},
    "cifar10-small": SMALL,
    "cifar10-large": LARGE,
    "cifar100-small": SMALL,  # with CIFAR-10's colours, as amdim-public has it
    "cifar100-large": LARGE,
    "stl10-small": {"model": {"image_size": 64, "ndf": 128, "n_rkhs": 1024, "n_depth": 3}, "augment": STL},
    "stl10-large": {"model": {"image_size": 64, "ndf": 192, "n_rkhs": 1536, "n_depth": 8}, "augment": STL},
    "imagenet-small": {
        "model": {"image_size": 128, "ndf": 192, "n_rkhs": 1536, "n_depth": 8},
        "augment": IMAGENET,
        "optim": IMAGENET_OPTIM | {"batch_size": 480},
    },
    "imagenet-medium": {
        "model": {"image_size": 128, "ndf": 256, "n_rkhs": 2048, "n_depth": 10},
        "augment": IMAGENET,
        "optim": IMAGENET_OPTIM,
    },
    "imagenet-large": {
        "model": {"image_size": 128, "ndf": 320, "n_rkhs": 2560, "n_depth": 10},
        "augment": IMAGENET,
        "optim": IMAGENET_OPTIM,
    },
}


@dataclass
class AMDIMConfig(Method):
    method: ClassVar[str] = "amdim"
    title: ClassVar[str] = "AMDIM"
    in_parts: ClassVar[bool] = True
    presets: ClassVar = PRESETS
    taps: ClassVar = ("f1", "f7")
    stats: ClassVar = ("entropy",)  # of a mixture's posterior: log m, all components alike; 0, one explains all

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def build(self, *, images: int = 1) -> AMDIM:
        settings = dict(vars(self.loss))
        tau = settings.pop("tau")
        mixed = self.model.mixture > 1
        loss = MultiscaleMixtureLoss(tau=tau, **settings) if mixed else AMDIMLoss(**settings)
        return AMDIM(**vars(self.model), loss=loss)

    def check_together(self) -> None:
        m = self.model
        width = trunk_width(m.image_size, m.ndf)
        if m.n_rkhs < width:
            raise ValueError(
                f"model.n_rkhs: must be at least {width} ({width // m.ndf} x ndf at {m.image_size} px), got {m.n_rkhs}"
            )
        if m.mixture > 1 and not any(pair.startswith("1>") for pair in self.loss.pairs):
            raise ValueError(
                f"model.mixture: must be 1 without a pair from map 1 in loss.pairs {self.loss.pairs}, got {m.mixture}"
            )
        super().check_together()

    def leaves_some_unused(self) -> bool:
        """A map outside all pairs leaves its head unused."""
        return {side for pair in self.loss.pairs for side in pair.split(">")} != set(MAPS)

    def untrained(self) -> dict[str, Method]:
        kinds: dict[str, Literal["amdim", "kaiming"]] = {"AMDIM": "amdim", "Kaiming": "kaiming"}
        return {
            f"random, {name} init": dataclasses.replace(self, model=dataclasses.replace(self.model, init=init))
            for name, init in kinds.items()
        }
