"""The compile-time description of a problem: which formulas its kernels contain. Static, hashable, free of sizes but D.

Triton compiles one kernel per `Form`, and branches on its fields at compile time: a field that is not asked for costs
nothing. Names are those of `core/spec.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fused_nce.core.atoms import shiftless
from fused_nce.core.problem import Problem
from fused_nce.core.spec import Block, Index, Labels

ABSENT = -1
OF_NEGATIVES = {"neg_lse", "neg_max", "neg_softplus", "square"}  # the last of all scores, but of those left out


@dataclass(frozen=True)
class Wanted:
    """Line of each statistic in the finished (S, n) statistics of rows or of columns; `ABSENT` if it is not wanted."""

    neg_lse: int = ABSENT
    neg_max: int = ABSENT
    square: int = ABSENT
    neg_softplus: int = ABSENT
    pos_lse: int = ABSENT
    pos_max: int = ABSENT
    pos_sum: int = ABSENT
    pos_count: int = ABSENT
    pos_gap: int = ABSENT
    neg_sum: int = ABSENT
    neg_count: int = ABSENT

    @classmethod
    def of(cls, names: Sequence[str]) -> Wanted:
        """In the order of `names`."""
        return cls(**{name: place for place, name in enumerate(names)})


def _asked(wanted: Wanted) -> set[str]:
    """The names of wanted statistics."""
    return {name for name, place in vars(wanted).items() if place != ABSENT}


def _places(used: dict[str, bool]) -> dict[str, int]:
    """A line number for each used name, in order, and `lines`, how many there are."""
    present = [name for name in used if used[name]]
    return {name: present.index(name) if used[name] else ABSENT for name in used} | {"lines": len(present)}


@dataclass(frozen=True)
class Partials:
    """Line of each running value in a split's (lines, n) buffer; `ABSENT` if no wanted statistic needs it."""

    neg_sum: int  # Σ e^(t − shift) over the negatives, shift being their maximum so far
    neg_top: int  # max t
    pos_sum: int
    pos_top: int
    square: int
    softplus: int
    total: int  # Σ t over the positives
    count: int  # of the positives
    neg_total: int  # Σ t over the negatives
    neg_count: int
    lines: int

    @classmethod
    def of(cls, wanted: Wanted) -> Partials:
        """The values that the wanted statistics need. A sum of exponentials needs its maximum too, to be merged."""
        used = {
            "neg_sum": wanted.neg_lse,
            "neg_top": max(wanted.neg_lse, wanted.neg_max),
            "pos_sum": wanted.pos_lse,
            "pos_top": max(wanted.pos_lse, wanted.pos_max),
            "square": wanted.square,
            "softplus": wanted.neg_softplus,
            "total": wanted.pos_sum,
            "count": wanted.pos_count,
            "neg_total": wanted.neg_sum,
            "neg_count": wanted.neg_count,
        }
        return cls(**_places({name: place != ABSENT for name, place in used.items()}))


@dataclass(frozen=True)
class Terms:
    """Line of each number that the weights of a side read, in an aligned and padded (lines, n) buffer."""

    neg_lse: int  # times log2(e), as `pos_lse`; absent where e^t needs no shift
    d_neg_lse: int  # times e^−neg_lse there
    d_softplus: int
    d_square: int  # times 2
    pos_lse: int
    d_pos_lse: int
    d_sum: int
    d_gap: int
    share: int  # 1 / positives
    d_neg_sum: int
    d_target: int  # of a row's one target
    lines: int

    @classmethod
    def of(cls, wanted: Wanted, target: bool, shiftless: bool = False) -> Terms:
        """The terms of the statistics that have a gradient."""
        used = {
            "neg_lse": ABSENT if shiftless else wanted.neg_lse,
            "d_neg_lse": wanted.neg_lse,
            "d_softplus": wanted.neg_softplus,
            "d_square": wanted.square,
            "pos_lse": wanted.pos_lse,
            "d_pos_lse": wanted.pos_lse,
            "d_sum": wanted.pos_sum,
            "d_gap": wanted.pos_gap,
            "share": wanted.pos_gap,
            "d_neg_sum": wanted.neg_sum,
        }
        return cls(**_places({name: place != ABSENT for name, place in used.items()} | {"d_target": target}))


@dataclass(frozen=True)
class Form:
    """The formulas of one problem."""

    ids: str  # where they come from: "image" (arithmetic), "target" (of the rows), "label" (of both), "none"
    n_c: int  # columns an image
    rows_per_image: int
    drop_self: bool
    ceiling: bool  # a column whose dot product is above its row's is no negative
    transform: str
    hardness: float  # α; 0 where the transform is another
    shiftless: bool  # e^t needs no shift: t is bounded
    tensor_scale: bool
    mixed: bool  # q and k differ in dtype: both meet in float32
    shared: bool  # k is q
    rows: Wanted
    columns: Wanted

    @property
    def two_way(self) -> bool:
        """Columns have statistics too."""
        return self.columns != Wanted()

    @property
    def by_place(self) -> bool:
        """Places alone say which scores are negatives, and nothing else is asked of sets: few tiles have any other.

        Where k is q both roles have the same negatives.
        """
        asked = _asked(self.rows) | _asked(self.columns)
        alike = self.rows_per_image == self.n_c or not self.shared
        itself = self.drop_self and "square" in asked
        placed = self.ids in ("image", "none") and not self.ceiling
        return placed and asked <= OF_NEGATIVES and alike and not itself

    @property
    def symmetric(self) -> bool:
        """Of row i and column j as of row j and column i, with one exponential for both."""
        found = self.shared and self.drop_self and self.shiftless and self.by_place and not self.two_way
        return found and _asked(self.rows) == {"neg_lse", "neg_max"}

    @property
    def row_terms(self) -> Terms:
        """What the weights read of rows."""
        return Terms.of(self.rows, self.ids == "target", self.shiftless)

    @property
    def column_terms(self) -> Terms:
        """What they read of columns."""
        return Terms.of(self.columns, False, self.shiftless)

    @property
    def partners(self) -> int:
        """Columns among which a row's gathered positives lie; 0 if none are gathered."""
        return {"image": self.n_c, "target": 1}.get(self.ids, 0)

    @property
    def n_pos(self) -> int:
        """P: gathered positives of a row, without the row itself."""
        return self.partners - (self.drop_self and self.ids == "image")

    @classmethod
    def of(cls, problem: Problem) -> Form:
        """Of one problem."""
        spec, layout = problem.spec, problem.spec.layout
        block = layout if isinstance(layout, Block) else Block(1)
        return cls(
            ids={Block: "image", Index: "target", Labels: "label"}.get(type(layout), "none"),
            n_c=block.n_c,
            rows_per_image=block.rows_per_image,
            drop_self=spec.drop_self,
            ceiling="ceiling" in spec.filters,
            transform=spec.transform.NAME,
            hardness=spec.hardness,
            shiftless=shiftless(problem),
            tensor_scale=isinstance(problem.scale, Tensor),
            mixed=problem.q.dtype != problem.k.dtype,
            shared=problem.shared,
            rows=Wanted.of(spec.stats),
            columns=Wanted.of(spec.columns),
        )

    def without_square(self) -> Form:
        """For a tail without a penalty: the square's coefficient is 0, and 0·inf would make a finite loss NaN."""
        return dataclasses.replace(self, rows=dataclasses.replace(self.rows, square=ABSENT))
