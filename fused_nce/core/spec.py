"""What happens to a score, as data: static, hashable, and free of every tensor's size.

A spec that changed with N would recompile under `torch.compile`, so shapes, offsets, temperatures and labels are
arguments of the ops, never part of it. It crosses the dispatcher as a short string (`Spec.code`), which is also what a
profiler or a graph dump shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

STATISTICS = ("neg_lse", "neg_max", "square")
"""Row statistics, in the order of a backend's rows; `core/atoms.py` defines each. `pos` comes with every spec."""


@dataclass(frozen=True)
class Block:
    """Columns come in images of `n_c`; row i belongs to image `i // rows_per_image + offset`.

    The n_c columns of a row's image are its positives, every other column is a negative. `Block(1)` is the diagonal.
    """

    n_c: int = 1
    rows_per_image: int = 1


@dataclass(frozen=True)
class Identity:
    """t = s."""


@dataclass(frozen=True)
class TanhClip:
    """t = c·tanh(s / c), so |t| < c."""

    c: float


@dataclass(frozen=True)
class Spec:
    """Layout, transform and the row statistics wanted."""

    layout: Block
    transform: Identity | TanhClip = field(default_factory=Identity)  # an instance would not compile on torch 2.11
    stats: tuple[str, ...] = STATISTICS

    @property
    def code(self) -> str:
        """The spec as one string, e.g. `block(49,1) tanh_clip(20.0) neg_lse,neg_max,square`; `parse` reads it back."""
        layout = f"block({self.layout.n_c},{self.layout.rows_per_image})"
        transform = f"tanh_clip({self.transform.c!r})" if isinstance(self.transform, TanhClip) else "identity()"
        return f"{layout} {transform} {','.join(self.stats)}"

    @property
    def clip(self) -> float | None:
        """The clip's range, or None without one."""
        return self.transform.c if isinstance(self.transform, TanhClip) else None


@lru_cache(maxsize=256)
def parse(code: str) -> Spec:
    """The spec that `Spec.code` wrote.

    Raises:
        ValueError: for a layout, transform or statistic outside the vocabulary.
    """
    layout_code, transform_code, stats_code = code.split(" ")
    layout_name, layout_values = _call(layout_code)
    transform_name, transform_values = _call(transform_code)
    stats = tuple(stats_code.split(","))
    known = layout_name == "block" and transform_name in ("identity", "tanh_clip")
    if not known or any(name not in STATISTICS for name in stats):
        raise ValueError(
            f"spec: got {code!r}, need block(n_c,rows_per_image), identity() or tanh_clip(c), and some of {STATISTICS}"
        )
    layout = Block(*(int(value) for value in layout_values))
    transform = TanhClip(float(transform_values[0])) if transform_name == "tanh_clip" else Identity()
    return Spec(layout, transform, stats)


def _call(text: str) -> tuple[str, list[str]]:
    """`name(a,b)` as (name, [a, b])."""
    name, _, rest = text.partition("(")
    return name, [value for value in rest.rstrip(")").split(",") if value]
