"""What the trainer's tests do again and again: scikit-learn reads its digits once, and lays out images in few turns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _scikit_learn_once() -> Iterator[None]:
    """An evaluation's picture takes 1,000 turns of t-SNE, half of what it costs on the digits; 250 are the least."""
    from sklearn import datasets, manifold

    least = {"max_iter" if "max_iter" in inspect.signature(manifold.TSNE).parameters else "n_iter": 250}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_digits", functools.cache(datasets.load_digits))
        patch.setattr(manifold, "TSNE", functools.partial(manifold.TSNE, **least))
        yield
