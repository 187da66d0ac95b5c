"""A run that goes on: with the images that it had in every update, also where other processes take it up."""

from __future__ import annotations

import dataclasses
import logging
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fused_nce import measure
from fused_nce.models.nat import Targets
from fused_nce.train import config as config_module
from fused_nce.train.method import Method
from fused_nce.train.saving import trained_on

log = logging.getLogger("fused_nce")


def batch(asked: Method, used: Method, world: int) -> dict[str, int | None]:
    """What a checkpoint says of a pass: the images of a process that the run's settings ask for, and those of all.

    Under `scale.negatives` those of all are the negatives, of many parts, so that is said too.
    """
    images = used.local_batch(world) * world
    return {"asked": asked.optim.batch_size, "all": images, "negatives": asked.scale.negatives}


def for_processes(config: Method, state: dict[str, Any], world: int) -> Method:
    """The settings with which this many processes share the images of a pass.

    `optim.batch_size` is of a process, and the run's settings keep the one that the run began with; one that a resume
    was allowed to change holds as it is. Under `scale.negatives`, now or at the checkpoint, it is a part's, and stays.

    Args:
        config: as the run's folder has it.
        state: of the checkpoint that the run goes on from.
        world: processes.

    Raises:
        ValueError: for a number of processes that does not divide the images, or leaves one too few of them.
    """
    asked = config.optim.batch_size
    saved = state.get("batch") or {"asked": asked, "all": asked * len(state["rng"])}  # older ones do not say
    in_parts = config.scale.negatives is not None or saved.get("negatives") is not None
    if in_parts or saved["asked"] != asked:
        return config
    if saved["all"] % world:
        raise ValueError(f"processes: must divide the {saved['all']} images of a pass of this run, got {world}")
    share = saved["all"] // world  # fault: share-of-processes
    found = dataclasses.replace(config, optim=dataclasses.replace(config.optim, batch_size=share))
    found.check()
    return found


def optimizer(config: Method) -> dict[str, Any]:
    """What decides which moments an optimizer has, and in which order of the parameters."""
    return {"name": config.optim.name, "decay_all": config.optim.decay_all}


def other_optimizer(run_dir: Path, config: Method, state: dict[str, Any]) -> str:
    """What changed of an optimizer, so that a checkpoint's moments are not for it, in words; empty if nothing did."""
    # Older checkpoints do not say: there the settings of the run do, while nobody has written them anew.
    saved = state.get("optimizer") or optimizer(config_module.load(run_dir))
    now = optimizer(config)
    return ", ".join(f"optim.{key} {saved[key]} -> {now[key]}" for key in now if saved[key] != now[key])


def environment(state: dict[str, Any], world: int) -> dict[str, Any]:
    """What a checkpoint says of where it was made, and of when the first process of its run started.

    Its cores are all that any of the processes may run on, each once: two that are pinned to one each have two. Where
    an earlier process had more cores or another device, `most cores` and `devices` say so.

    Args:
        state: of the checkpoint that the run goes on from; empty for a new run.
        world: processes.
    """
    now = datetime.fromtimestamp(measure.started(), timezone.utc).isoformat(timespec="seconds")
    # fault: clock-of-resume
    began = state.get("environment", {}).get("began_utc") if state else now  # older checkpoints do not say
    found, before = measure.environment(), state.get("environment", {})
    if world > 1:
        machines: dict[str, set[int]] = {}
        for machine, able in gather_object([(platform.node(), measure.able())]):
            machines.setdefault(machine, set()).update(able)  # fault: cores-of-first
        found["cores"] = sum(measure.cores(among=len(able)) for able in machines.values())
    most = max(found["cores"], *(before.get(key, 0) for key in ("cores", "most cores")))  # fault: cores-of-last
    devices = {*before.get("devices", []), before.get("device", found["device"]), found["device"]}
    more = {"most cores": most} if most > found["cores"] else {}
    more |= {"devices": sorted(devices)} if len(devices) > 1 else {}
    return found | {"processes": world} | more | ({"began_utc": began} if began else {})


def inexact(model: nn.Module, config: Method, state: dict[str, Any], world: int) -> str:
    """What differs where the number of processes does, in one line."""
    before, images = len(state["rng"]), config.optim.batch_size
    said = [
        f"{world} processes go on with a run of {before}: the same images in every update, {config.local_batch(world)} "
        "a process; not the same: sums by rounding, what is drawn at random (augmentation, dropout)"
    ]
    if any(isinstance(layer, _BatchNorm) for layer in model.modules()) and not config.scale.sync_norm:
        said.append(f"BatchNorm's statistics (of {images} images)")
    if not config.scale.everywhere and any(getattr(loss, "gathers", False) for loss in model.modules()):
        said.append("the negatives (scale.everywhere is false: those of a process)")
    if any(isinstance(part, Targets) for part in model.modules()):
        said.append("which images may exchange their targets (those of a process)")
    return ", ".join(said)


def check_data(run_dir: Path, state: dict[str, Any], data: dict[str, Any], allowed: bool) -> None:
    """Data that have changed since the checkpoint are refused, or said where they are allowed.

    Raises:
        ValueError: with the difference.
    """
    changed = trained_on.changes(state.get("data", {}), data)  # older checkpoints do not know theirs
    if changed and not allowed:
        raise ValueError(
            f"resume: the data of {run_dir} have changed since step {state['step']} ({'; '.join(changed)}); "
            "bring them back, or add --allow-changed data"
        )
    if changed:
        log.warning("the data have changed since step %d: %s", state["step"], "; ".join(changed))
    before, now = state.get("data", {}).get("seeded"), data["seeded"]
    if before is not None and before != now:
        held, was = ("read as they go", "held") if now else ("held", "read as they go")
        log.warning("run.memory_limit_mb: the images are %s, which were %s: crops are not those of before", held, was)
