"""Every statistic, once: what is folded over which set, its derivative, and how two partial results merge.

N rows, M columns; s raw score, t transformed. A margin is 1 everywhere: another one is a matter of the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Sets(NamedTuple):
    """Which columns of a tile are in each row's sets, (N, m) bool."""

    pos: Tensor
    neg: Tensor
    all: Tensor


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z). Not `F.softplus`, which turns linear at 20 and is off by 2e-9 there."""
    return -torch.nn.functional.logsigmoid(-z)  # fault: softplus-linear-20


def deficit(neg_lse: Tensor | float, pos: Tensor) -> Tensor:
    """neg_lse − pos: softplus of it is −log of the positive's share. NaN at a positive of +inf, as in a dense softmax.

    softplus(−inf) = 0 would be a sound loss: a positive that is no column is in nothing else that could show it.
    """
    return neg_lse - torch.add(pos, pos.clamp(min=0), alpha=0)  # fault: infinite-positive-wins


def poison(s: Tensor, dim: int = 1) -> Tensor:
    """0 for a row (or, over dim 0, a column) of finite scores, NaN otherwise.

    tanh(±inf) = ±1, and a max drops a NaN: without this, a NaN or Inf in the features could leave a finite loss. Added
    to `neg_lse`, it reaches the row's loss and, through the weights, every gradient that the bad score belongs to.
    """
    return s.sum(dim=dim) * 0  # fault: reference-nan-hidden


Found = Mapping[str, Tensor]  # statistics by name; finished ones broadcast against the scores


@dataclass(frozen=True)
class Scores:
    """One tile's, as statistics see them."""

    s: Tensor  # (N, m) raw
    t: Tensor  # (N, m) transformed
    of: Sets

    @cached_property
    def triplets(self) -> dict[str, Tensor]:
        """`triplet_counts` by mining, once they are wanted: a row is sorted once for all that is read from it."""
        return {}


@dataclass(frozen=True)
class Statistic:
    """A reduction of one row's scores, or one column's.

    Attributes:
        over: `pos`, `neg` or `all`: a set of `Sets`.
        of: `t` (transformed scores) or `s` (raw: the penalty has to see what the clip saturates).
        empty: what a score outside the set becomes: it leaves the fold unchanged.
        fold: (scores, dim) to the statistic.
        merge: two parts' statistics to one; column splits, chunks and ranks combine through it. None needs whole rows.
        weight: (scores, finished statistics) to d statistic / d score, or None where it is not differentiable.
        derive: the statistic from finished others and its own fold, which is 0.
        reads: those others, which a spec must name beside it.
        poisoned: the fold would hide a score that is not finite.
    """

    over: str
    of: str
    empty: float
    fold: Callable[[Tensor, int], Tensor]
    merge: Callable[[Found, Found], Tensor] | None
    weight: Callable[[Tensor, Found], Tensor] | None
    derive: Callable[[Found], Tensor] | None = None
    reads: tuple[str, ...] = ()
    poisoned: bool = False

    def value(self, x: Scores, dim: int) -> Tensor:
        """Of a tile's rows (dim 1), (N,), or columns (dim 0), (m,)."""
        scores = x.s if self.of == "s" else x.t
        # fault: reference-siblings-denominator
        value = self.fold(scores.masked_fill(~getattr(x.of, self.over), self.empty), dim)
        return value + poison(x.s, dim) if self.poisoned else value

    def slope(self, x: Scores, found: Found) -> Tensor | None:
        """d statistic / d score, (N, m), 0 outside the set; None where it is not differentiable."""
        if self.weight is None:
            return None
        # fault: reference-siblings-weighed
        return self.weight(x.s if self.of == "s" else x.t, found).masked_fill(~getattr(x.of, self.over), 0.0)


def _merge(name: str, rule: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Found, Found], Tensor]:
    """A merge that looks at nothing else."""
    return lambda one, two: rule(one[name], two[name])


def _zero(x: Tensor, dim: int) -> Tensor:
    """The fold of what is derived."""
    return x.new_zeros(x.shape[1 - dim])


def _lse(over: str) -> Statistic:
    """log Σ e^t."""
    name = f"{over}_lse"
    return Statistic(
        over=over,
        of="t",
        empty=float("-inf"),
        fold=torch.logsumexp,
        merge=_merge(name, torch.logaddexp),
        weight=lambda t, found: torch.exp(t - found[name]),
        poisoned=over == "neg",
    )


def _extreme(over: str, end: str) -> dict[str, Statistic]:
    """Set `over`'s `end` (max or min), how many scores attain it, and the same with a gradient, each an equal share.

    A backward that computes the scores again does so tile by tile as before: the bits that were the extreme are again.
    """
    name, ties, hardest = f"{over}_{end}", f"{over}_ties", f"{over}_hardest"
    fold, rule, sign = {"max": (torch.amax, torch.maximum, 1), "min": (torch.amin, torch.minimum, -1)}[end]

    def merge_ties(one: Found, two: Found) -> Tensor:
        first, second = sign * one[name], sign * two[name]
        both = one[ties] + two[ties]
        # fault: ties-part-not
        return torch.where(first > second, one[ties], torch.where(second > first, two[ties], both))

    empty = -sign * float("inf")
    return {
        name: Statistic(over=over, of="t", empty=empty, fold=fold, merge=_merge(name, rule), weight=None),
        ties: Statistic(
            over=over,
            of="t",
            empty=empty,
            fold=lambda t, dim: (t == fold(t, dim, keepdim=True)).sum(dim=dim).to(t.dtype),
            merge=merge_ties,
            weight=None,
            reads=(name,),
        ),
        hardest: Statistic(
            over=over,
            of="t",
            empty=0.0,
            fold=_zero,
            merge=_merge(hardest, torch.add),
            weight=lambda t, found: (t == found[name]).to(t.dtype) / found[ties],  # fault: equally-hard-ones
            derive=lambda found: found[name] + found[hardest],
            reads=(name, ties),
            poisoned=True,
        ),
    }


def _sum(
    name: str,
    of: str,
    term: Callable[[Tensor], Tensor],
    slope: Callable[[Tensor], Tensor] | None,
    *,
    empty: float = 0.0,
    poisoned: bool = False,
) -> dict[str, Statistic]:
    """Σ term(x); `empty` is where the term vanishes."""
    return {
        name: Statistic(
            over=name.partition("_")[0] if "_" in name else "all",
            of=of,
            empty=empty,
            fold=lambda x, dim: term(x).sum(dim=dim),
            merge=_merge(name, torch.add),
            weight=None if slope is None else lambda x, _: slope(x),
            poisoned=poisoned,
        )
    }


def _gap(found: Found) -> Tensor:
    """pos_lse − mean pos; 0 for a row without positives."""
    count = found["pos_count"]
    return torch.where(count > 0, found["pos_lse"] - found["pos_sum"] / count, torch.zeros_like(count))


def _hinge(t: Tensor) -> Tensor:
    """max(0, 1 + t): the margin is 1, another one is a matter of the scale."""
    return (1 + t).clamp(min=0)


def _active(t: Tensor) -> Tensor:
    """1 where the hinge is."""
    return (t > -1).to(t.dtype)


def triplet_counts(mining: str, t: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """c = dL/dt, (N, M), whole numbers: triplets of a row's scores without a list of them.

    A row's loss Σ max(0, 1 − t_p + t_n), over positives p and negatives n, is linear in the scores between its kinks:
    it is Σ_j c_j·t_j plus the number of active triplets, where c_j is how many of them j is the negative of, less how
    many it is the positive of. Each c_j is a place in a sorted row: O(M log M), where the triplets are O(M²).

    Args:
        mining: "all" triplets; or "semihard", of each positive the one with the nearest of the negatives beyond it.
        t: (N, M) scores, in margins.
        pos: (N, M) bool, each row's positives.
        neg: (N, M) bool, its negatives.
    """
    return {"all": _all_triplets, "semihard": _semihard_triplets}[mining](t, pos, neg)


def _all_triplets(t: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """A triplet is active where t_n > t_p − 1: one comparison of two numbers, the same from either side."""
    # fault: triplets-margin-wrong
    reach, others = (t - 1).masked_fill(~pos, float("inf")), t.masked_fill(~neg, float("-inf"))
    below = torch.searchsorted(reach.sort(dim=1).values, others)  # positives that a negative is active with
    above = t.shape[1] - torch.searchsorted(others.sort(dim=1).values, reach, right=True)
    return (below - above).to(t.dtype)


def _semihard_triplets(t: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """Of the negatives with t_n < t_p the largest, active where t_n > t_p − 1.

    A negative's positives are those between it and the next negative, and within its reach: ranges of the sorted row.
    """
    own, others = t.masked_fill(~pos, float("inf")), t.masked_fill(~neg, float("-inf"))
    others, order = others.sort(dim=1, stable=True)
    place = torch.searchsorted(others, own) - 1  # fault: semi-hard-nearest-negative
    nearest = others.gather(1, place.clamp(min=0))
    chosen = pos & (place >= 0) & (nearest > t - 1)
    own = own.sort(dim=1).values
    last = torch.searchsorted(own - 1, others)
    first = torch.searchsorted(own, others, right=True)
    until = torch.cat((first[:, 1:], pos.sum(dim=1, keepdim=True)), dim=1)
    hits = (torch.minimum(until, last) - first).clamp(min=0)
    return torch.zeros_like(t).scatter_(1, order, hits.to(t.dtype)) - chosen.to(t.dtype)


@dataclass(frozen=True)
class _Triplets(Statistic):
    """Σ over the row's mined triplets of max(0, 1 − t_p + t_n), or, without a weight, how many are not 0."""

    mining: str = ""

    def counts(self, x: Scores) -> Tensor:
        """dL/dt, (N, M)."""
        if self.mining not in x.triplets:
            x.triplets[self.mining] = triplet_counts(self.mining, x.t, x.of.pos, x.of.neg)
        return x.triplets[self.mining]

    def value(self, x: Scores, dim: int) -> Tensor:
        """Of whole rows."""
        c = self.counts(x)
        active = c.clamp(min=0).sum(dim=dim)
        return active if self.weight is None else (c * x.t).sum(dim=dim) + active + poison(x.s, dim)

    def slope(self, x: Scores, found: Found) -> Tensor | None:
        """The counts themselves."""
        return None if self.weight is None else self.counts(x)


def _triplets(mining: str) -> dict[str, Statistic]:
    """Both of a mining."""
    loss, active = (_Triplets("all", "t", 0.0, _zero, None, weight, mining=mining) for weight in (lambda t, _: t, None))
    return {f"triplets_{mining}": loss, f"active_{mining}": active}


KERNEL_STATISTICS = (
    # fault: cpu-statistics-another
    *("neg_lse", "neg_max", "square"),  # which the kernels compute at once
    *(
        "neg_softplus",
        "pos_lse",
        "pos_max",
        "pos_sum",
        "pos_count",
        "pos_gap",
        "neg_sum",
        "neg_count",
    ),  # and each of these where it is wanted
)
"""What the kernels of `csrc` know, in the order of their numbers there: a test compares it with `names.h`."""

STATISTIC = {
    "neg_lse": _lse("neg"),
    "pos_lse": _lse("pos"),
    # Undefined at ties, so they have no gradient; `hardest` has.
    **_extreme("neg", "max"),
    **_extreme("pos", "min"),
    "pos_max": Statistic("pos", "t", float("-inf"), torch.amax, _merge("pos_max", torch.maximum), None),
    **_sum("square", "s", torch.square, lambda s: 2 * s),  # fault: penalty-after-clip
    **_sum("neg_softplus", "t", softplus, torch.sigmoid, empty=float("-inf"), poisoned=True),
    **_sum("neg_hinge", "t", _hinge, _active, empty=float("-inf"), poisoned=True),
    # fault: hinge-squared-slope
    **_sum("neg_hinge_square", "t", lambda t: _hinge(t).square(), lambda t: 2 * _hinge(t), empty=-1.0, poisoned=True),
    **_sum("neg_active", "t", _active, None, empty=float("-inf")),
    **_sum("pos_sum", "t", lambda t: t, torch.ones_like),
    **_sum("neg_sum", "t", lambda t: t, torch.ones_like),
    **_sum("pos_square", "t", torch.square, lambda t: 2 * t),
    **_sum("pos_count", "t", lambda t: (t != float("-inf")).to(t.dtype), None, empty=float("-inf")),
    **_sum("neg_count", "t", lambda t: (t != float("-inf")).to(t.dtype), None, empty=float("-inf")),
    # One statistic, because its weight is small where those of its parts cancel: (1 − ν) − 1 keeps no digit of ν.
    "pos_gap": Statistic(
        over="pos",
        of="t",
        empty=0.0,
        fold=_zero,
        merge=_merge("pos_gap", torch.add),
        weight=lambda t, found: torch.exp(t - found["pos_lse"]) - 1 / found["pos_count"],
        derive=_gap,
        reads=("pos_lse", "pos_sum", "pos_count"),
    ),
    **_triplets("all"),
    **_triplets("semihard"),
}
