"""Linear classifiers on frozen features, with every label or with a few labels a class: penalty chosen, then fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fused_nce.measure import torch_threads
from fused_nce.train.evaluation.logistic import Axes, Kind, fit, principal_axes
from fused_nce.train.machine.threads import look

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

# Inverse penalties, strong to weak: on standardised features the best value lay inside this range for every
# feature set tried, from 64 pixels to 2,048 channels, with 100 labels and with all.
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# The squared hinge bends twenty times as much as a softmax of ten classes: as strong a pull needs a smaller C.
C_GRIDS: dict[Kind, tuple[float, ...]] = {"softmax": C_GRID, "svm": tuple(c / 10 for c in C_GRID)}
SMALL_ROWS = 2_000
HELD_OUT = 0.25


@dataclass(frozen=True)
class Fitted:
    """Predictions of one probe on the test images, its penalty, and whether the fit converged."""

    predicted: Labels  # (m,)
    c: float
    converged: bool


def standardise(bank: Array, queries: Array) -> tuple[Array, Array]:
    """Both sets with the bank's mean and standard deviation removed; a constant feature becomes 0.

    The statistics come from the images of the probe split, never from the test images, and need no label.
    """
    mean = bank.mean(axis=0, dtype=np.float64).astype(np.float32)  # fault: test-images-standardisation
    centred = bank - mean
    sd = np.sqrt(np.square(centred).mean(axis=0, dtype=np.float64)).astype(np.float32)
    # A feature that is constant but for rounding must not be blown up to unit variance.
    sd[sd <= 1e-6 * np.abs(mean)] = np.inf
    centred /= sd  # in place: 50,000 images of 3,072 pixels are 600 MB
    return centred, (queries - mean) / sd


def hold_out(
    labels: Labels,
    fraction: float,
    rng: np.random.Generator,
    classes: Sequence[str] | None = None,
    *,
    single: bool = False,
) -> tuple[Labels, Labels]:
    """Row indices (fit, held out), the given fraction of each class held out, at least one image of each in `fit`.

    Args:
        labels: (n,).
        fraction: to hold out.
        rng: of the draw.
        classes: their names, by which an error calls them.
        single: a class may have a single image, none of it held out.

    Raises:
        ValueError: a class with a single image, which can be in one part only.
    """
    held = []
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count < 2 and not single:
            name = called(label, classes)
            raise ValueError(
                f"labels: class {name} has {count} example; need 2 or more a class to choose on held-out ones"
            )
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.append(rows[: min(count - 1, max(1, round(fraction * count)))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def called(label: np.int64, classes: Sequence[str] | None) -> str:
    """The name of a class, or its number."""
    return classes[int(label)] if classes else str(label)


def draw(
    labels: Labels, pool: Labels, per_class: int, rng: np.random.Generator, classes: Sequence[str] | None = None
) -> Labels:
    """`per_class` rows of each class, drawn without replacement from the rows in `pool`.

    Raises:
        ValueError: a class with fewer rows than that in the pool.
    """
    chosen = []
    for label in np.unique(labels):
        rows = pool[labels[pool] == label]
        if len(rows) < per_class:
            few = f"class {called(label, classes)} has only {len(rows)} examples to draw from"
            raise ValueError(f"labels_per_class: {per_class}; {few}")
        chosen.append(rng.choice(rows, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def fit_predict(
    features: Array, labels: Labels, queries: Array, c: float, axes: Axes | None = None, kind: Kind = "softmax"
) -> Fitted:
    """A linear classifier with penalty |w|²/2c on standardised features; predicts the queries."""
    names, numbers = np.unique(labels, return_inverse=True)
    x = torch.from_numpy(features)
    look()
    # Small problems are all overhead: more threads only wait for each other on a busy machine.
    with torch_threads(1 if len(features) < SMALL_ROWS else torch.get_num_threads()):
        model = fit(x, torch.from_numpy(numbers), c, principal_axes(x) if axes is None else axes, kind)
        predicted = model.predict(torch.from_numpy(queries)).numpy()
    return Fitted(names[predicted], c, model.converged)


def choose_c(
    features: Array,
    labels: Labels,
    trials: list[tuple[Labels, Labels]],
    axes: Axes | None = None,
    kind: Kind = "softmax",
) -> float:
    """The penalty of the kind's grid that gets most held-out rows right, over all (fit rows, held-out rows) trials.

    Among equals the strongest penalty wins, because the grid goes from strong to weak.

    Args:
        features: (n, D), standardised.
        labels: (n,).
        trials: row indices.
        axes: of all the features; each trial's own if left out.
        kind: of classifier.
    """
    grid = C_GRIDS[kind]
    right = np.zeros(len(grid), dtype=np.int64)
    for rows, held in trials:
        known, own = features[rows], axes or principal_axes(torch.from_numpy(features[rows]))
        for i, c in enumerate(grid):
            found = fit_predict(known, labels[rows], features[held], c, own, kind)  # fault: penalty-chosen-rows
            right[i] += int((found.predicted == labels[held]).sum())
    return grid[int(np.argmax(right))]


def linear_probe(bank: Array, labels: Labels, queries: Array, *, seed: int = 0, kind: Kind = "softmax") -> Fitted:
    """The probe with every label: penalty chosen on a held-out quarter of the bank, then fitted on the whole bank.

    Args:
        bank: (n, D) features of the probe split.
        labels: (n,) their classes.
        queries: (m, D) features of the test images, which no choice sees.
        seed: of the held-out part.
        kind: "softmax", logistic regression, or "svm".
    """
    bank, queries = standardise(bank, queries)
    rows, held = hold_out(labels, HELD_OUT, np.random.default_rng(seed))
    axes = principal_axes(torch.from_numpy(bank))
    return fit_predict(bank, labels, queries, choose_c(bank, labels, [(rows, held)], axes, kind), axes, kind)


def few_label_probe(
    bank: Array, labels: Labels, queries: Array, draws: list[Labels], held: Labels, *, trials: int = 3
) -> list[Fitted]:
    """The probe with the few labels of each draw (row indices of the bank).

    The penalty is chosen once, from the first draws, on rows that no draw contains; every feature set is treated
    alike. Standardisation uses the whole bank, which takes no label.

    Returns:
        One `Fitted` a draw.
    """
    bank, queries = standardise(bank, queries)
    c = choose_c(bank, labels, [(rows, held) for rows in draws[:trials]])
    return [fit_predict(bank[rows], labels[rows], queries, c) for rows in draws]
