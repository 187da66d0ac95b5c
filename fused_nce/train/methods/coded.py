"""What the settings of the methods on DIM's encoder share: DIM itself, and what its paper compares it with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fused_nce.models.coded import Coded
from fused_nce.models.encoders.dim import ARCHITECTURES
from fused_nce.train import optim
from fused_nce.train.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, number, one_of, setting
from fused_nce.train.methods import presets
from fused_nce.train.methods.presets import unmoved
from fused_nce.train.methods.projected import TINY_OPTIM
from fused_nce.train.settings import AugmentConfig, OptimConfig


@dataclass
class CodeConfig:
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


EIGHTS = number("a multiple of 8", lambda v: v >= 8 and v % 8 == 0)


@dataclass
class AutoencoderConfig(CodeConfig):
    __doc__ = f"""{CodeConfig.__doc__}
        decoder: channels of the decoder's 4 × 4 map; 512 is the paper's.
    """

    decoder: int = setting(512, EIGHTS)


@dataclass
class GameConfig:
    """The game with a discriminator.

    Args:
        game: the other side: "minimax", or "non-saturating", whose gradient lives on while the discriminator wins.
        gradient_penalty: of the discriminator.
    """

    game: Literal["minimax", "non-saturating"] = "non-saturating"
    gradient_penalty: float = setting(1.0, AT_LEAST_0)


GAME_STATS = ("error", "prior", "discriminator", "discriminator_acc")
SHORTER = {"epochs": 200}
ALEXNET = {"architecture": "alexnet64"}
# A 64 px piece of an image of 96 px, unscaled, and a flip.
STL: dict[str, Any] = {"flip_p": 0.5, "geometry": "crop", "crop_area": [4 / 9, 4 / 9], "crop_ratio": [1.0, 1.0]}
# The paper's sets change encoder and length; `digits` and `cifar10-tiny` are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cifar10": {},
    "cifar100": {},
    "stl10": {"model": ALEXNET, "augment": STL, "optim": SHORTER},
    "tinyimagenet": {"model": ALEXNET, "optim": SHORTER},
    "celeba": {"model": {"architecture": "dcgan64"}, "optim": SHORTER},
    "digits": {
        "model": {"width": 0.25},
        "optim": {"epochs": 40, "batch_size": 64, "lr": 1e-3, "schedule": "cosine"},
        "run": {"log_every": 5},
    },
    "cifar10-tiny": {
        "model": {"architecture": "tiny32"},
        "optim": {**TINY_OPTIM, "epochs": 6, "lr": 1e-3},  # one view an image
    },
}


def changed(
    shared: Mapping[str, Mapping[str, Any]], section: str, changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Presets of which some differ in a section."""
    found = {name: dict(values) for name, values in shared.items()}
    for name, values in changes.items():
        found[name][section] = found[name].get(section, {}) | values
    return found


DECODED = changed(PRESETS, "model", {"digits": {"decoder": 64}, "cifar10-tiny": {"decoder": 128}})
GENERATED = changed(DECODED, "optim", {"digits": {"lr": 3e-4, "epochs": 80}, "cifar10-tiny": {"lr": 3e-4}})


def adam(first: float = 0.9) -> OptimConfig:
    """The paper's; `first` is Adam's β₁."""
    return OptimConfig(
        epochs=1000, batch_size=64, lr=1e-4, betas=(first, 0.999), weight_decay=0.0, warmup_updates=0,
        schedule="constant",
    )  # fmt: skip


@dataclass
class CodedConfig(presets.TwoInits):
    """One view, as it is; where there is a discriminator, it has an optimizer of its own."""

    taps: ClassVar = ("fc", "conv", "Y")

    augment: AugmentConfig = field(default_factory=unmoved)  # the paper augments STL-10 alone
    optim: OptimConfig = field(default_factory=adam)

    def optimizers(self, module: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """`optimizer`, and `discriminator` where there is one."""
        model: Coded = module.get_submodule("model")  # type: ignore[assignment]
        rivals = model.rivals()
        found = optim.build(module, self.optim, without=rivals, precision=self.precision)
        if rivals is None:
            return found
        return found | optim.build(rivals, self.optim, name="discriminator", precision=self.precision)


@dataclass
class DecodedConfig(CodedConfig):
    """A method whose decoder ends in tanh."""

    presets: ClassVar = DECODED

    def check_together(self) -> None:
        """The images must be in the decoder's range."""
        for name in ("mean", "std"):
            given = tuple(getattr(self.augment, name))
            if given != (0.5, 0.5, 0.5):
                need = f"must be 0.5 x 3 for {self.title}, whose images lie in [-1, 1]"
                raise ValueError(f"augment.{name}: {need}, got {given}")
        super().check_together()


@dataclass
class GeneratedConfig(DecodedConfig):
    """A method whose generator learns from discriminators: Adam's mean of gradients is as short as DCGAN's."""

    presets: ClassVar = GENERATED

    optim: OptimConfig = field(default_factory=lambda: adam(0.5))
