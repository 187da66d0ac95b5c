"""Accuracies of one feature set: linear probe and kNN, with every label and with a few labels a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_nce.train.knn import TEMPERATURE, knn_predict, neighbours_for
from fused_nce.train.probes import HELD_OUT, Labels, draw, few_label_probe, hold_out, linear_probe

Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The labelled rows that every feature set is given, so that all are compared on the same draws."""

    labels: Labels  # (n,) of the probe split
    truth: Labels  # (m,) of the test split
    draws: list[Labels]  # row indices of the probe split
    held: Labels  # rows that no draw contains: the penalty is chosen on them
    seed: int


def plan(labels: Tensor, truth: Tensor, *, labels_per_class: int, draws: int, seed: int) -> Plan:
    """Draws the few-label subsets, `labels_per_class` of each class, from three quarters of the probe split.

    Raises:
        ValueError: fewer than 2 draws (no standard deviation), a class that is too small, or a test class without
            a labelled image in the probe split.
    """
    if draws < 2:
        raise ValueError(f"draws: {draws}; need at least 2 for a standard deviation")
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class: {labels_per_class}; need at least 1")
    known, tested = labels.numpy().astype(np.int64), truth.numpy().astype(np.int64)
    missing = np.setdiff1d(tested, known)
    if len(missing):
        raise ValueError(f"labels: test class {missing[0]} has no image in the probe split; need every class there")
    rng = np.random.default_rng(seed)
    pool, held = hold_out(known, HELD_OUT, rng)
    chosen = [draw(known, pool, labels_per_class, rng) for _ in range(draws)]
    return Plan(known, tested, chosen, held, seed)


def percent(predicted: Labels, truth: Labels) -> float:
    return 100.0 * float((predicted == truth).mean())


def score(bank: Tensor, queries: Tensor, plan: Plan) -> tuple[list[Row], Labels]:
    """All four accuracies of one feature set.

    Args:
        bank: (n, D) features of the probe split.
        queries: (m, D) features of the test split.
        plan: labels and draws.

    Returns:
        Rows with probe, labels, accuracy_pct, sd_pct (None where there is one value), width and setting; and the
        (m,) test predictions of the linear probe with every label.
    """
    known = torch.from_numpy(plan.labels)
    arrays = bank.numpy(), plan.labels, queries.numpy()
    rows: list[Row] = []

    def add(probe: str, labels: str, accuracies: list[float], setting: dict[str, Any]) -> None:
        sd = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else None
        row: Row = {"probe": probe, "labels": labels, "accuracy_pct": float(np.mean(accuracies)), "sd_pct": sd}
        rows.append(row | {"values_pct": accuracies, "width": bank.shape[1], "setting": setting})

    full = linear_probe(*arrays, seed=plan.seed)
    add("linear", "all", [percent(full.predicted, plan.truth)], {"C": full.c, "converged": full.converged})
    near = knn_predict(bank, known, queries).numpy()
    add("knn", "all", [percent(near, plan.truth)], {"k": neighbours_for(len(bank)), "temperature": TEMPERATURE})

    few = few_label_probe(*arrays, plan.draws, plan.held)
    setting = {"C": few[0].c, "converged": all(one.converged for one in few)}
    add("linear", "few", [percent(one.predicted, plan.truth) for one in few], setting)
    voted = [knn_predict(bank[rows_], known[rows_], queries).numpy() for rows_ in map(torch.from_numpy, plan.draws)]
    setting = {"k": neighbours_for(len(plan.draws[0])), "temperature": TEMPERATURE}
    add("knn", "few", [percent(one, plan.truth) for one in voted], setting)
    return rows, full.predicted


def confusion_matrix(predicted: Labels, truth: Labels, classes: int) -> list[list[int]]:
    """counts[true][predicted], classes × classes."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (truth, predicted), 1)
    return [[int(value) for value in row] for row in counts]
