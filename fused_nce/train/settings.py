"""The settings that all methods share: plain values, each with the rule that it must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fused_nce.core.dispatch import BACKENDS
from fused_nce.train.limits import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    JITTER,
    MILESTONES,
    POSITIVE_SHARE,
    SHARE,
    Rule,
    each,
    number,
    one_of,
    optional,
    setting,
    span,
)

# Rules that several methods' own settings share.
BACKEND = optional(one_of(BACKENDS))
SIDE = number("at least 8", lambda v: v >= 8)
BACKBONE = Rule("the name of an encoder", bool)
STAGES = Rule(
    "(epoch, px) pairs, rising epochs from 1 on and at least 8 px",
    lambda v: MILESTONES.holds([until for until, _ in v]) and all(SIDE.holds(side) for _, side in v),
)
THREADS = Rule("auto or a whole number in [1, 1024]", lambda v: v == "auto" or (type(v) is int and 1 <= v <= 1024))

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
        upright: turn images as their EXIF orientation says, test images too.
        stages: views of another side at first, as (epoch until which, px), such as [[10, 96], [30, 112]]; then the
            model's own.
    """

    flip_p: float = setting(0.5, SHARE)
    flip_shared: bool = True
    geometry: Literal["translate", "affine", "crop", "none"] = "translate"
    geometry_p: float = setting(0.8, SHARE)
    translate_px: int = setting(4, AT_LEAST_0)
    degrees: float = setting(15.0, number("in [0, 180]", lambda v: 0 <= v <= 180))
    shift: float = setting(0.1, SHARE)
    zoom: tuple[float, float] = setting((0.85, 1.15), span(ABOVE_0))
    shear_degrees: float = setting(10.0, number("in [0, 90)", lambda v: 0 <= v < 90))
    crop_area: tuple[float, float] = setting((0.3, 1.0), span(POSITIVE_SHARE))
    crop_ratio: tuple[float, float] = setting((0.7, 1.4), span(ABOVE_0))
    jitter: tuple[float, float, float, float] = setting((0.4, 0.4, 0.4, 0.2), JITTER)
    jitter_p: float = setting(0.8, SHARE)
    gray_p: float = setting(0.25, SHARE)
    blur_p: float = setting(0.0, SHARE)
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), span(ABOVE_0))
    mean: tuple[float, float, float] = setting(CIFAR_MEAN, each(SHARE))
    std: tuple[float, float, float] = setting(CIFAR_STD, each(ABOVE_0))
    upright: bool = False
    stages: tuple[tuple[int, int], ...] = setting((), STAGES)


@dataclass
class OptimConfig:
    """The optimizer and its schedule.

    Args:
        name: "adam", "sgd" (Nesterov off), "lars" (arXiv 1708.03888) or "muon" (of weights; the rest by Adam).
        epochs: length of the run, and of the cosine.
        batch_size: images of one process and one forward pass.
        accumulate: forward passes in one update.
        lr: peak learning rate.
        betas: of Adam.
        eps: of Adam.
        momentum: of SGD, LARS and Muon.
        trust: LARS's trust coefficient.
        weight_decay: added to the gradient; Muon's, times the rate, is taken off the weight.
        decay_all: of every parameter; false leaves biases and norms out (and LARS's scaling of their rate, too).
        warmup_updates: updates over which the rate grows linearly.
        schedule: "step" multiplies by `gamma` at each milestone, "cosine" falls to 0 at the last update.
        milestones: epochs.
        gamma: factor at a milestone.
    """

    name: Literal["adam", "sgd", "lars", "muon"] = "adam"
    epochs: int = setting(300, AT_LEAST_1)
    batch_size: int = setting(200, number("at least 2 (the negatives are the other images)", lambda v: v >= 2))
    accumulate: int = setting(1, AT_LEAST_1)
    lr: float = setting(2e-4, ABOVE_0)
    betas: tuple[float, float] = setting((0.8, 0.999), each(BELOW_1))
    eps: float = setting(1e-8, ABOVE_0)
    momentum: float = setting(0.9, BELOW_1)
    trust: float = setting(1e-3, ABOVE_0)
    weight_decay: float = setting(1e-5, AT_LEAST_0)
    decay_all: bool = True
    warmup_updates: int = setting(500, AT_LEAST_0)
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = setting((250, 280), MILESTONES)
    gamma: float = setting(0.2, POSITIVE_SHARE)


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

    negatives: int | None = setting(None, optional(number("at least 2", lambda v: v >= 2)))
    everywhere: bool = True
    ring: bool = False
    checkpoint_activations: bool = False
    sync_norm: bool = False


@dataclass
class RunConfig:
    """How the run goes: a resumed run may change all of these.

    None changes its numbers but for rounding, and for crops where images come to be held, or no longer are, which a
    resume says.

    Args:
        max_steps: stop after this many updates, counted from the start of the run.
        max_minutes: stop after this long, counted from the start of this command.
        log_every: updates between two log lines.
        save_minutes: minutes between two checkpoints.
        keep: checkpoints kept, at least 2.
        workers: processes that read images that are not held in memory.
        memory_limit_mb: a data set that takes less as uint8 is decoded once and held; under the geometry "crop" only
            if all images have the model's size already, and they are then drawn from the run's generator, not from a
            seed of each. Recordings are always held, as int16, and those that take more are refused.
        tensorboard: write TensorBoard events too, if it is installed.
        wandb: project of Weights & Biases to log to as well; null for none.
        threads: of a process; "auto": as many as other processes leave cores free, at most OMP_NUM_THREADS, or all
            cores. The last digits of sums depend on it: for the same bits on a busy machine, give a number.
        timeout_minutes: for which a process waits for another in an exchange: more than a whole save takes, while
            which the first one writes, and the others wait.
        shard: "fsdp2" splits weights, gradients and moments over the processes, and each writes its part of a
            checkpoint while the training goes on; "none": DDP, every process has all of them.
    """

    max_steps: int | None = setting(None, optional(AT_LEAST_1))
    max_minutes: float | None = setting(None, optional(ABOVE_0))
    log_every: int = setting(20, AT_LEAST_1)
    save_minutes: float = setting(5.0, AT_LEAST_0)
    keep: int = setting(2, number("at least 2 (a damaged checkpoint needs one before it)", lambda v: v >= 2))
    workers: int = setting(2, AT_LEAST_0)
    memory_limit_mb: int = setting(4096, AT_LEAST_1)
    tensorboard: bool = True
    wandb: str | None = setting(None, optional(Rule("the name of a project", bool)))
    threads: int | Literal["auto"] = setting("auto", THREADS)
    timeout_minutes: float = setting(30.0, ABOVE_0)
    shard: Literal["none", "fsdp2"] = "none"
