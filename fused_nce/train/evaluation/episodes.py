"""Few-shot classification: many small tasks of a few classes and a few labelled images, on frozen features.

A task's classes are drawn from the data set's own, its labelled images from the probe split, its queries from the test
split. Features lose the mean of the probe split, which takes no label, and are scaled to unit norm (Wang et al. 2019,
arXiv 1911.04623; Tian et al. 2020, arXiv 2003.11539). Each query is judged by itself: none learns from the others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Labels = NDArray[np.int64]

WAYS, SHOTS, QUERIES = 5, (1, 5), 15
C = 1.0  # of the logistic classifier, as Tian et al.


class Episode(NamedTuple):
    """One task: row numbers, class by class."""

    support: Labels  # (ways, shots) of the probe split
    queries: Labels  # (ways, queries) of the test split


def draw(labels: Labels, truth: Labels, *, shots: int, count: int, rng: np.random.Generator) -> list[Episode]:
    """`count` tasks of 5 classes, `shots` labelled images and 15 queries of each.

    Raises:
        ValueError: fewer than 5 classes have so many images.
    """
    known = {int(c): np.flatnonzero(labels == c) for c in np.unique(truth)}
    asked = {c: np.flatnonzero(truth == c) for c in known}
    classes = [c for c in known if len(known[c]) >= shots and len(asked[c]) >= QUERIES]
    if len(classes) < WAYS:
        raise ValueError(
            f"protocols: few-shot needs {WAYS} classes with {shots} labelled and {QUERIES} test examples; "
            f"got {len(classes)}"
        )
    tasks = []
    for _ in range(count):
        chosen = rng.choice(classes, WAYS, replace=False)
        support = np.stack([rng.choice(known[c], shots, replace=False) for c in chosen])
        tasks.append(Episode(support, np.stack([rng.choice(asked[c], QUERIES, replace=False) for c in chosen])))
    return tasks


def unit(
    bank: Tensor,  # (n, D)
    queries: Tensor,  # (m, D)
) -> tuple[Tensor, Tensor]:
    """Subtracts the bank's mean from both, and scales rows to norm 1."""
    mean = bank.mean(0)
    return functional.normalize(bank - mean, dim=1), functional.normalize(queries - mean, dim=1)


def nearest_prototype(
    support: Tensor,  # (ways, shots, D)
    queries: Tensor,  # (q, D)
) -> Tensor:  # (q,) int64, the class by its place in `support`
    """The class whose mean is nearest (Snell et al. 2017, arXiv 1703.05175): Euclidean distance."""
    return torch.cdist(queries, support.mean(1)).argmin(1)


def logistic(
    support: Tensor,  # (ways, shots, D)
    queries: Tensor,  # (q, D)
) -> Tensor:  # (q,) int64
    """scikit-learn's logistic regression, C = 1, on the few labelled images."""
    from sklearn.linear_model import LogisticRegression

    ways, shots, _ = support.shape
    # The penalised optimum lies in the span of the rows: 25 coordinates say as much as 2,048, and cost a tenth.
    rows = support.flatten(0, 1)
    basis = torch.linalg.qr(rows.T.double()).Q
    few, asked = ((x.double() @ basis).numpy() for x in (rows, queries))
    model = LogisticRegression(C=C, max_iter=1000).fit(few, np.repeat(np.arange(ways), shots))
    return torch.from_numpy(model.predict(asked))


CLASSIFIERS = {"prototype": nearest_prototype, "logistic": logistic}


def accuracies(bank: Tensor, queries: Tensor, tasks: list[Episode], classifier: str) -> list[float]:
    """Of each task, in percent.

    Args:
        bank: (n, D) features of the probe split, from `unit`.
        queries: (m, D) of the test split, from `unit`.
        tasks: from `draw`.
        classifier: one of `CLASSIFIERS`.
    """
    found = []
    for task in tasks:
        asked = queries[torch.from_numpy(task.queries)]
        predicted = CLASSIFIERS[classifier](bank[torch.from_numpy(task.support)], asked.flatten(0, 1))
        right = predicted.view(asked.shape[:2]) == torch.arange(len(asked))[:, None]
        found.append(100 * float(right.float().mean()))
    return found
