"""SimCLR v2's distillation in the loop (arXiv 2006.10029): a student of a fine-tuned run, on images without labels."""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fused_nce.models.distil import DistillationLoss, Distilled
from fused_nce.train import config as settings
from fused_nce.train import teacher
from fused_nce.train.data.loader import Loader
from fused_nce.train.data.recordings import WindowLoader
from fused_nce.train.limits import ABOVE_0, Rule, number, optional, setting
from fused_nce.train.methods import projected
from fused_nce.train.methods.presets import CIFAR_VIEWS, DIGITS_VIEWS, crops
from fused_nce.train.methods.projected import ADAM, CIFAR_R18, DIGITS_OPTIM, TINY_OPTIM, lars
from fused_nce.train.settings import BACKBONE, SIDE, AugmentConfig, OptimConfig


@dataclass
class DistilModelConfig:
    """The student.

    Args:
        teacher: folder of a run that `fused-nce fine-tune` made a classifier of; needed to train.
        classes: of the teacher.
        image_size: side in px.
        backbone: "tiny" or "mini" (ours), a torchvision classifier, or "timm/NAME".
        stem: "imagenet", or "cifar": a ResNet's first layers for 32 px.
        init: "kaiming", or "zero": residual branches start at zero.
    """

    teacher: str | None = setting(None, optional(Rule("the folder of a run", bool)))
    classes: int = setting(1000, number("at least 2", lambda v: v >= 2))
    image_size: int = setting(224, SIDE)
    backbone: str = setting("resnet50", BACKBONE)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    init: Literal["kaiming", "zero"] = "kaiming"


@dataclass
class DistilLossConfig:
    """The cross-entropy with the teacher's answers.

    Args:
        temperature: of both softmaxes.
    """

    temperature: float = setting(1.0, ABOVE_0)


# All ours: with crops and flips alone, as v2 has it, and the rates of the other presets.
OPTIM: dict[str, Any] = {**ADAM, "lr": 1e-3}
TEN: dict[str, Any] = {"classes": 10}
PLAIN: dict[str, Any] = {"jitter_p": 0.0, "gray_p": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cifar10": {
        "model": {**CIFAR_R18, **TEN},
        "augment": CIFAR_VIEWS | PLAIN,
        "optim": {**OPTIM, "epochs": 200, "batch_size": 128, "warmup_updates": 1000},
    },
    "cifar10-tiny": {
        "model": {"image_size": 32, "backbone": "tiny", **TEN},
        "augment": CIFAR_VIEWS | PLAIN,
        "optim": {**TINY_OPTIM, **OPTIM, "epochs": 6},
    },
    "digits": {
        "model": {"image_size": 16, "backbone": "mini", **TEN},
        "augment": DIGITS_VIEWS,
        "optim": DIGITS_OPTIM,
        "run": {"log_every": 5},
    },
}


@dataclass
class DistilConfig(projected.ProjectedConfig):
    method: ClassVar[str] = "distil"
    title: ClassVar[str] = "Distillation"
    presets: ClassVar = PRESETS
    processes: ClassVar = {"default": 8}
    stats: ClassVar = ("agreement",)
    view_count: ClassVar[int] = 1

    model: DistilModelConfig = field(default_factory=DistilModelConfig)
    loss: DistilLossConfig = field(default_factory=DistilLossConfig)
    augment: AugmentConfig = field(default_factory=lambda: crops(crop_area=(0.08, 1.0), jitter_p=0.0, gray_p=0.0))
    optim: OptimConfig = field(default_factory=lambda: lars(epochs=400))

    def build(self, *, images: int = 1) -> Distilled:
        arguments = self.model_arguments()
        run = arguments.pop("teacher")
        make = functools.partial(teacher.load, run) if run else None
        return Distilled(teacher=make, **arguments, loss=DistillationLoss(self.loss.temperature))

    def open_loader(self, rank: int, world: int) -> Loader | WindowLoader:
        """With a teacher that fits.

        Raises:
            ValueError: without one, or for one of other images or classes.
        """
        if self.model.teacher is None:
            raise ValueError("model.teacher: must be the folder of a fine-tuned run, got null")
        seen: Any = settings.load(self.model.teacher)
        for name, own, other in (
            ("model.classes", self.model.classes, teacher.classes(self.model.teacher)),
            ("model.image_size", self.model.image_size, seen.model.image_size),
            ("augment.mean", self.augment.mean, seen.augment.mean),
            ("augment.std", self.augment.std, seen.augment.std),
        ):
            if own != other:
                raise ValueError(f"{name}: must be the teacher's {other}, got {own}")
        return super().open_loader(rank, world)

    def beside_data(self) -> dict[str, str]:
        return {} if self.model.teacher is None else {"the teacher's classifier": teacher.digest(self.model.teacher)}
