"""What happens to a score, as data: static, hashable, and free of every tensor's size.

A spec that changed with N would recompile under `torch.compile`, so shapes, offsets, temperatures and labels are
arguments of the ops, never part of it. It crosses the dispatcher as a short string (`Spec.code`), which is also what a
profiler or a graph dump shows.

All layouts are one idea: column j is a positive of row i iff their ids are equal. They differ in where ids come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import torch

STATISTICS = ("neg_lse", "neg_max", "square")
"""The row statistics of a spec that names none, in the order of a backend's rows: what the `nce` tail reads."""

WHOLE_ROW = ("triplets_all", "active_all", "triplets_semihard", "active_semihard")
"""Statistics of pairs within a row, which do not merge: no backend may cut such a row into panels."""

MARGINS = frozenset(
    {
        *("sq_dist", "dist"),  # transforms
        *("neg_ties", "neg_hardest", "pos_min", "pos_ties", "pos_hardest"),
        *("pos_square", "neg_hinge", "neg_hinge_square", "neg_active"),
        *WHOLE_ROW,
    }
)
"""What only the losses of distances and margins name; no kernel has any of it."""

FILTERS = ("ceiling", "guide")
"""What may take a column out of a row's negatives: its dot product, or that of two guides, above the row's ceiling."""

MARKS = frozenset({*FILTERS, "several"})
"""What takes columns out of a row's negatives alone: filters, and a layout whose positives have no places in `pos`."""

KERNEL_ATOMS = MARKS | {
    *("block", "index", "labels", "separate"),  # layouts, beside `MARKS`
    *("identity", "tanh_clip", "bias", "hardness"),  # transforms
    *STATISTICS,
    *("neg_softplus", "pos_lse", "pos_max", "pos_sum", "pos_count", "pos_gap", "neg_sum", "neg_count"),
    *("columns", "drop_self", "self", "prefixes"),  # see `Spec.atoms` and `dispatch.why_not`
}
"""What the kernels of `csrc` run."""

VOCABULARY = KERNEL_ATOMS | MARGINS | {"mixed"}
"""Every atom that a spec can name. A backend's `ATOMS` says which of them it can run; `core/statistics.py` and
`core/atoms.py` define each."""


_Made = TypeVar("_Made")


def cached(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """What is made of a few values, once for each; a graph that is being traced makes its own."""
    kept = lru_cache(maxsize=256)(make)

    def get(*args: Any) -> _Made:
        return make(*args) if torch.compiler.is_compiling() else kept(*args)

    return get


@dataclass(frozen=True)
class Block:
    """Ids by arithmetic: columns come in images of `n_c`; row i belongs to image `i // rows_per_image + offset`.

    The n_c columns of a row's image are its positives, every other column is a negative. `Block(1)` is the diagonal.
    """

    NAME: ClassVar[str] = "block"
    n_c: int = 1
    rows_per_image: int = 1

    @property
    def code(self) -> str:
        """`block(49,1)`."""
        return f"{self.NAME}({self.n_c},{self.rows_per_image})"


@dataclass(frozen=True)
class Index:
    """Row i's one positive is column `row_ids[i]`, a tensor of targets."""

    NAME: ClassVar[str] = "index"
    code = "index()"


@dataclass(frozen=True)
class Labels:
    """Row i's positives are the columns with `column_ids[j] == row_ids[i]`: any number, so statistics and no `pos`."""

    NAME: ClassVar[str] = "labels"
    code = "labels()"


@dataclass(frozen=True)
class Separate:
    """No column is a positive; the p positives of each row come as scores of their own, (N, p)."""

    NAME: ClassVar[str] = "separate"
    p: int = 1

    @property
    def code(self) -> str:
        """`separate(1)`."""
        return f"{self.NAME}({self.p})"


@dataclass(frozen=True)
class Several:
    """Row i's positives are the columns `row_ids[i]`, (p,), −1 for none: no negatives, and no `pos`."""

    NAME: ClassVar[str] = "several"
    p: int = 1

    @property
    def code(self) -> str:
        """`several(4)`."""
        return f"{self.NAME}({self.p})"


@dataclass(frozen=True)
class Identity:
    """t = s."""

    NAME: ClassVar[str] = "identity"
    code = "identity()"


@dataclass(frozen=True)
class TanhClip:
    """t = c·tanh(s / c), so |t| < c."""

    NAME: ClassVar[str] = "tanh_clip"
    c: float

    @property
    def code(self) -> str:
        """`tanh_clip(20.0)`."""
        return f"{self.NAME}({float(self.c)!r})"


@dataclass(frozen=True)
class Bias:
    """t = s + b, b an argument: a number or a learnable 0-d tensor."""

    NAME: ClassVar[str] = "bias"
    code = "bias()"


@dataclass(frozen=True)
class Hardness:
    """t = s + α·stopgrad(⟨q,k⟩), of a positive s: a negative counts the more, the nearer it is, and dt/ds is 1."""

    NAME: ClassVar[str] = "hardness"
    alpha: float

    @property
    def code(self) -> str:
        """`hardness(5.0)`."""
        return f"{self.NAME}({float(self.alpha)!r})"


@dataclass(frozen=True)
class SqDist:
    """t = −scale·‖q − k‖²: higher is closer, as with every score. The raw score becomes s = −scale·½‖q − k‖²."""

    NAME: ClassVar[str] = "sq_dist"
    code = "sq_dist()"


@dataclass(frozen=True)
class Dist:
    """t = −√(scale·‖q − k‖²), of the same raw score. At distance 0, where it has no slope, it is given none."""

    NAME: ClassVar[str] = "dist"
    code = "dist()"


Layout = Block | Index | Labels | Separate | Several
Transform = Identity | TanhClip | Bias | Hardness | SqDist | Dist


@dataclass(frozen=True)
class Spec:
    """Layout, transform and the statistics wanted.

    Attributes:
        layout: which columns are a row's positives.
        transform: from raw score s to t.
        stats: statistics of each row.
        columns: statistics of each column, from the same sweep; for losses that classify both ways.
        drop_self: row i is also column `i + offset` (in `Block`, offset counts images) and is left out of every set.
        unit_norm: the caller guarantees ‖q_i‖ = ‖k_j‖ = 1, so |s| <= scale where that is a number, and a kernel
            needs no running maximum.
        filters: of `FILTERS`: columns that they find leave the set `neg` alone; each has a line of `ceilings`, (N,).
        prefixes: K widths, ascending: of each the statistics of the operands' first columns, normalised anew
            (`core/prefixes.py`); every (S, N) becomes (K·S, N), `pos` (N, K·P) and `ceilings` (K·F, N).
    """

    layout: Layout
    transform: Transform = field(default_factory=Identity)  # an instance would not compile on torch 2.11
    stats: tuple[str, ...] = STATISTICS
    columns: tuple[str, ...] = ()
    drop_self: bool = False
    unit_norm: bool = False
    filters: tuple[str, ...] = ()
    prefixes: tuple[int, ...] = ()

    @property
    def code(self) -> str:
        """The spec as one string, e.g. `block(49,1) tanh_clip(20.0) neg_lse,neg_max,square`; `parse` reads it back."""
        return _code(self)

    def _written(self) -> str:
        words = [self.layout.code, self.transform.code, ",".join(self.stats)]
        if self.columns:
            words.append(f"columns({','.join(self.columns)})")
        if self.drop_self:
            words.append("drop_self()")
        if self.unit_norm:
            words.append("unit_norm()")
        if self.filters:
            words.append(f"filters({','.join(self.filters)})")
        if self.prefixes:
            words.append(f"prefixes({','.join(map(str, self.prefixes))})")
        return " ".join(words)

    @property
    def clip(self) -> float | None:
        """The clip's range, or None without one."""
        return self.transform.c if isinstance(self.transform, TanhClip) else None

    @property
    def hardness(self) -> float:
        """α of a transform that has one, or 0."""
        return self.transform.alpha if isinstance(self.transform, Hardness) else 0.0

    @property
    def distance(self) -> bool:
        """Raw scores are −½‖q − k‖² instead of ⟨q,k⟩."""
        return isinstance(self.transform, (SqDist, Dist))

    @property
    def whole_rows(self) -> bool:
        """A statistic needs all scores of a row at once."""
        return not set(WHOLE_ROW).isdisjoint(self.stats)

    @property
    def marked(self) -> bool:
        """Some columns leave a row's negatives by `MARKS`."""
        return bool(self.filters) or isinstance(self.layout, Several)

    @property
    def block(self) -> Block:
        """The layout, for a backend that has no other."""
        if not isinstance(self.layout, Block):
            raise TypeError(f"spec: got layout {self.layout}, need Block")
        return self.layout

    @property
    def n_widths(self) -> int:
        """K prefixes, or the one width without any."""
        return len(self.prefixes) or 1

    @property
    def one(self) -> Spec:
        """Of one prefix alone."""
        return replace(self, prefixes=()) if self.prefixes else self

    @property
    def n_pos(self) -> int:
        """P, the width of `pos` (of each prefix): 0 where a row may have any number of positives."""
        if isinstance(self.layout, Block):
            return self.layout.n_c - self.drop_self
        return self.layout.p if isinstance(self.layout, Separate) else int(isinstance(self.layout, Index))

    @property
    def atoms(self) -> frozenset[str]:
        """The names in `VOCABULARY` that a backend must know to run this."""
        given = ("columns", self.columns), ("drop_self", self.drop_self), ("prefixes", self.prefixes)
        flags = {name for name, used in given if used}
        return frozenset({self.layout.NAME, self.transform.NAME, *self.stats, *self.columns, *flags, *self.filters})


_code = cached(Spec._written)
LAYOUTS: dict[str, type[Layout]] = {x.NAME: x for x in (Block, Index, Labels, Separate, Several)}
TRANSFORMS: dict[str, type[Transform]] = {x.NAME: x for x in (Identity, TanhClip, Bias, Hardness, SqDist, Dist)}


@lru_cache(maxsize=256)
def parse(code: str) -> Spec:
    """The spec that `Spec.code` wrote.

    Raises:
        ValueError: for a layout, transform or statistic outside the vocabulary.
    """
    layout_code, transform_code, stats_code, *rest = code.split(" ")
    layout, layout_values = _call(layout_code)
    transform, transform_values = _call(transform_code)
    extra = dict(_call(word) for word in rest)
    stats, columns = tuple(stats_code.split(",")), tuple(extra.get("columns", ()))
    filters = tuple(extra.get("filters", ()))
    if (
        layout not in LAYOUTS
        or transform not in TRANSFORMS
        or not VOCABULARY.issuperset((*stats, *columns))
        or not set(FILTERS).issuperset(filters)
        or not {"columns", "drop_self", "unit_norm", "filters", "prefixes"}.issuperset(extra)
    ):
        raise ValueError(
            f"spec: got {code!r}, need one of {', '.join(LAYOUTS)}, one of {', '.join(TRANSFORMS)}, "
            f"and statistics that `core/statistics.py` defines"
        )
    return Spec(
        LAYOUTS[layout](*map(int, layout_values)),
        TRANSFORMS[transform](*map(float, transform_values)),
        stats,
        columns,
        "drop_self" in extra,
        "unit_norm" in extra,
        filters,
        tuple(map(int, extra.get("prefixes", ()))),
    )


def _call(text: str) -> tuple[str, list[str]]:
    """`name(a,b)` as (name, [a, b])."""
    name, _, rest = text.partition("(")
    return name, [value for value in rest.rstrip(")").split(",") if value]
