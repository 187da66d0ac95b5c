"""The protocols of `fused-nce eval`, by name. Each is given one feature set and the plan, and returns table rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fused_nce.train.evaluation import dependence, episodes, reconstruction
from fused_nce.train.evaluation.episodes import CLASSIFIERS, QUERIES, WAYS, Episode
from fused_nce.train.evaluation.fine_tune import Subject, fine_tune
from fused_nce.train.evaluation.knn import TEMPERATURE, knn_predict, neighbours_for
from fused_nce.train.evaluation.logistic import Kind
from fused_nce.train.evaluation.probes import few_label_probe, linear_probe
from fused_nce.train.evaluation.trained_probes import MLP_EPOCHS, MLP_UNITS, SGD_EPOCHS, Trained, mlp_probe, sgd_probe

Labels = NDArray[np.int64]
Row = dict[str, Any]

ALL = "all"
Z_95 = 1.959964  # standard errors each side of a mean that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Plan:
    """The labelled rows that every feature set is given, so that all are compared on the same draws."""

    labels: Labels  # (n,) of the probe split
    truth: Labels  # (m,) of the test split
    draws: dict[int, list[Labels]]  # labels a class: row numbers of the probe split
    held: Labels  # rows that no draw contains: the penalty is chosen on them
    episodes: dict[int, list[Episode]]  # shots: the tasks
    seed: int


class FeatureSet(NamedTuple):
    """Of one encoder at one tap."""

    bank: Tensor  # (n, D) of the probe split
    queries: Tensor  # (m, D) of the test split
    subject: Subject | None = None  # the encoder itself; None of pixels and spectra


class Found(NamedTuple):
    """A protocol's rows of the table, its (m,) test predictions if it has one set of them, and other measures."""

    rows: list[Row]
    predicted: Labels | None = None
    measures: list[Row] = []  # noqa: RUF012  # never written to


def percent(predicted: Labels, truth: Labels) -> float:
    return 100.0 * float((predicted == truth).mean())


def row(probe: str, labels: str, accuracies: list[float], setting: dict[str, Any], *, interval: bool = False) -> Row:
    """A line of the table.

    Args:
        probe: what classified.
        labels: which it was given: "all", "10/class", "5-way 1-shot".
        accuracies: in percent, one a draw.
        setting: what was chosen.
        interval: the mean's 95 % interval instead of the draws' standard deviation.
    """
    sd = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
    half = Z_95 * sd / math.sqrt(len(accuracies)) if interval and sd is not None else None
    found: Row = {"probe": probe, "labels": labels, "accuracy_pct": float(np.mean(accuracies))}
    found |= {"sd_pct": None if interval else sd, "ci95_pct": half, "values_pct": accuracies}
    return found | {"setting": setting}


def measure(name: str, of: str, value: float, unit: str = "") -> Row:
    """A row for a number that is not an accuracy; null if it is not finite."""
    return {"probe": name, "labels": of, "value": value if math.isfinite(value) else None, "unit": unit}


def _full(kind: Kind, probe: str) -> Callable[[FeatureSet, Plan], Found]:
    def run(features: FeatureSet, plan: Plan) -> Found:
        found = linear_probe(features.bank.numpy(), plan.labels, features.queries.numpy(), seed=plan.seed, kind=kind)
        setting = {"C": found.c, "converged": found.converged}
        return Found([row(probe, ALL, [percent(found.predicted, plan.truth)], setting)], found.predicted)

    return run


def _trained(probe: str, train: Callable[..., Trained], setting: dict[str, Any]) -> Callable[[FeatureSet, Plan], Found]:
    def run(features: FeatureSet, plan: Plan) -> Found:
        found = train(features.bank.numpy(), plan.labels, features.queries.numpy(), seed=plan.seed)
        accuracy = percent(found.predicted, plan.truth)
        return Found([row(probe, ALL, [accuracy], {"lr": found.rate} | setting)], found.predicted)

    return run


def _knn(features: FeatureSet, plan: Plan) -> Found:
    predicted = knn_predict(features.bank, torch.from_numpy(plan.labels), features.queries).numpy()
    setting = {"k": neighbours_for(len(features.bank)), "temperature": TEMPERATURE}
    return Found([row("knn", ALL, [percent(predicted, plan.truth)], setting)], predicted)


def _few(features: FeatureSet, plan: Plan) -> Found:
    bank, queries = features[:2]
    known, rows = torch.from_numpy(plan.labels), []
    for count, draws in plan.draws.items():
        few = few_label_probe(bank.numpy(), plan.labels, queries.numpy(), draws, plan.held)
        setting: dict[str, Any] = {"C": few[0].c, "converged": all(one.converged for one in few)}
        rows.append(row("linear", f"{count}/class", [percent(one.predicted, plan.truth) for one in few], setting))
        voted = [knn_predict(bank[chosen], known[chosen], queries).numpy() for chosen in map(torch.from_numpy, draws)]
        setting = {"k": neighbours_for(len(draws[0])), "temperature": TEMPERATURE}
        rows.append(row("knn", f"{count}/class", [percent(one, plan.truth) for one in voted], setting))
    return Found(rows)


def _few_shot(features: FeatureSet, plan: Plan) -> Found:
    bank, queries = episodes.unit(features.bank, features.queries)
    rows = []
    for shots, tasks in plan.episodes.items():
        for name in CLASSIFIERS:
            found = episodes.accuracies(bank, queries, tasks, name)
            rows.append(row(name, f"{WAYS}-way {shots}-shot", found, {"episodes": len(tasks)}, interval=True))
    return Found(rows)


def _fine_tune(features: FeatureSet, plan: Plan) -> Found:
    rows, subject = [], _subject(features)
    for count, draws in plan.draws.items():
        found, rate = fine_tune(subject, features.bank, plan.labels, draws, plan.held, seed=plan.seed)
        rows.append(row("fine-tune", f"{count}/class", [percent(one, plan.truth) for one in found], {"lr": rate}))
    return Found(rows)


def _ms_ssim(features: FeatureSet, plan: Plan) -> Found:
    subject = _subject(features)
    bank, queries = dependence.standardised(features.bank, features.queries)
    decoder = reconstruction.train_decoder(bank, subject.probe, seed=plan.seed)
    several, single, count = reconstruction.similarity(queries, subject.test, decoder)
    return Found([], None, [measure("ms-ssim", f"{count} scales", several), measure("ms-ssim", "1 scale", single)])


def _mine(features: FeatureSet, plan: Plan) -> Found:
    subject = _subject(features)
    bank, queries = dependence.standardised(features.bank, features.queries)
    found = dependence.mine(bank, subject.probe, queries, subject.test, seed=plan.seed)
    return Found([], None, [measure("mine", "image", found, "nats")])


def _ndm(features: FeatureSet, plan: Plan) -> Found:
    kinds = {"units": features[:2], "sigmoids": (features.bank.sigmoid(), features.queries.sigmoid())}
    found = {name: dependence.ndm(*dependence.standardised(*both), seed=plan.seed) for name, both in kinds.items()}
    return Found([], None, [measure("ndm", name, value, "nats") for name, value in found.items()])


def _subject(features: FeatureSet) -> Subject:
    if features.subject is None:
        raise ValueError("features: without an encoder; this protocol needs one")
    return features.subject


class Protocol(NamedTuple):
    """How it is run, and what a reader must know of it.

    Attributes:
        run: the protocol.
        text: a sentence or two.
        of_encoder: it trains beside or through an image encoder, takes minutes for each, and runs only where it is
            asked for by name.
        chooses: it holds rows of each class out to choose on, so that a class needs two.
    """

    run: Callable[[FeatureSet, Plan], Found]
    text: str
    of_encoder: bool = False
    chooses: bool = False


PROTOCOLS: dict[str, Protocol] = {
    "linear": Protocol(
        _full("softmax", "linear"),
        "Linear: multinomial logistic regression on standardised features (full-batch L-BFGS to a gradient of 3e-4 in "
        "whitened coordinates); its penalty is chosen on a held-out quarter of the probe split, never on the test "
        "images.",
        chooses=True,
    ),
    "knn": Protocol(
        _knn,
        "kNN: cosine similarity, votes weighted by exp(similarity / 0.1); 200 neighbours, or 2 % of a bank below "
        "10,000 images (at least 5).",
    ),
    "few": Protocol(
        _few,
        "Few labels a class: the linear probe and kNN on draws from three quarters of the probe split, the same for "
        "every encoder; mean ± standard deviation over the draws.",
        chooses=True,
    ),
    "few-shot": Protocol(
        _few_shot,
        f"Few-shot: tasks of {WAYS} classes, their labelled images from the probe split, {QUERIES} queries a class "
        "from the test split, each judged by itself; features less the probe split's mean, at unit norm; nearest class "
        "mean, and logistic regression of C = 1; mean ± 95 % interval over the tasks.",
    ),
    "sgd": Protocol(
        _trained("sgd", sgd_probe, {"epochs": SGD_EPOCHS}),
        f"Linear, SGD: {SGD_EPOCHS} epochs on standardised features without augmentation, momentum 0.9, no decay, the "
        "rate a tenth from 60 % and 80 % on and chosen on a held-out quarter of the probe split.",
        chooses=True,
    ),
    "svm": Protocol(
        _full("svm", "svm"),
        "Linear SVM: one class against the rest, squared hinge, on standardised features; penalty chosen as the linear "
        "probe's.",
        chooses=True,
    ),
    "mlp": Protocol(
        _trained("mlp", mlp_probe, {"epochs": MLP_EPOCHS, "units": MLP_UNITS}),
        f"MLP: {MLP_UNITS} hidden units, dropout 0.1, BatchNorm, ReLU, on standardised features without augmentation; "
        f"Adam, {MLP_EPOCHS} epochs.",
    ),
    "fine-tune": Protocol(
        _fine_tune,
        "Fine-tuned: encoder and a linear classifier learn from a few labels a class, without augmentation, BatchNorm "
        "with the statistics of pre-training, Adam along a cosine; the encoder's rate chosen on labelled images that "
        "no draw contains; mean ± standard deviation over the draws. Of an untrained encoder: supervised learning from "
        "the same labels.",
        of_encoder=True,
        chooses=True,
    ),
    "ms-ssim": Protocol(
        _ms_ssim,
        "MS-SSIM: a decoder learns from the features of the probe split and is compared on test images, by the finest "
        "scales that the window of 11 px fits into, and by one.",
        of_encoder=True,
    ),
    "mine": Protocol(
        _mine,
        "MINE: a lower bound on the information between image and features, its critic trained on the probe split and "
        "the bound taken on the test split.",
        of_encoder=True,
    ),
    "ndm": Protocol(
        _ndm,
        "NDM: how far the features' units are from independent, critic trained on the probe split, measured on the "
        "test split, without and with a sigmoid; 0 is independent.",
        of_encoder=True,
    ),
}
FROZEN = tuple(name for name, protocol in PROTOCOLS.items() if not protocol.of_encoder)
DEFAULT = ("linear", "knn", "few")
LEFT_OUT = "Test {} of classes that no training example has are left out."


def check_names(names: list[str]) -> list[str]:
    """The protocols asked for, in the table's order; "all" is every one on frozen features.

    Raises:
        ValueError: none, or one that is none.
    """
    for name in names:
        if name not in (*PROTOCOLS, ALL):
            raise ValueError(f"protocols: must be of {', '.join(PROTOCOLS)}, or {ALL}; got {name!r}")
    if not names:
        raise ValueError(f"protocols: none given; need at least one of {', '.join(PROTOCOLS)}")
    return [name for name in PROTOCOLS if name in names or (ALL in names and name in FROZEN)]


def described(protocols: Sequence[str], draws: int, tasks: int, *, things: str = "images") -> list[str]:
    """How each of them is run."""
    lines = [PROTOCOLS[name].text.replace("images", things) for name in protocols]
    lines += [f"Few labels: {draws} draws."] if "few" in protocols else []
    lines += [f"Few-shot: {tasks} tasks."] if "few-shot" in protocols else []
    return lines
