"""How far a result may be from the oracle: the only tolerance of the suite, elementwise, computed from the inputs.

The first source of error is the score itself: a dot product in the accumulation dtype is off by δ, which grows with the
size of the terms. Everything else is a few roundings u. A result passes if η = max |out − exact| / budget ≤ 1 and it is
finite; the largest η per dtype and backend is printed at the end of a run. Where δ > 0.05 the scores are noise, and a
weight may be anything that its upstream gradient allows: |dL/ds| ≤ |g|. Tuned once, to no false alarm on correct code
in 400 cases a dtype; never loosened because something failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .oracle import Array, Coefficients, Gradients, Oracle

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NOISE = 0.05  # a score off by more than this says nothing


@dataclass(frozen=True)
class Precision:
    """Roundings of one dtype on one backend."""

    u: float  # of the accumulation dtype
    u_in: float  # of the dtype in which w enters the gradient GEMMs; 0 if that is the accumulation dtype
    out: torch.dtype  # of the gradients
    floor: float = 0.0  # absolute error of w, in units of the largest that its coefficients allow

    @property
    def tiny(self) -> float:
        """Below this the accumulation dtype may flush to zero."""
        return 2.0**-125 if self.u == 2.0**-24 else 2.0**-1021

    @property
    def step(self) -> float:
        """Half the smallest positive gradient: what rounding to `out` loses however small the value."""
        info = torch.finfo(self.out)
        return max(float(info.smallest_normal * info.eps / 2), 1e-37 if self.u == 2.0**-24 else 1e-300)


# What w is rounded to for its GEMMs, where that is not the accumulation dtype. A TF32 product drops the low bits.
WEIGHTS = {
    ("cpu", torch.bfloat16): ROUNDOFF[torch.bfloat16],
    ("cuda", torch.bfloat16): ROUNDOFF[torch.bfloat16],
    ("cuda", torch.float16): ROUNDOFF[torch.float16],
    ("triton", torch.bfloat16): ROUNDOFF[torch.bfloat16],
    ("triton", torch.float16): 2.0**-10,
}
# float16 ends at 2^-24, and `cuda` scales the largest possible w to between 2^6 and 2^8.
FLOOR = {("cuda", torch.float16): 2.0**-31}


def precision(dtype: torch.dtype, backend: str) -> Precision:
    """The roundings of inputs of `dtype` on a backend."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    key = (backend, dtype)
    return Precision(ROUNDOFF[wide], WEIGHTS.get(key, 0.0), dtype, FLOOR.get(key, 0.0))


class Budget:
    """The allowed error of everything that a backend computes for one problem."""

    def __init__(self, exact: Oracle, p: Precision) -> None:
        self.exact, self.p, self.scale = exact, p, abs(float(exact.scale))
        terms = self.scale * (np.abs(exact.q) @ np.abs(exact.k).T)
        self.delta_each = p.u * (4 + np.sqrt(exact.d)) * terms  # (N, M) error of each score
        self.delta = self.delta_each.max(axis=1)  # (N,)
        self.top = np.abs(exact.t).max(axis=1)  # (N,)
        self.equal = bool((exact.q == exact.q[:1]).all() and (exact.k == exact.k[:1]).all())

    def growth(self, count: int) -> float:
        """Roundings that a sum of `count` terms piles up: a random walk, but equal terms may all round the same way."""
        return count if self.equal else float(np.sqrt(count))

    # ---- statistics and losses ----------------------------------------------------------------------------------

    @property
    def pos(self) -> Array:
        """(N, P)."""
        return self.exact.of_own(self.delta_each + 8 * self.p.u * np.abs(self.exact.t)) + self.p.tiny

    @property
    def neg_max(self) -> Array:
        """(N,)."""
        return np.asarray(self.delta + 8 * self.p.u * self.top + self.p.tiny)

    @property
    def neg_lse(self) -> Array:
        """(N,): read from sums of at most M terms, so |L| ≤ max|t| + log M."""
        return np.asarray(2 * self.delta + 8 * self.p.u * (1 + self.top + np.log(self.exact.m)))

    @property
    def square(self) -> Array:
        """(N,): 2|s|·δ a term, and a sum of M terms."""
        noise = (2 * np.abs(self.exact.s) * self.delta_each + self.delta_each**2).sum(axis=1)
        return np.asarray(noise + (8 + self.growth(self.exact.m)) * self.p.u * self.exact.square + self.p.tiny)

    @property
    def nce(self) -> Array:
        """(N, P)."""
        return np.asarray((4 * self.delta + 8 * self.p.u * (1 + self.top))[:, None] + 8 * self.p.u * self.exact.nce)

    def mean(self, budget: Array, exact: Array) -> Any:
        """Of the mean of elements that have this budget."""
        return budget.mean() + 8 * self.p.u * np.abs(exact).mean()

    def total(self, budget: Array, exact: Array) -> Any:
        """Of their sum."""
        return budget.sum() + 8 * self.p.u * np.abs(exact).sum()

    def penalty(self, strength: float) -> Any:
        """Of λ·mean(s²)."""
        return strength / (self.exact.n * self.exact.m) * self.total(self.square, self.exact.square) + self.p.tiny

    # ---- gradients ----------------------------------------------------------------------------------------------

    def nce_gradients(self, g: Array, d_square: float, exact: Gradients) -> Gradients:
        """Of dL/dq, dL/dk, dL/dscale, from g = dL/d nce (N, P) and dL/d square.

        The coefficients come from noisy statistics too: 4δ in all, of which t, L and q = 1 − p have their share.
        """
        size = np.abs(np.asarray(g, dtype=self.exact.real))
        known = self.exact.nce_coefficients(size, abs(d_square))
        limit = Coefficients(size, size.sum(axis=1), known.square)
        return self._gradients(Coefficients(-known.pos, known.neg_lse, known.square), limit, 4.0, exact)

    def stats_gradients(self, d: Coefficients, exact: Gradients) -> Gradients:
        """The same, from coefficients that are given: only t and L are noisy."""
        size = Coefficients(*(np.abs(x) for x in d))
        return self._gradients(size, size, 2.0, exact)

    def _gradients(self, size: Coefficients, limit: Coefficients, share: float, exact: Gradients) -> Gradients:
        """Weight errors, pushed through the GEMMs.

        Args:
            size: magnitudes of the coefficients.
            limit: what they could be at most, whatever the scores: holds for rows whose scores are noise.
            share: relative error of a weight in units of δ.
            exact: the gradients, for what rounding them to their dtype costs.
        """
        o, u, u_in = self.exact, self.p.u, self.p.u_in
        delta = self.delta[:, None]
        before = self._spread(size)  # (N, M) |w| before the clip's slope
        after = before * o.slope
        squared = 2 * size.square[:, None] * np.abs(o.s)
        # L is stored rounded, and read twice; |L| ≤ max|t| + log M, where max|t| is in δ.
        relative = share * delta + (8 + 2 * np.log(o.m)) * u + u_in
        if o.clip:
            relative = relative + 2 * delta / o.clip
        error = relative * after + 2 * size.square[:, None] * self.delta_each + (8 * u + u_in) * squared
        if o.clip:
            error = error + 4 * u * before
        error = np.where(delta > NOISE, np.maximum(error, self._spread_limit(limit)), error)
        if self.p.floor:
            penalty = limit.square.max() * max(1024.0, 2 * float(np.sqrt(o.square.max())))
            error = error + self.p.floor * max(o.n_c * limit.pos.max(), limit.neg_lse.max(), penalty)
        w = after + squared
        flush = self.scale * self.p.tiny * max(1.0, float(limit.pos.sum()), float(limit.neg_lse.sum()))
        sizes = (np.abs(o.q), np.abs(o.k))
        dq = self.scale * ((error + u * self.growth(o.m) * w) @ sizes[1]) + o.m * flush * sizes[1].max()
        dk = self.scale * ((error + u * self.growth(o.n) * w).T @ sizes[0]) + o.n * flush * sizes[0].max()
        noise = 4 * (w * delta).sum() / self.scale if self.scale else 0.0
        summed = max(16.0, self.growth(o.n * o.m)) if self.equal else 16.0
        dscale = (error * np.abs(o.r)).sum() + noise + summed * u * (w * np.abs(o.r)).sum() + 1e-30
        # bfloat16 gradients wait for the upstream one in bfloat16, so they are rounded before it and after.
        u_out = ROUNDOFF[self.p.out] * (2 if self.p.out == torch.bfloat16 else 1)
        return Gradients(
            dq + u_out * np.abs(exact.dq) + self.p.step,
            dk + u_out * np.abs(exact.dk) + self.p.step,
            dscale + u * np.abs(exact.dscale),
        )

    def _spread(self, d: Coefficients) -> Array:
        """|dL/dt|, (N, M): each positive's coefficient in its place, the row's softmax elsewhere."""
        w = d.neg_lse[:, None] * self.exact.softmax
        w[self.exact.own] = d.pos.ravel()
        return w

    def _spread_limit(self, d: Coefficients) -> Array:
        """The same where a softmax may be anything up to 1."""
        w = np.repeat(d.neg_lse[:, None], self.exact.m, axis=1)
        w[self.exact.own] = d.pos.ravel()
        return w


def eta(out: torch.Tensor, exact: Any, budget: Any) -> float:
    """max |out − exact| / budget; inf where a shape, an infinity or a NaN is not as it must be.

    Where the budget reaches beyond the range of `out`'s dtype, an infinity of that side is within it.
    """
    exact, budget = np.broadcast_arrays(np.asarray(exact), np.asarray(budget))
    if tuple(out.shape) != exact.shape:
        return float("inf")
    wide = torch.float64 if out.dtype != torch.float64 else out.dtype
    found = out.detach().to("cpu", wide).numpy().astype(exact.dtype)
    with np.errstate(invalid="ignore"):
        error = np.abs(found - exact)
        right_infinity = np.isinf(found) & (np.sign(found) * exact + budget >= torch.finfo(out.dtype).max)
        ratio = np.where(right_infinity, 0.0, error / budget)
    return float(np.where(np.isfinite(ratio), ratio, np.inf).max(initial=0.0))
