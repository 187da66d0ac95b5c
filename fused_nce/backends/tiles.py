"""One tile of scores in plain torch: its statistics, and its weights from finished ones.

`AtomTile` runs every atom by its definition, with a buffer for each intermediate. `LseTile` has what most losses are
made of, in three buffers that it overwrites as it goes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fused_nce.core import atoms
from fused_nce.core.problem import Problem, Statistics
from fused_nce.core.spec import MARKS, STATISTICS, Bias, Spec
from fused_nce.core.statistics import Scores
from fused_nce.core.tails import Coefficients

FAST = frozenset(
    {
        *("block", "index", "separate", "identity", "tanh_clip", "hardness", "drop_self", "self", "mixed", "prefixes"),
        *STATISTICS,
    }
)


def kind(spec: Spec) -> type[Tile]:
    """The cheapest tile that can run a spec."""
    if spec.atoms <= FAST:
        return LseTile
    if spec.atoms <= FAST | MARKS:
        return FilteredTile
    return SortTile if spec.whole_rows else AtomTile


class Places:
    """Where given columns of each row lie in a tile: (strip, p) columns of the tile, clamped, and whether they do.

    Gather and scatter at clamped places, with a `where`, have shapes that no value decides: nothing waits for a GPU.
    """

    def __init__(self, columns_of_rows: Tensor, panel: slice) -> None:
        width = panel.stop - panel.start
        self.inside = (columns_of_rows >= panel.start) & (columns_of_rows < panel.stop)
        self.at = (columns_of_rows - panel.start).clamp_(0, width - 1)

    def get(self, x: Tensor) -> Tensor:
        """(strip, p) values; where a place is outside, whatever."""
        return x.gather(1, self.at)

    def put(self, x: Tensor, values: Tensor | float) -> None:
        """Write those that are inside."""
        # Clamped places may coincide, but then none is inside and each writes what is there.
        here = x.gather(1, self.at)
        x.scatter_(1, self.at, torch.where(self.inside, cast(Tensor, values), here))


class Tile(ABC):
    """What both kinds share: the tile's dot products and the places of its positives and its rows themselves."""

    BUFFERS: int  # score-sized tensors alive together
    HELD = 1  # of them, allocated once for all tiles

    def __init__(
        self,
        problem: Problem,
        rows: slice,
        panel: slice,
        buffers: Tensor,
        lse: Tensor | None,
        multiply: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`lse` (strip,) is neg_lse, once it is known: a shift for exponentials. `multiply` fills the buffer that it is
        given with the dot products, of a prefix; None is those of q and k.
        """
        self.p, self.spec = problem, problem.spec
        self.rows, self.columns = range(rows.start, rows.stop), range(panel.start, panel.stop)
        self.own = self.itself = None
        if self.spec.n_pos and problem.positives is None:
            self.own = Places(atoms.positive_columns(problem, self.rows), panel)
        if self.spec.drop_self:
            self.itself = Places(atoms.self_columns(problem, self.rows)[:, None], panel)
        shape = len(self.rows), len(self.columns)
        self.buffers = buffers[:, : shape[0] * shape[1]].view(-1, *shape)
        # (strip, panel) ⟨q,k⟩ or −½‖q − k‖², unscaled
        self.r = self._products(rows, panel) if multiply is None else multiply(self.buffers[0])
        self.bias_sum: Tensor | None = None  # 0-d Σ dL/dt, of a bias

    def _products(self, rows: slice, panel: slice) -> Tensor:
        wide = self.buffers.dtype
        q, k = self.p.q[rows].to(wide), self.p.k[panel].to(wide)  # fault: strided-input-read
        r = torch.mm(q, k.T, out=self.buffers[0])  # fault: scores-through-bfloat16
        return atoms.to_half_distances(r, q, k) if self.spec.distance else r

    @abstractmethod
    def fold(self, pos: Tensor) -> Tensor:
        """The tile's row statistics, (S, strip); its positives go to `pos`, (strip, P)."""

    @abstractmethod
    def weights(self, found: Statistics, d: Coefficients) -> Tensor:
        """w = dL/ds, (strip, panel), from statistics and coefficients of the tile's rows and columns."""


class AtomTile(Tile):
    """Every statistic, as `core/statistics.py` defines it."""

    BUFFERS = 12

    def __init__(
        self,
        problem: Problem,
        rows: slice,
        panel: slice,
        buffers: Tensor,
        lse: Tensor | None,
        multiply: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(problem, rows, panel, buffers, lse, multiply)
        s = self.r * problem.scale
        of = atoms.sets(problem, self.rows, self.columns, self.r)
        self.x = Scores(s, atoms.transformed(problem, s, self.r, of), of)

    def fold(self, pos: Tensor) -> Tensor:
        """By definition."""
        if self.own:
            pos.copy_(torch.where(self.own.inside, self.own.get(self.x.t), pos))
        return atoms.fold_tile(self.spec.stats, self.x)

    def fold_columns(self) -> Tensor:
        """The tile's column statistics, (S', panel)."""
        return atoms.fold_tile(self.spec.columns, self.x, dim=0)

    def weights(self, found: Statistics, d: Coefficients) -> Tensor:
        """By definition."""
        spec = self.spec
        on_t, on_s = atoms.tile_weights(spec.stats, self.x, found.rows, d.d_rows)
        if found.columns is not None and d.d_columns is not None:
            across = atoms.tile_weights(spec.columns, self.x, found.columns, d.d_columns, dim=0)
            on_t, on_s = on_t.add_(across[0]), on_s.add_(across[1])
        if self.own:
            self.own.put(on_t, self.own.get(on_t) + d.d_pos)
        if isinstance(spec.transform, Bias):
            self.bias_sum = on_t.sum()
        return on_t.mul_(atoms.transform_slope(spec.transform, self.x.t)).add_(on_s)


class SortTile(AtomTile):
    """With whole rows sorted beside their scores, and places in them, which are int64."""

    BUFFERS = 26


class LseTile(Tile):
    """`neg_lse`, `neg_max`, `square` under a clip or none, in place: r, x and e, of which `weights` overwrites e."""

    BUFFERS = HELD = 3  # s, t and w of a tile are alive together

    def __init__(
        self,
        problem: Problem,
        rows: slice,
        panel: slice,
        buffers: Tensor,
        lse: Tensor | None,
        multiply: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(problem, rows, panel, buffers, lse, multiply)
        r, x, e, *rest = self.buffers
        clip, hardness = self.spec.clip, self.spec.hardness
        self.factor = clip or 1.0
        torch.mul(r, problem.scale / clip if clip else problem.scale + hardness, out=x)
        if clip:
            x.tanh_()
        self.x = x  # tanh(s/c), or t without a clip; −inf outside the negatives until `weights` restores it
        if self.own:
            self.own_x = self.own.get(r) * problem.scale if hardness else self.own.get(x)  # fault: hardness-of-positive
            self.own.put(x, x.new_full((), float("-inf")))  # fault: positives-not-dropped
        if self.itself:
            self.itself.put(x, x.new_full((), float("-inf")))  # fault: row-itself-among-exponentials
        self.out = atoms.left_out(problem, self.rows, self.columns, r, *rest)  # of its positives, none is in x
        if self.out is not None:
            x.masked_fill_(self.out, float("-inf"))  # fault: filtered-weighed
        if clip and clip <= atoms.SHIFTLESS_CLIP:
            self.shift: Tensor | float = 0.0
            torch.mul(x, self.factor, out=e).exp_()
        else:
            # fault: max-shift-missing, one-shift-rows
            peak = x.amax(dim=1, keepdim=True) * self.factor if lse is None else lse[:, None]
            self.shift = torch.where(peak == float("-inf"), 0.0, peak)  # fault: row-without-negatives
            torch.mul(x, self.factor, out=e).sub_(self.shift).exp_()
        self.e = e  # exp(t − shift); 0 outside the negatives

    def fold(self, pos: Tensor) -> Tensor:
        """From the exponentials and the norms of the dot products."""
        if self.own:
            pos.copy_(torch.where(self.own.inside, self.own_x * self.factor, pos))
        bad = self.r.sum(dim=1) * self.p.scale * 0  # `poison` of the scaled ones
        shift = self.shift.squeeze(1) if isinstance(self.shift, Tensor) else self.shift
        value = {
            "neg_lse": lambda: self.e.sum(dim=1).log_().add_(shift) + bad,  # fault: nan-hidden-clip
            "neg_max": lambda: self.x.amax(dim=1) * self.factor,
            "square": lambda: torch.linalg.vector_norm(self._squared(), dim=1).mul_(self.p.scale).square_(),
        }
        return torch.stack([value[name]() for name in self.spec.stats])

    def weights(self, found: Statistics, d: Coefficients) -> Tensor:
        """In place of the tile's exponentials."""
        stats, r = self.spec.stats, self.r
        if "neg_lse" in stats:
            lse, d_lse = (x[stats.index("neg_lse")][:, None] for x in (found.rows, d.d_rows))
        else:  # no negative has a weight, as in a row that has none
            lse, d_lse = r.new_full((1, 1), float("-inf")), r.new_zeros(1, 1)
        # A row without negatives has lse = −inf and nothing to weigh.
        known = torch.where(lse == float("-inf"), 0.0, d_lse * torch.exp(self.shift - lse))
        w = self.e.mul_(known)
        if self.own:
            self.own.put(w, d.d_pos)
        if self.spec.clip:
            if self.out is not None:
                self.x.masked_fill_(self.out, 0.0)
            if self.own:
                self.own.put(self.x, self.own_x)
            if self.itself:
                self.itself.put(self.x, self.x.new_zeros(()))
            # fault: clip-slope-missing
            w.addcmul_(w, self.x.square_(), value=-1)  # · (1 − tanh²)
        if "square" in stats:
            w.addcmul_(self._squared(), (2 * self.p.scale) * d.d_rows[stats.index("square")][:, None])
        return w

    def _squared(self) -> Tensor:
        """The dot products of the set `all`: without the rows' own."""
        if self.itself:
            self.itself.put(self.r, self.r.new_zeros(()))
        return self.r


class FilteredTile(LseTile):
    """With the guides' dot products, and bits of what the filters take out."""

    BUFFERS, HELD = 5, 4
