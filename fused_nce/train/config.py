"""The configuration of a run: dataclasses, checked, and saved as `RUN/config.yaml`.

A method is a `TrainConfig` of its own, one file in `train/methods/`: its settings, and the answers that the loop, the
checkpoints and the evaluation ask of it. None of them knows a method by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fused_nce.train import limits

if TYPE_CHECKING:
    from fused_nce.models.base import Model

CONFIG_NAME = "config.yaml"

CIFAR_MEAN, CIFAR_STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)


@dataclass
class AugmentConfig:
    """Views of an image, in this order: flip, geometry, colour jitter, grayscale, blur, normalise.

    Args:
        flip_p: chance of a horizontal flip.
        flip_shared: drawn once for all views of an image (AMDIM) or for each.
        geometry: "translate" (whole pixels, reflected edges), "affine", "crop" (random resized crop) or "none".
        geometry_p: chance that a view is moved at all ("translate" and "affine").
        translate_px: largest shift of "translate".
        degrees: largest rotation of "affine".
        shift: largest shift of "affine", as a fraction of the side.
        zoom: smallest and largest scale of "affine".
        shear_degrees: largest shear of "affine".
        crop_area: smallest and largest area of "crop", as a fraction.
        crop_ratio: smallest and largest aspect ratio of "crop".
        jitter: largest change of brightness, contrast, saturation, hue.
        jitter_p: chance of colour jitter.
        gray_p: chance of grayscale.
        blur_p: chance of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation of the blur, in px.
        mean: of the channels, in [0, 1].
        std: of the channels, in [0, 1].
    """

    flip_p: float = 0.5
    flip_shared: bool = True
    geometry: Literal["translate", "affine", "crop", "none"] = "translate"
    geometry_p: float = 0.8
    translate_px: int = 4
    degrees: float = 15.0
    shift: float = 0.1
    zoom: tuple[float, float] = (0.85, 1.15)
    shear_degrees: float = 10.0
    crop_area: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.7, 1.4)
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.2)
    jitter_p: float = 0.8
    gray_p: float = 0.25
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, float, float] = CIFAR_MEAN
    std: tuple[float, float, float] = CIFAR_STD


@dataclass
class OptimConfig:
    """The optimizer and its schedule.

    Args:
        name: "adam", "sgd" (Nesterov off) or "lars" (arXiv 1708.03888).
        epochs: length of the run, and of the cosine.
        batch_size: images of one process and one forward pass.
        accumulate: forward passes in one update.
        lr: peak learning rate.
        betas: of Adam.
        eps: of Adam.
        momentum: of SGD and LARS.
        trust: LARS's trust coefficient.
        weight_decay: added to the gradient.
        decay_all: of every parameter; false leaves biases and norms out (and LARS's scaling of their rate, too).
        warmup_updates: updates over which the rate grows linearly.
        schedule: "step" multiplies by `gamma` at each milestone, "cosine" falls to 0 at the last update.
        milestones: epochs.
        gamma: factor at a milestone.
    """

    name: Literal["adam", "sgd", "lars"] = "adam"
    epochs: int = 300
    batch_size: int = 200
    accumulate: int = 1
    lr: float = 2e-4
    betas: tuple[float, float] = (0.8, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    trust: float = 1e-3
    weight_decay: float = 1e-5
    decay_all: bool = True
    warmup_updates: int = 500
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = (250, 280)
    gamma: float = 0.2


@dataclass
class ScaleConfig:
    """Where negatives come from, and what memory they cost.

    Args:
        negatives: images that are compared in one loss, of all processes together; encoders see `optim.batch_size` of
            them at a time (gradient cache). Null: as many as the processes' forward passes have.
        everywhere: negatives from all processes, where a method finds them in its batch; false: from its own alone.
        ring: other processes' embeddings go round instead of being gathered: less memory, more messages.
        checkpoint_activations: keep the inputs of an encoder's blocks alone, and make the rest again in the backward.
        sync_norm: BatchNorm statistics over all processes (GPUs only).
    """

    negatives: int | None = None
    everywhere: bool = True
    ring: bool = False
    checkpoint_activations: bool = False
    sync_norm: bool = False


@dataclass
class RunConfig:
    """How the run goes, and nothing that changes its numbers: a resumed run may change all of these.

    Args:
        max_steps: stop after this many updates, counted from the start of the run.
        max_minutes: stop after this long, counted from the start of this command.
        log_every: updates between two log lines.
        save_minutes: minutes between two checkpoints.
        keep: checkpoints kept, at least 2.
        workers: processes that read images that are not held in memory.
        memory_limit_mb: a data set that takes less as uint8 is decoded once and held; under the geometry "crop" only
            if all images have the model's size already.
        tensorboard: write TensorBoard events too, if it is installed.
    """

    max_steps: int | None = None
    max_minutes: float | None = None
    log_every: int = 20
    save_minutes: float = 5.0
    keep: int = 2
    workers: int = 2
    memory_limit_mb: int = 4096
    tensorboard: bool = True


@dataclass
class TrainConfig:
    """All that decides a run. A method gives `model` and `loss` their types and the class variables their values.

    Args:
        data: "digits", a folder of images (one subfolder a class), or WebDataset shards (folder or glob).
        preset: name of the settings that the others change.
        seed: of the weights, the order and the augmentation.
        precision: "bf16", "fp32", or "auto": bf16 where the hardware has it.
        channels_last: memory format; on if left out and the precision is bf16.
        scale: negatives beyond one forward pass.
        probes: train the online linear and MLP classifiers where there are labels.
    """

    method: ClassVar[str]  # its name on the command line
    title: ClassVar[str]  # its name in print
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]  # each lists what differs from the defaults
    rules: ClassVar[Mapping[str, limits.Rule]]  # of its own settings; `limits.RULES` has the shared ones
    taps: ClassVar[tuple[str, ...]]  # that the evaluation probes; the online classifiers take the first
    view_count: ClassVar[int] = 2  # of an image in a batch
    in_parts: ClassVar[bool] = False  # its negatives are its batch, and its model encodes that a few images at a time
    extras: ClassVar[tuple[Literal["labels", "indices"], ...]] = ()  # what a batch holds beside the views, in order
    stats: ClassVar[tuple[str, ...]] = ()  # of its loss, to be logged beside the shared ones

    data: str = "digits"
    preset: str = "default"
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    channels_last: bool | None = None
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

    def check_together(self) -> None:
        """Refuse settings that do not fit each other.

        Raises:
            ValueError: naming the setting, what it must be and what it is.
        """
        a, side = self.augment, self.model.image_size
        if a.geometry == "translate" and a.translate_px >= side:
            raise ValueError(f"augment.translate_px: must be below the image's {side} px, got {a.translate_px}")

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

    def open_loader(self, rank: int, world: int) -> Any:
        """Where the batches of a process come from: see `loader.Loader`."""
        from fused_nce.train.loader import Loader

        return Loader(self, rank=rank, world=world)

    def make_views(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """What turns the images of a batch into the views that the model is given."""
        from fused_nce.train.augment import Views

        return Views(self.augment, self.model.image_size, self.view_count)

    def sample(self) -> Tensor:
        """A single input of `encode`, of zeros."""
        return torch.zeros(1, 3, self.model.image_size, self.model.image_size)

    def optimizers(self, module: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """By name. All step after each update; the rate of a group that has an `lr_scale` is multiplied by it."""
        from fused_nce.train import optim

        return {"optimizer": optim.build(module, self.optim)}

    def leaves_some_unused(self) -> bool:
        """Whether a pass leaves some of the model's trained parameters without a gradient, as DDP must know."""
        return False

    def untrained(self) -> dict[str, TrainConfig]:
        """The encoders that the evaluation compares with, by the names that it prints."""
        return {"random": self}

    def judge(self) -> Callable[..., tuple[dict[str, Any], Any]] | None:
        """What evaluates inputs that are no images: see `evaluate_audio.evaluate`. None for images."""
        return None

    def loss_shape(self) -> tuple[list[tuple[int, int]], int] | None:
        """(rows, columns) that an image supplies to each term of AMDIM's loss, and D; None for another loss."""
        return None


def check(config: TrainConfig) -> None:
    """Refuse a setting outside its range before any work is done.

    Raises:
        ValueError: naming the setting, its value and what is needed.
    """
    limits.check(config, rules={**limits.RULES, **config.rules})
    config.check_together()
    if config.scale.negatives is not None and not config.in_parts:
        raise ValueError(
            f"scale.negatives: must be null for {config.title}, whose batch cannot be encoded in parts, "
            f"got {config.scale.negatives}"
        )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain lists, dicts, numbers and strings, for YAML and JSON."""
    return {"method": config.method, **_plain(dataclasses.asdict(config))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`; an unknown or missing key, or a value of another type, is an error."""
    from jsonargparse import ArgumentParser

    from fused_nce.train import methods

    method = methods.get(values.get("method", "amdim"))  # the only one there was before runs named theirs
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(method)
    return instantiate(method, parser, parser.parse_object({k: v for k, v in values.items() if k != "method"}))


def instantiate(method: type[TrainConfig], parser: Any, namespace: Any) -> TrainConfig:
    """A method's dataclass of a parsed namespace, checked."""
    # jsonargparse 4.49 renamed it and warns about the old name.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    values = make(namespace)
    names = {f.name for f in dataclasses.fields(method)}
    config = method(**{key: value for key, value in vars(values).items() if key in names})
    check(config)
    return config


def save(config: TrainConfig, run_dir: str | Path) -> Path:
    """Write `RUN/config.yaml`."""
    import yaml

    path = Path(run_dir) / CONFIG_NAME
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    return path


def load(run_dir: str | Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
        ValueError: if the folder holds no run.
    """
    import yaml

    path = Path(run_dir) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"run: {run_dir} holds no {CONFIG_NAME}; it must be the folder of a training run")
    return from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def differences(saved: TrainConfig, wanted: TrainConfig) -> list[str]:
    """`key: saved -> wanted` for each setting outside `run` that differs."""
    old, new = flatten(to_dict(saved)), flatten(to_dict(wanted))
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k) and k[:4] != "run."]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
