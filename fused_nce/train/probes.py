"""Logistic regression on frozen features: the linear probe, with every label or with a few labels a class."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Labels = NDArray[np.int64]

# Inverse penalties, strong to weak: on standardised features the best value lay inside this range for every
# feature set tried, from 64 pixels to 2,048 channels, with 100 labels and with all.
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SEARCH_ROWS = 10_000  # the penalty is chosen on at most this many rows: choosing on 50,000 took six times as long
SMALL_ROWS = 2_000
HELD_OUT = 0.25


@dataclass(frozen=True)
class Fitted:
    """Predictions of one probe on the test images, with how they came about."""

    predicted: Labels  # (m,)
    c: float
    converged: bool


def standardise(bank: Array, queries: Array) -> tuple[Array, Array]:
    """Both sets with the bank's mean and standard deviation removed; a constant feature becomes 0.

    The statistics come from the images of the probe split, never from the test images, and need no label.
    """
    mean = bank.mean(axis=0, dtype=np.float64).astype(np.float32)
    sd = np.sqrt(np.square(bank - mean).mean(axis=0, dtype=np.float64)).astype(np.float32)
    # A feature that is constant but for rounding must not be blown up to unit variance.
    sd[sd <= 1e-6 * np.abs(mean)] = np.inf
    return (bank - mean) / sd, (queries - mean) / sd


def hold_out(labels: Labels, fraction: float, rng: np.random.Generator) -> tuple[Labels, Labels]:
    """Row indices (fit, held out), the given fraction of each class held out, at least one image of each in `fit`.

    Raises:
        ValueError: a class with a single image, which can be in one part only.
    """
    held = []
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count < 2:
            raise ValueError(f"labels: class {label} has {count} image; need 2 or more a class to choose the penalty")
        rows = rng.permutation(np.flatnonzero(labels == label))
        held.append(rows[: min(count - 1, max(1, round(fraction * count)))])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def draw(labels: Labels, pool: Labels, per_class: int, rng: np.random.Generator) -> Labels:
    """`per_class` rows of each class, drawn without replacement from the rows in `pool`.

    Raises:
        ValueError: a class with fewer rows than that in the pool.
    """
    chosen = []
    for label in np.unique(labels):
        rows = pool[labels[pool] == label]
        if len(rows) < per_class:
            raise ValueError(f"labels_per_class: {per_class}; class {label} has only {len(rows)} images to draw from")
        chosen.append(rng.choice(rows, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def fit_predict(features: Array, labels: Labels, queries: Array, c: float) -> Fitted:
    """Multinomial logistic regression with penalty |w|²/2c on standardised features; predicts the queries."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if len(features) < features.shape[1]:
        # The optimum lies in the span of the rows, so rotating into that span changes nothing but the time:
        # 100 rows of width 1,024 take a tenth.
        basis = np.linalg.qr(features.T)[0]  # (D, n)
        features, queries = features @ basis, queries @ basis
    # Small problems are all overhead: on a busy machine 29 fits on 445 digits took 15 s with two threads, 1 with one.
    small = len(features) < SMALL_ROWS
    threads = threadpool_limits(1) if small else nullcontext()
    with threads, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        # The bound on large sets is one of time; the result says whether it was met.
        model = LogisticRegression(C=c, max_iter=1000 if small else 200, tol=1e-4).fit(features, labels)
    stalled = any(issubclass(item.category, ConvergenceWarning) for item in caught)
    return Fitted(model.predict(queries).astype(np.int64), c, not stalled)


def choose_c(features: Array, labels: Labels, trials: list[tuple[Labels, Labels]]) -> float:
    """The penalty of `C_GRID` that gets most held-out rows right, over all (fit rows, held-out rows) trials.

    Among equals the strongest penalty wins, because the grid goes from strong to weak.
    """
    right = []
    for c in C_GRID:
        hits = 0
        for fit, held in trials:
            hits += int((fit_predict(features[fit], labels[fit], features[held], c).predicted == labels[held]).sum())
        right.append(hits)
    return C_GRID[int(np.argmax(right))]


def linear_probe(bank: Array, labels: Labels, queries: Array, *, seed: int = 0) -> Fitted:
    """The probe with every label: penalty chosen on a held-out quarter of the bank, then fitted on the whole bank.

    Args:
        bank: (n, D) features of the probe split.
        labels: (n,) their classes.
        queries: (m, D) features of the test images, which no choice sees.
        seed: of the held-out part.
    """
    bank, queries = standardise(bank, queries)
    rng = np.random.default_rng(seed)
    fit, held = hold_out(labels, HELD_OUT, rng)
    if len(labels) > SEARCH_ROWS:
        fit = rng.permutation(fit)[: round(SEARCH_ROWS * (1 - HELD_OUT))]
        held = rng.permutation(held)[: round(SEARCH_ROWS * HELD_OUT)]
    return fit_predict(bank, labels, queries, choose_c(bank, labels, [(fit, held)]))


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
    held = held[:SEARCH_ROWS]
    c = choose_c(bank, labels, [(rows, held) for rows in draws[:trials]])
    return [fit_predict(bank[rows], labels[rows], queries, c) for rows in draws]
