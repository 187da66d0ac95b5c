"""What a run says of itself on the terminal."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

from fused_nce.train.method import Method

log = logging.getLogger("fused_nce")


def describe(config: Method) -> str:
    """One line: what will be trained."""
    model = ", ".join(f"{f.name} {getattr(config.model, f.name)}" for f in dataclasses.fields(config.model))
    negatives = "" if config.scale.negatives is None else f", {config.scale.negatives} negatives"
    length = f"batch {config.optim.batch_size}{negatives}, {config.optim.epochs} epochs"
    return f"{config.title} on {config.data} ({config.preset}): {model}, {length}"


def say(config: Method, images: int, updates: int) -> None:
    """Logs what a run's images an update and its updates do to the rate, where they do."""
    for said in filter(None, (other_batch(config, images), long_warmup(config, updates))):
        log.info("%s", said)


def other_batch(config: Method, images: int) -> str:
    """One line where the rate is the preset's and an update has other images than it was made for; else empty.

    SGD's and LARS's, which go with the batch.
    """
    optim = dataclasses.replace(type(config)().optim, **config.presets.get(config.preset, {}).get("optim", {}))
    made = optim.batch_size * optim.accumulate * config.processes.get(config.preset, 1)
    same = (config.optim.name, config.optim.lr) == (optim.name, optim.lr)
    if images == made or not same or optim.name not in ("sgd", "lars"):
        return ""
    return (
        f"optim.lr {optim.lr:g} of preset {config.preset} is for {made:,} images an update; this run has {images:,} "
        f"(processes x optim.batch_size x optim.accumulate), for which {optim.lr * images / made:.3g} is in proportion"
    )


def long_warmup(config: Method, updates: int) -> str:
    """One line where a run ends before its rate has come to `optim.lr`; else empty."""
    warmup = config.optim.warmup_updates
    if warmup <= updates:
        return ""
    return f"optim.warmup_updates {warmup:,}: the run has {updates:,} updates, and its rate does not come to optim.lr"


def postfix(line: dict[str, Any]) -> dict[str, str]:
    """What the progress bar shows: the NCE against guessing, or the loss where an estimator has no chance level."""
    above = line["nce_minus_chance"]
    known = above is not None and math.isfinite(above)
    shown = {"nce-chance": f"{above:.3f}"} if known else {"loss": f"{line['loss']:.3f}"}
    if line["linear_acc"] is not None:
        shown |= {"linear": f"{line['linear_acc']:.1%}", "mlp": f"{line['mlp_acc']:.1%}"}
    shown["img/s"] = f"{line['images_per_s']:.0f}"
    if line["loss_share"] is not None:
        shown["loss time"] = f"{line['loss_share']:.1%} of step"
    return shown | {"peak": f"{line['peak_memory_mb']:.0f}MB"}
