"""The configuration of a run: dataclasses, checked, and saved as `RUN/config.yaml`."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fused_nce.train import limits

CONFIG_NAME = "config.yaml"

CIFAR_MEAN, CIFAR_STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)


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
    """

    image_size: int = 32
    ndf: int = 128
    n_rkhs: int = 1024
    n_depth: int = 3
    use_bn: bool = False
    init: Literal["amdim", "kaiming"] = "amdim"


@dataclass
class LossConfig:
    """The AMDIM loss.

    Args:
        pairs: antecedent and consequent maps, "1>5" for f1 against all of f5.
        antecedents: one sampled location an image, or all of them.
        scale: of the dot products; 1/sqrt(D) if left out.
        clip: soft limit of the scores, clip * tanh(s / clip); null for none.
        penalty: weight of the mean squared raw score: 0.05 in amdim-public, 0.04 in the paper.
        backend: engine backend; chosen by the machine if left out.
    """

    pairs: tuple[str, ...] = ("1>5", "1>7", "5>5")
    antecedents: Literal["sample", "all"] = "sample"
    scale: float | None = None
    clip: float | None = 20.0
    penalty: float = 0.05
    backend: str | None = None


@dataclass
class AugmentConfig:
    """Two views of an image, in this order: flip (shared by the views), geometry, colour jitter, grayscale, normalise.

    Args:
        flip_p: chance of a horizontal flip, drawn once for both views.
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
        mean: of the channels, in [0, 1].
        std: of the channels, in [0, 1].
    """

    flip_p: float = 0.5
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
    mean: tuple[float, float, float] = CIFAR_MEAN
    std: tuple[float, float, float] = CIFAR_STD


@dataclass
class OptimConfig:
    """Adam and its schedule.

    Args:
        epochs: length of the run, and of the cosine.
        batch_size: images of one process and one forward pass; the negatives come from these.
        accumulate: forward passes in one update.
        lr: peak learning rate.
        betas: of Adam.
        eps: of Adam.
        weight_decay: on everything, added to the gradient.
        warmup_updates: updates over which the rate grows linearly.
        schedule: "step" multiplies by `gamma` at each milestone, "cosine" falls to 0 at the last update.
        milestones: epochs.
        gamma: factor at a milestone.
    """

    epochs: int = 300
    batch_size: int = 200
    accumulate: int = 1
    lr: float = 2e-4
    betas: tuple[float, float] = (0.8, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-5
    warmup_updates: int = 500
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = (250, 280)
    gamma: float = 0.2


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
        memory_limit_mb: a data set that takes less as uint8 is decoded once and held, unless the geometry is "crop".
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
    """All that decides a run.

    Args:
        data: "digits", a folder of images (one subfolder a class), or WebDataset shards (folder or glob).
        preset: name of the settings that the others change.
        seed: of the weights, the order and the augmentation.
        precision: "bf16", "fp32", or "auto": bf16 where the hardware has it.
        channels_last: memory format; on if left out and the precision is bf16.
        probes: train the online linear and MLP classifiers where there are labels.
    """

    data: str = "digits"
    preset: str = "default"
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    channels_last: bool | None = None
    probes: bool = True
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)


def check(config: TrainConfig) -> None:
    """Refuse a setting outside its range before any work is done.

    Raises:
        ValueError: naming the setting, its value and what is needed.
    """
    limits.check(config)
    limits.check_together(config)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain lists, dicts, numbers and strings, for YAML and JSON."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`; an unknown or missing key, or a value of another type, is an error."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    config: TrainConfig = instantiate(parser, parser.parse_object(values))
    return config


def instantiate(parser: Any, namespace: Any) -> TrainConfig:
    """The dataclass of a parsed namespace, checked."""
    # jsonargparse 4.49 renamed it and warns about the old name.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    values = make(namespace)
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{key: value for key, value in vars(values).items() if key in names})
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


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
