"""`fused-nce eval RUN`: what the frozen features of a run are worth, beside raw pixels and untrained encoders.

Writes RUN/eval.json (everything), RUN/eval.csv (the table of accuracies) and RUN/report.html (to read). While it runs,
RUN/eval.partial.csv holds the accuracies so far. On another data set the names end in `-NAME`, its own.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.train import (
    augment,
    checkpoint,
    data,
    features,
    host,
    loss_cost,
    machine,
    progress,
    report,
    runlog,
    scoring,
    summary,
)
from fused_nce.train.config import CONFIG_NAME, TrainConfig
from fused_nce.train.data import ImageSet
from fused_nce.train.figures import draw_figures
from fused_nce.train.protocols import DEFAULT, check_names

MAX_PROBE_IMAGES = 50_000  # more labelled images than CIFAR's 50,000 change a probe little and cost minutes


def evaluate(
    run: str,
    *,
    taps: Sequence[str] | None = None,
    protocols: Sequence[str] = DEFAULT,
    data: str | None = None,
    labels_per_class: Sequence[int] = (10,),
    draws: int = 10,
    tasks: int = 600,
    baselines: bool = True,
    cost: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluates a finished (or still growing) run on frozen features, by the protocols asked for.

    BatchNorm is in eval mode, so no statistic comes from test images, and every test image counts.

    Args:
        run: folder of a training run.
        taps: feature maps of the encoder, the method's own if left out; the pictures show the first.
        protocols: of linear, knn, few (a few labels a class), few-shot (tasks of 5 classes), sgd, svm, mlp; or all.
        data: another labelled data set to probe and test on (transfer); the run's own if left out.
        labels_per_class: sizes of the small label sets of "few", such as 1,10,100.
        draws: how many small label sets of each size, at least 2.
        tasks: of few-shot, at least 2.
        baselines: measure raw pixels and two untrained encoders too.
        cost: measure time and memory of the loss beside the naive one.
        seed: of the draws, the untrained encoders and the embedding.

    Returns:
        What RUN/eval.json holds.

    Raises:
        ValueError: no run, no usable checkpoint, no labels, an unknown tap or protocol, or settings that do not fit
            the data.
    """
    start = time.perf_counter()
    folder = Path(run)
    if taps is not None and not taps:
        raise ValueError("taps: none given; need at least one, such as f1")
    names = check_names(list(protocols))
    model, config = checkpoint.load_model(folder)
    trained_on, ending = Path(config.data).name, suffix(data)
    if data is not None:
        config = dataclasses.replace(config, data=data)
    taps = list(taps or config.taps)
    log = runlog.read_log(folder)
    features.check_taps(model, config.sample(), taps)
    settings: dict[str, Any] = {
        "protocols": names, "labels_per_class": list(labels_per_class), "draws": draws, "tasks": tasks, "seed": seed
    }  # fmt: skip
    if (judge := config.judge()) is not None:
        judged, figures = judge(model, config, taps=taps, baselines=baselines, **settings)
    else:
        judged, figures = _judge_images(folder, ending, model, config, taps=taps, baselines=baselines, **settings)
        judged |= _loss_cost(config) if cost else {}
    result: dict[str, Any] = {
        "run": folder.resolve().name,
        "method": config.method,
        "data": config.data,
        "data_name": Path(config.data).name,
        "trained_on": trained_on,
        "date": time.strftime("%Y-%m-%d"),
        "online_tap": config.taps[0],
        **settings,
        "training": summary.training(log),
        "loss_cost": None,
        "loss_cost_error": None,
        "environment": host.environment(),
        **judged,
        "evaluation_s": round(time.perf_counter() - start, 1),
    }
    write_text(folder / f"eval{ending}.json", json.dumps(result, indent=1) + "\n")
    _write_csv(folder / f"eval{ending}.csv", result["probes"])
    (folder / f"eval{ending}.partial.csv").unlink(missing_ok=True)
    write_text(folder / f"report{ending}.html", report.render(result, log, (folder / CONFIG_NAME).read_text(), figures))
    return result


def _judge_images(
    folder: Path,
    ending: str,
    model: nn.Module,
    config: TrainConfig,
    *,
    taps: list[str],
    protocols: list[str],
    labels_per_class: list[int],
    draws: int,
    tasks: int,
    baselines: bool,
    seed: int,
) -> tuple[dict[str, Any], report.Figures]:
    """What `eval.json` holds of the accuracies, and the pictures."""
    probe, test = (_labelled(config, split, seed) for split in ("probe", "test"))
    plan = scoring.plan(
        probe.labels, test.labels, protocols=protocols, labels_per_class=labels_per_class, draws=draws, tasks=tasks,
        seed=seed,
    )  # fmt: skip

    rows: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    # One at a time: all of CIFAR-10's feature sets together are 2 GB.
    sets = _feature_sets(model, config, probe, test, taps, baselines, seed)
    count = len(taps) * (1 + len(config.untrained())) + 1 if baselines else len(taps)
    for encoder, tap, bank, queries in progress.bar(sets, desc="probes", total=count, unit="set", leave=False):
        found, shown = scoring.score(bank, queries, plan, protocols)
        rows += [{"encoder": encoder, "tap": tap} | row for row in found]
        _write_csv(folder / f"eval{ending}.partial.csv", rows)
        if not kept:  # the trained encoder's first tap comes first
            kept = {"bank": bank, "queries": queries, "shown": shown}
    figures = draw_figures(
        bank=kept["bank"], bank_images=probe.images, bank_labels=probe.labels,
        queries=kept["queries"], query_images=test.images, query_labels=test.labels, seed=seed,
    )  # fmt: skip
    confusion = None
    if kept["shown"] is not None:
        name, predicted = kept["shown"]
        matrix = scoring.confusion_matrix(predicted, plan.truth, len(test.classes))
        confusion = {"tap": taps[0], "probe": name, "labels": "all", "matrix": matrix}
    judged = {
        "classes": test.classes,
        "taps": taps,
        "splits": {"probe": len(probe.labels), "test": len(test.labels)},
        "probes": rows,
        "confusion": confusion,
        "protocol": summary.protocol(config.data, protocols, draws, tasks, baselines),
    }
    return judged, figures


def suffix(data: str | None) -> str:
    """What the names of the files of another data set end in."""
    return "" if data is None else "-" + re.sub(r"[^\w.-]+", "_", Path(data).name)


def run_and_print(run: str, **options: Any) -> int:
    """Judge the frozen features of a run; writes RUN/eval.json, RUN/eval.csv and RUN/report.html.

    Args:
        run: folder of a training run.
        options: as for `evaluate`.

    Returns:
        The exit status: 0, or 1 if the loss could not be timed.
    """
    result = evaluate(run, **options)
    print(summary.table(result))
    name = f"report{suffix(options.get('data'))}.html"
    print(f"\nReport: {Path(run) / name}")
    if result["loss_cost_error"] is not None:
        print(f"fused-nce: {result['loss_cost_error']}", file=sys.stderr)
        return 1
    return 0


def _labelled(config: TrainConfig, split: str, seed: int) -> ImageSet:
    """The labelled images of a split; of a large probe split, 50,000 drawn at random."""
    limit = config.run.memory_limit_mb << 20
    found = data.load_split(config.data, split, config.model.image_size, limit_bytes=limit)
    known = found.labels >= 0
    if not bool(known.any()) or len(found.classes) < 2:
        raise ValueError(
            f"data: the {split} split of {config.data} has no labels of 2 or more classes; need them to evaluate"
        )
    rows = known.nonzero().flatten()
    if split == "probe" and len(rows) > MAX_PROBE_IMAGES:
        generator = torch.Generator().manual_seed(seed)
        rows = rows[torch.randperm(len(rows), generator=generator)[:MAX_PROBE_IMAGES]].sort().values
    if len(rows) == len(found.labels):
        return found
    return dataclasses.replace(found, images=found.images[rows], labels=found.labels[rows])


def _feature_sets(
    model: nn.Module, config: TrainConfig, probe: ImageSet, test: ImageSet, taps: list[str], baselines: bool, seed: int
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """(encoder, tap, features of the probe split, features of the test split), the trained encoder first."""
    transform, dtype = augment.test_transform(config), _precision(config)
    models = {report.TRAINED: model}
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
            yield name, tap, parts[0][tap], parts[1][tap]
    if baselines:
        yield "raw pixels", report.PIXELS, features.raw_pixels(probe.images), features.raw_pixels(test.images)


def _precision(config: TrainConfig) -> torch.dtype | None:
    """The dtype to autocast to, as in training on this machine; None for the weights' own."""
    return torch.bfloat16 if machine.use_bf16(config.precision, torch.device("cpu")) else None


def _loss_cost(config: TrainConfig) -> dict[str, Any]:
    """The cost of AMDIM's loss on the run's own shapes and in its dtype, for a method that says what they are.

    A failure is reported in its place: the accuracies, minutes of work, do not depend on it.
    """
    shape = config.loss_shape()
    if shape is None:
        return {}
    terms, width = shape
    dtype = _precision(config) or torch.float32
    try:
        return {"loss_cost": loss_cost.measure(config.optim.batch_size, terms, width, dtype)}
    except (RuntimeError, OSError) as error:
        return {"loss_cost_error": str(error)}


def write_text(path: Path, text: str) -> None:
    """Under a temporary name, then renamed: a reader never sees half a file."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = ["encoder", "tap", "probe", "labels", "accuracy_pct", "sd_pct", "ci95_pct", "width"]
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)
