"""What every statistic, loss and gradient must be: the formulas, in numpy, all scores at once, in float64 or wider.

Nothing is shared with the package. `q` = 1 − p is exp(L − D), never p − 1: autograd of the textbook loss in float64 is
off by 136 % where p rounds to 1. `tests/core/test_oracle.py` holds this file to 60-digit arithmetic.

N rows, M columns, D width, P = n_c positives a row; r = ⟨q,k⟩, s = scale·r, t transformed score, w = dL/ds.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


class Coefficients(NamedTuple):
    """dL/d statistic."""

    pos: Array  # (N, P)
    neg_lse: Array  # (N,)
    square: Array  # (N,)


class Gradients(NamedTuple):
    """dL/d input."""

    dq: Array  # (N, D)
    dk: Array  # (M, D)
    dscale: Array  # 0-d


def softplus(z: Array) -> Array:
    """log(1 + e^z)."""
    return np.logaddexp(z.dtype.type(0), z)


class Oracle:
    """One problem, solved by definition.

    Args:
        q: (N, D).
        k: (M, D), M = n_k·n_c.
        scale: factor of the dot product.
        n_c: columns an image; the P = n_c columns of a row's own image are its positives.
        rows_per_image: row i belongs to image i // rows_per_image + offset.
        offset: image of row 0.
        clip: t = clip·tanh(s/clip); None for t = s.
        real: what is computed in; np.longdouble to judge float64 code.
    """

    def __init__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        *,
        scale: float,
        n_c: int,
        rows_per_image: int = 1,
        offset: int = 0,
        clip: float | None = None,
        real: type[np.floating[Any]] = np.float64,
    ) -> None:
        self.q, self.k = np.asarray(q, dtype=real), np.asarray(k, dtype=real)
        self.scale, self.n_c, self.clip, self.real = real(scale), n_c, clip, real
        (self.n, self.d), self.m = self.q.shape, self.k.shape[0]
        image = np.arange(self.n) // rows_per_image + offset
        self.own = image[:, None] == np.arange(self.m)[None, :] // n_c  # (N, M)
        self.r = self.q @ self.k.T
        self.s = self.scale * self.r
        x = self.s / clip if clip else self.s
        self.t = clip * np.tanh(x) if clip else self.s
        fade = np.exp(-2 * np.abs(x))
        self.slope = 4 * fade / (1 + fade) ** 2 if clip else np.ones_like(self.s)  # dt/ds = sech²(s/c)

    def of_own(self, x: Array) -> Array:
        """The entries at each row's positives, (N, P)."""
        return np.asarray(x[self.own].reshape(self.n, self.n_c))

    @cached_property
    def pos(self) -> Array:
        """(N, P) transformed scores of the positives."""
        return self.of_own(self.t)

    @cached_property
    def neg_max(self) -> Array:
        """(N,) largest transformed score among the negatives; −inf without any."""
        return np.asarray(np.where(self.own, -np.inf, self.t).max(axis=1))

    @cached_property
    def neg_lse(self) -> Array:
        """(N,) L, the log of the sum of e^t over the negatives; −inf without any."""
        top = np.where(np.isfinite(self.neg_max), self.neg_max, 0)
        with np.errstate(divide="ignore"):
            return np.asarray(top + np.log(np.exp(np.where(self.own, -np.inf, self.t - top[:, None])).sum(axis=1)))

    @cached_property
    def square(self) -> Array:
        """(N,) sum of s² over all columns."""
        return np.asarray((self.s**2).sum(axis=1))

    @cached_property
    def nce(self) -> Array:
        """(N, P) softplus(L − pos)."""
        return softplus(self.neg_lse[:, None] - self.pos)

    @cached_property
    def miss(self) -> Array:
        """(N, P) q = exp(L − D) = 1 − p, D = log(e^pos + e^L)."""
        lse = self.neg_lse[:, None]
        return np.asarray(np.exp(lse - np.logaddexp(self.pos, lse)))

    @cached_property
    def softmax(self) -> Array:
        """(N, M) exp(t − L) at the negatives, 0 at the own image."""
        lse = np.where(np.isfinite(self.neg_lse), self.neg_lse, 0)[:, None]
        return np.where(self.own, 0, np.exp(np.where(self.own, 0, self.t - lse)))

    def penalty(self, strength: float) -> Any:
        """λ·mean(s²)."""
        return strength * self.square.sum() / (self.n * self.m)

    def nce_coefficients(self, g: ArrayLike, d_square: float = 0.0) -> Coefficients:
        """dL/d statistic, from g = dL/d nce (N, P) and dL/d square, the same for all rows."""
        weighted = self.miss * np.asarray(g, dtype=self.real)
        return Coefficients(-weighted, weighted.sum(axis=1), np.full(self.n, d_square, dtype=self.real))

    def weights(self, d: Coefficients) -> Array:
        """w = dL/ds, (N, M)."""
        w = d.neg_lse[:, None] * self.softmax
        w[self.own] = d.pos.ravel()
        return np.asarray(w * self.slope + 2 * d.square[:, None] * self.s)

    def gradients(self, d: Coefficients) -> Gradients:
        """dL/dq = scale·w k, dL/dk = scale·wᵀ q, dL/dscale = Σ w·r."""
        w = self.weights(d)
        return Gradients(self.scale * (w @ self.k), self.scale * (w.T @ self.q), np.asarray((w * self.r).sum()))
