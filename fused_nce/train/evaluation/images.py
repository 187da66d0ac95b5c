"""A run on images, judged on frozen features, beside raw pixels and untrained encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.train.data.augment import Normalise
from fused_nce.train.data.images import ImageSet, load_labelled
from fused_nce.train.evaluation import features, scoring
from fused_nce.train.evaluation.figures import Figures, draw_figures
from fused_nce.train.evaluation.fine_tune import Subject
from fused_nce.train.evaluation.protocols import LEFT_OUT, described
from fused_nce.train.host import autocast_dtype, progress_bar


def evaluate(
    model: nn.Module,
    config: Any,
    *,
    taps: list[str],
    protocols: list[str],
    labels_per_class: list[int],
    draws: int,
    tasks: int,
    baselines: bool,
    seed: int,
    keep: Callable[[list[dict[str, Any]]], None],
    leave_out_unseen: bool = False,
) -> tuple[dict[str, Any], Figures]:
    """Every protocol asked for, on each tap of a frozen encoder.

    Args:
        model: the trained one.
        config: of its run.
        taps: of `encode`.
        protocols: names, in the order of the table.
        labels_per_class: sizes of the small label sets.
        draws: how many of each, at least 2.
        tasks: of few-shot, at least 2.
        baselines: untrained encoders and raw pixels too.
        seed: of the draws, the untrained encoders and the embedding.
        keep: called with all rows so far after each feature set.
        leave_out_unseen: leave out test images of classes that no training image has, instead of refusing them.

    Returns:
        What `eval.json` holds of the accuracies, and the pictures.
    """
    probe, test = load_labelled(
        config.data, config.model.image_size, seed=seed, limit_mb=config.run.memory_limit_mb,
        upright=config.augment.upright, leave_out_unseen=leave_out_unseen,
    )  # fmt: skip
    plan = scoring.plan(
        probe.labels, test.labels, classes=probe.classes, protocols=protocols, labels_per_class=labels_per_class,
        draws=draws, tasks=tasks, seed=seed,
    )  # fmt: skip

    rows: list[dict[str, Any]] = []
    measures: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    # One at a time: all of CIFAR-10's feature sets together are 2 GB.
    sets = _feature_sets(model, config, probe, test, taps, baselines, seed)
    count = len(taps) * (1 + len(config.untrained())) + 1 if baselines else len(taps)
    for encoder, tap, bank, queries, own in progress_bar(sets, desc="probes", total=count, unit="set", leave=False):
        found = scoring.score(bank, queries, plan, protocols, own)
        rows += [{"encoder": encoder, "tap": tap} | row for row in found.rows]
        measures += [{"encoder": encoder, "tap": tap} | row for row in found.measures]
        keep(rows + measures)
        if not kept:  # the trained encoder's first tap comes first
            kept = {"bank": bank, "queries": queries, "shown": found.shown}
    figures = draw_figures(
        bank=kept["bank"], bank_images=probe.images, bank_labels=probe.labels,
        queries=kept["queries"], query_images=test.images, query_labels=test.labels, seed=seed,
    )  # fmt: skip
    confusion = None
    if kept["shown"] is not None:
        name, predicted = kept["shown"]
        matrix = scoring.confusion_matrix(predicted, plan.truth, len(probe.classes))
        confusion = {"tap": taps[0], "probe": name, "labels": "all", "matrix": matrix}
    judged = {
        "classes": probe.classes,
        "taps": taps,
        "splits": {"probe": len(probe.labels), "test": len(test.labels)},
        "read": [probe.account, test.account],
        "probes": rows,
        "measures": measures,
        "confusion": confusion,
        "protocol": _protocol(config.data, protocols, draws, tasks, baselines, leave_out_unseen),
    }
    return judged, figures


def _feature_sets(
    model: nn.Module, config: Any, probe: ImageSet, test: ImageSet, taps: list[str], baselines: bool, seed: int
) -> Iterator[tuple[str, str, Tensor, Tensor, Subject | None]]:
    """(encoder, tap, features of the probe split, of the test split, the encoder itself), the trained one first."""
    transform, dtype = Normalise(config.augment), autocast_dtype(config.precision)
    models = {scoring.TRAINED: model}
    if baselines:
        for name, other in config.untrained().items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                models[name] = other.build()
            features.calibrate_batch_norm(models[name], probe.images, transform)
    for name, encoder in models.items():
        parts = [
            features.extract(encoder, split.images, transform, taps, dtype=dtype, name=f"{name}: {what}")
            for split, what in ((probe, "probe images"), (test, "test images"))
        ]
        for tap in taps:
            own = Subject(encoder, tap, transform, probe.images, test.images)
            yield name, tap, parts[0][tap], parts[1][tap], own
    if baselines:
        bank, queries = (features.raw_pixels(split.images) for split in (probe, test))
        yield "raw pixels", scoring.PIXELS, bank, queries, None


def _protocol(
    data: str, protocols: list[str], draws: int, tasks: int, baselines: bool, leave_out_unseen: bool
) -> list[str]:
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
        *described(protocols, draws, tasks),
    ]
    if leave_out_unseen:
        lines.append(LEFT_OUT.format("images"))
    if baselines:
        lines.append(
            "Untrained encoders have the run's architecture; their BatchNorm gets the statistics of the probe split, "
            "without which they would be weaker baselines."
        )
    return lines
