"""A run on images, judged on frozen features, beside raw pixels and untrained encoders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.train.data.augment import Normalise
from fused_nce.train.data.images import ImageSet, load_labelled
from fused_nce.train.evaluation import features, scoring
from fused_nce.train.evaluation.figures import Figures, draw_figures
from fused_nce.train.evaluation.fine_tune import Subject
from fused_nce.train.evaluation.protocols import LEFT_OUT, described
from fused_nce.train.evaluation.reconstruction import check_side
from fused_nce.train.evaluation.scoring import Asked
from fused_nce.train.machine.host import autocast_dtype, progress_bar


def evaluate(model: nn.Module, config: Any, asked: Asked) -> tuple[dict[str, Any], Figures]:
    """Every protocol asked for, on each tap of the frozen encoder of a run with this config.

    Returns:
        What `eval.json` holds of the accuracies, and the pictures.

    Raises:
        ValueError: images or classes that cannot be judged, or of a size that a protocol does not take.
    """
    taps = asked.taps
    if "ms-ssim" in asked.protocols:
        check_side(config.model.image_size)
    probe, test = load_labelled(
        config.data, config.model.image_size, config.augment, seed=asked.seed, limit_mb=config.run.memory_limit_mb,
        leave_out_unseen=asked.leave_out_unseen,
    )  # fmt: skip
    asked.look(probe, test)
    classes, known, truth = occurring(probe, test)
    plan = asked.plan(known, truth, classes)
    rows: list[dict[str, Any]] = []
    measures: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    # One at a time: all of CIFAR-10's feature sets together are 2 GB.
    sets = feature_sets(model, config, probe, test, asked)
    count = len(taps) * (1 + len(config.untrained())) + 1 if asked.baselines else len(taps)
    for encoder, tap, bank, queries, own in progress_bar(sets, desc="probes", total=count, unit="set", leave=False):
        found = scoring.score(bank, queries, plan, asked.protocols, own)
        rows += [{"encoder": encoder, "tap": tap} | row for row in found.rows]
        measures += [{"encoder": encoder, "tap": tap} | row for row in found.measures]
        asked.keep(rows + measures)
        if not kept:  # the trained encoder's first tap comes first
            kept = {"bank": bank, "queries": queries, "shown": found.shown}
    figures = draw_figures(
        bank=kept["bank"], bank_images=probe.images, bank_labels=known,
        queries=kept["queries"], query_images=test.images, query_labels=truth, seed=asked.seed,
        neighbours=asked.neighbours,
    )  # fmt: skip
    judged = {
        "classes": classes,
        "chance_pct": 100 / len(known.unique()),
        "taps": taps,
        "splits": {"probe": len(probe.labels), "test": len(test.labels)},
        "read": [probe.account, test.account],
        "probes": rows,
        "measures": measures,
        "confusion": scoring.confusion(kept["shown"], taps[0], plan.truth, len(classes)),
        "protocol": _protocol(config.data, config.model.image_size, asked),
    }
    return judged, figures


def occurring(probe: ImageSet, test: ImageSet) -> tuple[list[str], Tensor, Tensor]:
    """The classes that images have, and the labels of both splits, (n,) and (m,), by their places among them.

    A label may be any number up to a million: what has a row or column for each number would fill the memory.
    """
    seen = torch.cat((probe.labels, test.labels)).unique()
    known, truth = (torch.searchsorted(seen, split.labels) for split in (probe, test))
    return [probe.classes[i] for i in seen.tolist()], known, truth


def feature_sets(
    model: nn.Module, config: Any, probe: ImageSet, test: ImageSet, asked: Asked
) -> Iterator[tuple[str, str, Tensor, Tensor, Subject | None]]:
    """(encoder, tap, features of the probe split, of the test split, the encoder itself), the trained one first."""
    transform, dtype = Normalise(config.augment), autocast_dtype(config.precision)
    for name, encoder in asked.encoders(model, config):
        if name != scoring.TRAINED:
            features.calibrate_batch_norm(encoder, probe.images, transform)
        parts = [
            features.extract(encoder, split.images, transform, asked.taps, dtype=dtype, name=f"{name}: {what}")
            for split, what in ((probe, "probe images"), (test, "test images"))
        ]
        for tap in asked.taps:
            own = Subject(encoder, tap, transform, probe.images, test.images)
            yield name, tap, parts[0][tap], parts[1][tap], own
    if asked.baselines:
        bank, queries = features.raw_pixels(probe.images, test.images)
        yield "raw pixels", scoring.PIXELS, bank, queries, None


def _protocol(data: str, image_size: int, asked: Asked) -> list[str]:
    """What a reader must know to judge the accuracies, one sentence a line."""
    split = (
        "The images of pre-training, of the probes and of the test are disjoint."
        if data == "digits"
        else "Probes are fitted on the labelled training images and judged on the test images, which nothing else sees."
    )
    lines = [
        split,
        "Not transductive: BatchNorm uses the statistics of pre-training (eval mode), never of test images; every test "
        "image counts.",
        "A map is averaged over a 2 × 2 grid; a vector, such as f1, stays.",
        *described(asked.protocols, asked.draws, asked.tasks),
    ]
    if asked.leave_out_unseen:
        lines.append(LEFT_OUT.format("images"))
    if asked.baselines:
        lines.append(
            "Untrained encoders have the run's architecture; their BatchNorm gets the statistics of the probe split, "
            "without which they would be weaker baselines."
        )
        if image_size > (side := features.PIXELS_SIDE):
            lines.append(f"Raw pixels are the means of {side} × {side} parts of an image.")
    return lines
