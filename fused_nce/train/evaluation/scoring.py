"""Accuracies of one feature set by every protocol asked for, all on the same plan of labels, draws and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from fused_nce.train.evaluation import episodes
from fused_nce.train.evaluation.fine_tune import Subject
from fused_nce.train.evaluation.probes import HELD_OUT, called, draw, hold_out
from fused_nce.train.evaluation.protocols import PROTOCOLS, FeatureSet, Labels, Plan, Row
from fused_nce.train.seeded import seeded

TRAINED, PIXELS = "trained", "pixels"  # the encoder of the run, and the tap of no encoder
DRAWS_VERSION = 2  # how label sets and tasks are drawn; 1, which eval.json did not name, drew all from one generator
FEW, FEW_SHOT = 1, 2  # what a generator is for
MOST_DRAWN = 100  # classes of a matrix; that of 10,000 would be 668 MB of JSON


class Asked(NamedTuple):
    """What an evaluation of a run is asked for.

    Attributes:
        taps: of `encode`.
        protocols: names, in the order of the table.
        labels_per_class: sizes of the small label sets.
        draws: how many of each, at least 2.
        tasks: of few-shot, at least 2.
        seed: of the draws, the untrained encoders and the embedding.
        baselines: untrained encoders and the inputs themselves too.
        leave_out_unseen: leave out test examples of classes that no training example has, instead of refusing them.
        keep: called with all rows so far after each feature set.
        neighbours: images that the pictures show beside each of a few test images.
        look: called with both splits, images or recordings, before anything is computed; it may refuse them.
        labels: of recordings, those to judge, the first for the pictures; every one that can be judged if left out.
    """

    taps: list[str]
    protocols: list[str]
    labels_per_class: list[int]
    draws: int
    tasks: int
    seed: int
    baselines: bool
    leave_out_unseen: bool
    keep: Callable[[list[dict[str, Any]]], None]
    neighbours: int = 5
    look: Callable[[Any, Any], None] = lambda probe, test: None
    labels: list[str] | None = None

    def plan(self, labels: Tensor, truth: Tensor, classes: Sequence[str]) -> Plan:
        """The draws of one labelling: see `scoring.plan`."""
        return plan(
            labels, truth, classes=classes, protocols=self.protocols, labels_per_class=self.labels_per_class,
            draws=self.draws, tasks=self.tasks, seed=self.seed,
        )  # fmt: skip

    def encoders(self, model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
        """The trained model by its name; then, as baselines, those that the method compares with, from one seed."""
        yield TRAINED, model
        for name, other in config.untrained().items() if self.baselines else ():
            with seeded(self.seed):
                untrained = other.build()
            yield name, untrained


def plan(
    labels: Tensor,
    truth: Tensor,
    *,
    classes: Sequence[str] | None = None,
    protocols: Sequence[str] = ("few",),
    labels_per_class: Sequence[int],
    draws: int,
    tasks: int = 600,
    seed: int,
) -> Plan:
    """Draws what the protocols need: few-label subsets from three quarters of the probe split, and few-shot tasks.

    Each size of either has a generator of its own, so that it is the same whatever else is asked for.

    Args:
        labels: (n,) of the probe split.
        truth: (m,) of the test split.
        classes: their names, by which an error calls them.
        protocols: names.
        labels_per_class: sizes of the small label sets.
        draws: how many of each, at least 2.
        tasks: of few-shot, at least 2.
        seed: of the draws.

    Raises:
        ValueError: fewer than 2 draws or tasks (no standard deviation), a class that is too small, or a test class
            without a labelled example in the probe split.
    """
    for name, value in (("draws", draws), ("tasks", tasks)):
        if value < 2:
            raise ValueError(f"{name}: {value}; need at least 2 for a standard deviation")
    for count in labels_per_class:
        if count < 1:
            raise ValueError(f"labels_per_class: {count}; need at least 1")
    known, tested = labels.numpy().astype(np.int64), truth.numpy().astype(np.int64)
    missing = np.setdiff1d(tested, known)
    if len(missing):
        name = called(missing[0], classes)
        raise ValueError(f"labels: test class {name} has no example in the probe split; need every class there")
    single = not any(PROTOCOLS[name].chooses for name in protocols)
    pool, held = hold_out(known, HELD_OUT, np.random.default_rng(seed), classes, single=single)
    counts = labels_per_class if {"few", "fine-tune"} & set(protocols) else ()
    rngs = {count: np.random.default_rng([seed, FEW, count]) for count in counts}
    few = {count: [draw(known, pool, count, rng, classes) for _ in range(draws)] for count, rng in rngs.items()}
    rngs = {n: np.random.default_rng([seed, FEW_SHOT, n]) for n in (episodes.SHOTS if "few-shot" in protocols else ())}
    drawn = {shots: episodes.draw(known, tested, shots=shots, count=tasks, rng=rng) for shots, rng in rngs.items()}
    return Plan(known, tested, few, held, drawn, seed)


class Scored(NamedTuple):
    """Of one feature set.

    Attributes:
        rows: with probe, labels, accuracy_pct, sd_pct, ci95_pct, values_pct, setting and width.
        shown: the first probe with one set of (m,) test predictions, with them; None without such a probe.
        measures: rows of what is no accuracy, with probe, labels, value, unit and width.
    """

    rows: list[Row]
    shown: tuple[str, Labels] | None
    measures: list[Row]


def score(
    bank: Tensor, queries: Tensor, plan: Plan, protocols: Sequence[str], subject: Subject | None = None
) -> Scored:
    """All accuracies of one feature set.

    Args:
        bank: (n, D) features of the probe split.
        queries: (m, D) features of the test split.
        plan: labels and draws.
        protocols: names, in the order of the rows.
        subject: the encoder that they are of; without one, protocols that need it are passed over.
    """
    rows: list[Row] = []
    measures: list[Row] = []
    shown = None
    for name in protocols:
        if PROTOCOLS[name].of_encoder and subject is None:
            continue
        found = PROTOCOLS[name].run(FeatureSet(bank, queries, subject), plan)
        rows += [row | {"width": bank.shape[1]} for row in found.rows]
        measures += [row | {"width": bank.shape[1]} for row in found.measures]
        if shown is None and found.predicted is not None:
            shown = name, found.predicted
    return Scored(rows, shown, measures)


def confusion(shown: tuple[str, Labels] | None, tap: str, truth: Labels, classes: int) -> dict[str, Any] | None:
    """Of the probe that is shown, if any: counts[true][predicted]; of more than 100 classes the mistakes alone."""
    if shown is None:
        return None
    name, predicted = shown
    found: dict[str, Any] = {"tap": tap, "probe": name, "labels": "all"}
    if classes > MOST_DRAWN:
        return found | {"mistakes": mistakes(predicted, truth)}
    return found | {"matrix": confusion_matrix(predicted, truth, classes)}


def confusion_matrix(predicted: Labels, truth: Labels, classes: int) -> list[list[int]]:
    """counts[true][predicted], classes × classes."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (truth, predicted), 1)
    return [[int(value) for value in row] for row in counts]


def mistakes(predicted: Labels, truth: Labels) -> list[list[int]]:
    """[true, predicted, count] of all that was taken for another class, the commonest first."""
    wrong = predicted != truth
    pairs, counts = np.unique(np.stack((truth[wrong], predicted[wrong]), 1), axis=0, return_counts=True)
    found: list[list[int]] = np.column_stack((pairs, counts))[np.argsort(-counts, kind="stable")].tolist()
    return found
