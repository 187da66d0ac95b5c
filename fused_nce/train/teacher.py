"""`fused-nce fine-tune RUN`: a run's encoder as a classifier, from a few labels a class; a teacher for `train distil`.

Writes RUN/fine-tuned.safetensors: the weights of encoder and classifier, and in its header which tap and what labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fused_nce.train.data.augment import Normalise
from fused_nce.train.data.images import load_labelled
from fused_nce.train.evaluation import features, scoring
from fused_nce.train.evaluation.fine_tune import Subject, Tuned, choose
from fused_nce.train.files import reading
from fused_nce.train.limits import SEED, check_one
from fused_nce.train.machine.threads import Threads
from fused_nce.train.saving import checkpoint

NAME = "fine-tuned.safetensors"


def write(
    run: str,
    *,
    labels_per_class: int = 10,
    tap: str | None = None,
    seed: int = 0,
    leave_out_unseen: bool = False,
    memory_limit_mb: int | None = None,
) -> dict[str, Any]:
    """Fine-tunes a run's encoder and writes the classifier beside it.

    Args:
        run: folder of a training run on images.
        labels_per_class: labels that it learns from.
        tap: of the encoder, the method's first if left out.
        seed: of the draw of labels, and of the batches.
        leave_out_unseen: leave out test images of classes that no training image has, instead of refusing them.
        memory_limit_mb: of a split's images, decoded; the run's own `run.memory_limit_mb` if left out.

    Returns:
        The rate of the encoder, the accuracy on the test images in percent, and what was read of each split.

    Raises:
        ValueError: no run, no usable checkpoint, a run on recordings, no labels, an unknown tap, or a bad seed.
    """
    check_one("seed", seed, SEED)
    model, config = checkpoint.load_model(run)
    if config.sample().dim() != 4:
        raise ValueError(f"run: must be of images, got one of {config.method} (recordings)")
    tap = config.taps[0] if tap is None else tap
    features.check_taps(model, config.sample(), [tap], option="tap")
    probe, test = load_labelled(
        config.data, config.model.image_size, config.augment, seed=seed,
        limit_mb=memory_limit_mb or config.run.memory_limit_mb, leave_out_unseen=leave_out_unseen,
    )  # fmt: skip
    plan = scoring.plan(
        probe.labels, test.labels, classes=probe.classes, protocols=("fine-tune",),
        labels_per_class=[labels_per_class], draws=2, seed=seed,
    )  # fmt: skip
    transform = Normalise(config.augment)
    bank = features.extract(model, probe.images, transform, [tap])[tap]
    subject = Subject(model, tap, transform, probe.images, test.images)
    with Threads(config.run.threads):
        net, rate = choose(subject, bank, plan.labels, plan.draws[labels_per_class][0], plan.held, seed=seed)
    accuracy = 100 * float((net.predict(test.images).numpy() == plan.truth).mean())
    facts = {"tap": tap, "labels_per_class": str(labels_per_class), "accuracy_pct": f"{accuracy:.2f}"}
    checkpoint.write_tensors(net.state_dict(), Path(run) / NAME, facts)
    return {"rate": rate, "accuracy_pct": accuracy, "read": [probe.account, test.account]}


def classes(run: str) -> int:
    """Of the classifier that a run's folder holds.

    Raises:
        ValueError: if it holds none.
    """
    path = Path(run) / NAME
    if not path.is_file():
        raise ValueError(f"model.teacher: {run} holds no {NAME}; make it by: fused-nce fine-tune {run}")
    with reading(path), safe_open(path, "pt") as file:
        return int(file.get_slice("head.bias").get_shape()[0])


def digest(run: str) -> str:
    """SHA-256 of the classifier that `write` left: another fine-tuning takes its place."""
    return str(checkpoint.fingerprint(Path(run) / NAME)["sha256"])


def load(run: str) -> Tuned:
    """The classifier that `write` left."""
    count, (model, config) = classes(run), checkpoint.load_model(run)
    with reading(Path(run) / NAME), safe_open(Path(run) / NAME, "pt") as file:
        tensors, facts = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    empty = torch.empty_like(tensors["mean"])
    net = Tuned(model, facts["tap"], Normalise(config.augment), empty, empty.clone(), count)
    checkpoint.load_into(net, tensors, NAME)
    return net.eval()


def run_and_print(run: str, **options: Any) -> int:
    """Fine-tune a run's encoder on a few labels a class; writes RUN/fine-tuned.safetensors.

    Args:
        run: folder of a training run on images.
        options: as for `write`.

    Returns:
        The exit status, 0.
    """
    found = write(run, **options)
    print("\n".join(found["read"]))
    print(f"{found['accuracy_pct']:.1f} % of the test images right (rate {found['rate']:g}); {Path(run) / NAME}")
    return 0
