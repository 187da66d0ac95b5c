"""`fused-nce eval RUN`: what the frozen features of a run are worth, beside raw pixels and untrained encoders.

Writes RUN/eval.json (everything), RUN/eval.csv (the table of accuracies) and RUN/report.html (to read); pictures of
test images with the training images nearest to them, RUN/neighbours-cosine.png and -l1.png; and RUN/samples.png, what a
generator makes. While it runs, RUN/eval.partial.csv holds the accuracies so far. On another data set the names end in
`-NAME`, its own, and the evaluation of a third of the same name is not overwritten. Nor is one that asked for something
else, or of other weights or data: it gets a number.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_nce import measure
from fused_nce.models.base import Model
from fused_nce.train import loss_cost
from fused_nce.train.config import CONFIG_NAME
from fused_nce.train.evaluation import features
from fused_nce.train.evaluation.figures import samples
from fused_nce.train.evaluation.protocols import DEFAULT, check_names
from fused_nce.train.evaluation.scoring import DRAWS_VERSION, Asked
from fused_nce.train.files import printable, read_json, write_bytes, write_text
from fused_nce.train.limits import SEED, check_one
from fused_nce.train.machine import host
from fused_nce.train.machine.threads import Threads
from fused_nce.train.method import Method
from fused_nce.train.report import evaluated, runlog, terminal
from fused_nce.train.saving import checkpoint

log = logging.getLogger("fused_nce")
MOST_NEIGHBOURS = 100  # of a picture that a person looks at


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
    leave_out_unseen: bool = False,
    neighbours: int = 5,
    memory_limit_mb: int | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Evaluates a finished (or still growing) run on frozen features, by the protocols asked for.

    BatchNorm is in eval mode, so no statistic comes from test images, and every test image counts.

    Args:
        run: folder of a training run.
        taps: feature maps of the encoder, the method's own if left out; the pictures show the first.
        protocols: of linear, knn, few (a few labels a class), few-shot (tasks of 5 classes), sgd, svm, mlp; or all of
            these. By name alone, minutes an encoder and tap: fine-tune, ms-ssim, mine, ndm.
        data: another labelled data set to probe and test on (transfer); the run's own if left out.
        labels_per_class: sizes of the small label sets of few and fine-tune, such as 1,10,100.
        draws: how many small label sets of each size, at least 2.
        tasks: of few-shot, at least 2.
        baselines: measure raw pixels and two untrained encoders too.
        cost: measure time and memory of the loss beside the naive one.
        seed: of the draws, the untrained encoders and the embedding.
        leave_out_unseen: leave out what is of classes that the training split lacks, instead of refusing the test
            split.
        neighbours: nearest training images that the pictures show beside each of a few test images, by the first tap.
        memory_limit_mb: of a split's images, decoded; the run's own `run.memory_limit_mb` if left out.
        labels: of recordings, those to judge, such as digit,speaker; every one that can be judged if left out.

    Returns:
        What RUN/eval.json holds.

    Raises:
        ValueError: no run, no usable checkpoint, no labels, an unknown tap or protocol, or settings that do not fit
            the data.
    """
    start = time.perf_counter()
    folder = Path(run)
    check_one("seed", seed, SEED)
    for option, given, such in (("taps", taps, "f1"), ("labels", labels, "speaker")):
        if given is not None and not given:
            raise ValueError(f"{option}: none given; need at least one, such as {such}")
    if not 1 <= neighbours <= MOST_NEIGHBOURS:
        raise ValueError(f"neighbours: {neighbours}; need 1 to {MOST_NEIGHBOURS}")
    names = check_names(list(protocols))
    model, config, state = checkpoint.load_run(folder)
    trained_on, ending = runlog.data_name(config.data), runlog.suffix(data)
    if data is not None:
        config = dataclasses.replace(config, data=data)
    if memory_limit_mb is not None:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, memory_limit_mb=memory_limit_mb))
    taps = list(dict.fromkeys(taps or config.taps))
    lines = runlog.read_log(folder, int(state["step"]))
    features.check_taps(model, config.sample(), taps)
    settings: dict[str, Any] = {
        "protocols": names, "labels_per_class": list(labels_per_class), "draws": draws, "tasks": tasks, "seed": seed,
        "leave_out_unseen": leave_out_unseen, "labels": None if labels is None else list(dict.fromkeys(labels)),
    }  # fmt: skip
    partial = folder / f"eval{ending}.partial.csv"
    digests: dict[str, str] = {}

    def look(probe: Any, test: Any) -> None:
        digests.update(probe=probe.digest, test=test.digest)
        rate = state.get("data", {}).get("rate")  # of a run on recordings, but for those of earlier versions
        if rate is not None and probe.rate != rate:
            raise ValueError(f"data: must have the {rate} Hz that {run} was trained on, got {probe.rate} Hz")
        if data is not None:
            _refuse_another(folder / f"eval{ending}.json", data, digests)

    asked = Asked(
        taps, **settings, baselines=baselines, keep=lambda rows: _write_csv(partial, rows), neighbours=neighbours,
        look=look,
    )  # fmt: skip
    with Threads(config.run.threads):
        judged, figures = config.judge(model, asked)
        drawn = samples(model, seed)
    figures.pictures |= {} if drawn is None else {"samples": drawn}
    judged |= _loss_cost(model, config) if cost else {}
    result: dict[str, Any] = {
        "run": folder.resolve().name,
        "method": config.method,
        "title": config.title,
        "epochs": config.optim.epochs,
        "views": config.optim.epochs * config.view_count,
        "parameters": _parameters(model),
        "data": config.data,
        "data_name": runlog.data_name(config.data),
        "digests": digests,
        "trained_on": trained_on,
        "date": time.strftime("%Y-%m-%d"),
        "online_tap": config.taps[0],
        **settings,
        "draws_version": DRAWS_VERSION,
        "training": terminal.training(lines) | {"steps": int(state["step"])},
        "measures": [],
        "attributes": [],
        "loss_cost": None,
        "loss_cost_error": None,
        "environment": measure.environment(),
        **judged,
        "evaluation_s": round(time.perf_counter() - start, 1),
    }
    _set_aside(folder, ending, result)
    write_text(folder / f"eval{ending}.json", json.dumps(result, indent=1) + "\n")
    _write_csv(folder / f"eval{ending}.csv", result["probes"] + result["measures"] + result["attributes"])
    partial.unlink(missing_ok=True)
    for name, png in figures.pictures.items():
        write_bytes(folder / f"{name}{ending}.png", png)
    write_text(
        folder / f"report{ending}.html", evaluated.render(result, lines, (folder / CONFIG_NAME).read_text(), figures)
    )
    return result


def run_and_print(run: str, **options: Any) -> int:
    """Judge the frozen features of a run; writes RUN/eval.json, RUN/eval.csv and RUN/report.html.

    Args:
        run: folder of a training run.
        options: as for `evaluate`.

    Returns:
        The exit status: 0, or 1 if the loss could not be timed.
    """
    result = evaluate(run, **options)
    print("\n".join(result["read"]), end="\n\n")
    print("\n".join(map(printable, terminal.table(result).splitlines())))
    name = f"report{runlog.suffix(options.get('data'))}.html"
    print(f"\nReport: {printable(Path(run) / name)}")
    if result["loss_cost_error"] is not None:
        print(f"fused-nce: {result['loss_cost_error']}", file=sys.stderr)
        return 1
    return 0


def _refuse_another(file: Path, data: str, digests: dict[str, str]) -> None:
    """An evaluation on other data whose name is the same would be overwritten."""
    before = _earlier(file)
    if before is not None and before.get("digests", digests) != digests:
        raise ValueError(f"data: {file} is of other data than {data}, by the same name; move it away")


def _earlier(file: Path) -> dict[str, Any] | None:
    """What an evaluation says; nothing if it cannot be read, and None if there is none."""
    try:
        return read_json(file)
    except ValueError:  # damaged, or above the limit: it is somebody's all the same
        return {} if file.exists() else None


def _set_aside(folder: Path, ending: str, result: dict[str, Any]) -> None:
    """An earlier evaluation stays under a number, unless this one has all it has, of the same data, asked alike."""

    def kinds(of: dict[str, Any]) -> set[tuple[str, ...]]:
        rows = (row for part in ("probes", "measures", "attributes") for row in of.get(part, []))
        return {tuple(value for value in row.values() if isinstance(value, str)) for row in rows}

    before = _earlier(folder / f"eval{ending}.json")
    if before is None:
        return
    names = ("labels_per_class", "draws", "tasks", "seed", "leave_out_unseen")
    try:  # what an earlier version did not ask was asked as by default
        same = all(before[name] == result[name] for name in names if name in before)
        same &= before.get("digests", result["digests"]) == result["digests"]
        drawn = {"few", "few-shot", "fine-tune"}.intersection(before.get("protocols", ()))
        same &= not drawn or before.get("draws_version", 1) == DRAWS_VERSION
        if same and before["training"]["steps"] == result["training"]["steps"] and kinds(before) <= kinds(result):
            return
    except (AttributeError, KeyError, TypeError):  # no evaluation of ours: it stays
        pass
    number = next(n for n in itertools.count(1) if not (folder / f"eval{ending}.{n}.json").exists())
    for file in (folder / f"eval{ending}.json", folder / f"eval{ending}.csv", folder / f"report{ending}.html"):
        if file.exists():
            file.rename(file.with_suffix(f".{number}{file.suffix}"))
    log.warning(
        "an evaluation that has more, was asked otherwise, is of other data or cannot be read is eval%s.%d.json now",
        ending, number,
    )  # fmt: skip


def _parameters(model: Model) -> int:
    """Of what encodes, without what only the loss needs."""
    parts = [getattr(model, part) for part in ("encoder", "context") if hasattr(model, part)]
    return sum(p.numel() for part in parts for p in part.parameters())


def _loss_cost(model: Model, config: Method) -> dict[str, Any]:
    """The cost of AMDIM's loss on the run's own shapes and in its dtype, for a model that says what they are.

    A failure is reported in its place: the accuracies, minutes of work, do not depend on it.
    """
    shape = model.loss_shape()
    if shape is None:
        return {}
    terms, width = shape
    dtype = host.autocast_dtype(config.precision) or torch.float32
    try:
        return {"loss_cost": loss_cost.measure(config.optim.batch_size, terms, width, dtype)}
    except (RuntimeError, OSError) as error:
        return {"loss_cost_error": str(error)}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = ["encoder", "tap", "probe", "labels", "accuracy_pct", "sd_pct", "ci95_pct", "width", "value", "unit"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
