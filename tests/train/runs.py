"""Tiny runs on the digits, what they leave on the disk, and settings that must be refused."""

import json

import torch
from safetensors.torch import load_file

from fused_nce.train import command, limits, methods
from fused_nce.train.loop import Trainer
from fused_nce.train.settings import AugmentConfig

TINY = [
    "--preset=digits",
    "--model.ndf=4",
    "--model.n_rkhs=16",
    "--model.n_depth=1",
    "--batch-size=8",
    "--run.log_every=4",
    "--run.threads=1",  # the same bits on a busy machine
]
TIMES = {"time_s", "images_per_s", "loss_share", "loss_ms", "peak_memory_mb", "data_wait_share", "matrix_gflop_per_s"}
KEYS = TIMES | {"step", "epoch", "loss", "nce", "nce_minus_chance", "penalty", "top1", "linear_acc", "mlp_acc", "lr"}


def trainer(out, *argv):
    return Trainer(*command.parse("amdim", [*TINY, "--out", str(out), *argv])[:2])


def resumed(out, *argv, method="amdim"):
    settings, run_dir, resume = command.parse(method, ["--resume", str(out), *argv])
    return Trainer(settings, run_dir, resume=resume)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tensors(out, step):
    folder = out / "checkpoints" / f"step_{step:08d}"
    return {f"{p.stem}/{k}": v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def untimed(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def differing(ours, theirs, **tolerance):
    """The names under which two states, of the same names, do not have the same bits, or close numbers."""
    assert ours.keys() == theirs.keys()
    alike = torch.allclose if tolerance else torch.equal
    return [k for k in ours if not alike(ours[k], theirs[k], **tolerance)]


def moved(model, before):
    """The children of a model that are no longer as they were."""
    return {name.partition(".")[0] for name in differing(model.state_dict(), before)}


def assert_the_same(run, other, step):
    """What two runs saved, and their logs, bit by bit."""
    assert differing(tensors(run, step), tensors(other, step)) == []
    assert untimed(log(run)) == untimed(log(other))


def ill_refused(method, bad):
    """What is said of those (key, value, need) that are not refused by name, with the need and the value."""
    wrong = []
    for key, value, need in bad:
        settings, said = methods.get(method)(), "nothing"
        part, _, name = key.rpartition(".")
        setattr(getattr(settings, part) if part else settings, name, tuple(value) if isinstance(value, list) else value)
        try:
            settings.check()
        except ValueError as error:
            said = str(error)
        if not (said.startswith(f"{key}: must ") and need in said and said.endswith(f", got {limits.shown(value)}")):
            wrong.append(f"{method} {key} = {value!r}: {said}")
    return wrong


def own_rules(name):
    """The settings of a method's model and loss that have a rule, by dotted name, and of its windows, if it has any."""
    settings = methods.get(name)()
    sections = ("model.", "loss.") + (() if isinstance(settings.augment, AugmentConfig) else ("augment.",))
    return {key for key in limits.rules(settings) if key.startswith(sections)}
