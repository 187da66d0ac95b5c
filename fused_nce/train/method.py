"""What the loop, the checkpoints and the evaluation ask of a method. None of them knows a method by name.

A method is a `Method` of its own, one file in `train/methods/`: its settings, and its answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fused_nce.models.base import Model
from fused_nce.train import limits, optim
from fused_nce.train.data import celeba
from fused_nce.train.data.augment import Views
from fused_nce.train.data.loader import Loader
from fused_nce.train.data.recordings import WindowLoader
from fused_nce.train.evaluation.attributes import evaluate as evaluate_attributes
from fused_nce.train.evaluation.figures import Figures
from fused_nce.train.evaluation.images import evaluate as evaluate_images
from fused_nce.train.evaluation.scoring import Asked
from fused_nce.train.limits import AT_LEAST_1, SEED, Rule, optional, setting
from fused_nce.train.settings import AugmentConfig, OptimConfig, RunConfig, ScaleConfig


@dataclass
class Method:
    """All that decides a run.

    A method gives `model` and `loss` their types and the class variables their values.

    Args:
        data: "digits", a folder of images (one subfolder a class), recordings or CelebA, or shards (folder or glob).
        preset: name of the settings that the others change.
        seed: of the weights, the order and the augmentation.
        precision: "bf16", "fp32", or "auto": bf16 where the hardware has it.
        channels_last: memory format; on if left out and the precision is bf16.
        shuffle_buffer: read shards from front to back, in an order drawn each epoch, through a buffer of so many
            images, from which the next is drawn; null: any image of all is next.
        scale: negatives beyond one forward pass.
        probes: train the online linear and MLP classifiers where there are labels.
    """

    method: ClassVar[str]  # its name on the command line
    title: ClassVar[str]  # its name in print
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]  # each lists what differs from the defaults
    processes: ClassVar[Mapping[str, int]] = {}  # of the run that a preset is of, where it had several
    taps: ClassVar[tuple[str, ...]]  # that the evaluation probes; the online classifiers take the first
    view_count: ClassVar[int] = 2  # of an image in a batch
    in_parts: ClassVar[bool] = False  # its negatives are its batch, and its model encodes that a few images at a time
    extras: ClassVar[tuple[Literal["labels", "indices"], ...]] = ()  # what a batch holds beside the views, in order
    stats: ClassVar[tuple[str, ...]] = ()  # of its loss, to be logged beside the shared ones

    def __init_subclass__(cls) -> None:
        """Methods inherit this docstring, where the command line's help finds the text of each field."""
        super().__init_subclass__()
        cls.__doc__ = cls.__doc__ or Method.__doc__

    data: str = setting("digits", Rule("'digits', a folder or shards", bool))
    preset: str = "default"
    seed: int = setting(0, SEED)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    channels_last: bool | None = None
    shuffle_buffer: int | None = setting(None, optional(AT_LEAST_1))
    probes: bool = True
    model: Any = None
    loss: Any = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def build(self, *, images: int = 1) -> Model:
        """The untrained model.

        Args:
            images: in the training set, for a method that remembers each.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Refuse a setting outside its range, or settings that do not fit each other, before any work is done.

        Raises:
            ValueError: naming the setting, its value and what is needed.
        """
        limits.check(self)
        self.check_together()
        if self.scale.negatives is not None and not self.in_parts:
            raise ValueError(
                f"scale.negatives: must be null for {self.title}, whose batch cannot be encoded in parts, "
                f"got {self.scale.negatives}"
            )
        if self.scale.negatives is not None and self.run.shard != "none":
            raise ValueError(f"run.shard: must be none where scale.negatives is given, got {self.run.shard}")

    def check_together(self) -> None:
        """Refuse settings that do not fit each other.

        Raises:
            ValueError: naming the setting, what it must be and what it is.
        """
        a, side = self.augment, self.model.image_size
        smallest = min([side, *(size for _, size in a.stages)])
        if a.geometry == "translate" and a.translate_px >= smallest:
            raise ValueError(f"augment.translate_px: must be below the image's {smallest} px, got {a.translate_px}")

    def local_batch(self, world: int) -> int:
        """Images of one process in one loss.

        Raises:
            ValueError: `scale.negatives` that are no whole number of forward passes of every process.
        """
        size, wanted = self.optim.batch_size, self.scale.negatives
        if wanted is None:
            return size
        if wanted % (size * world):
            each = f"optim.batch_size x processes = {size} x {world}"
            raise ValueError(f"scale.negatives: must be a multiple of {each}, got {wanted}")
        return wanted // world

    def open_loader(self, rank: int, world: int) -> Loader | WindowLoader:
        """Where the batches of a process come from: see `loader.Loader`."""
        return Loader(
            self.data, self.augment, self.model.image_size, self.local_batch(world), seed=self.seed,
            view_count=self.view_count, workers=self.run.workers, limit_bytes=self.run.memory_limit_mb << 20,
            rank=rank, world=world, buffer=self.shuffle_buffer,
        )  # fmt: skip

    def beside_data(self) -> dict[str, str]:
        """What it learns from beside the data, by a digest each; a run goes on with the same."""
        return {}

    def make_views(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """What turns the images of a batch into the views that the model is given."""
        return Views(self.augment, self.model.image_size, self.view_count)

    def sample(self) -> Tensor:
        """A single input of `encode`, of zeros."""
        return torch.zeros(1, 3, self.model.image_size, self.model.image_size)

    def optimizers(self, module: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """By name. All step after each update; the rate of a group that has an `lr_scale` is multiplied by it."""
        return optim.build(module, self.optim, precision=self.precision)

    def leaves_some_unused(self) -> bool:
        """Whether a pass leaves some of the model's trained parameters without a gradient, as DDP must know."""
        return False

    def untrained(self) -> dict[str, Method]:
        """The encoders that the evaluation compares with, by the names that it prints."""
        return {"random": self}

    def judge(self, model: Model, asked: Asked) -> tuple[dict[str, Any], Figures]:
        """Evaluate a trained model: see `evaluation.images.evaluate`, and `evaluation.attributes` for CelebA."""
        if asked.labels:
            raise ValueError(
                f"labels: must be left out for images, which have no labels by name; got {asked.labels[0]!r}"
            )
        if celeba.find(Path(self.data)) is not None:
            return evaluate_attributes(model, self, asked)
        return evaluate_images(model, self, asked)
