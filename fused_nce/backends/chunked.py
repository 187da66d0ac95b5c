"""The chunk loop in plain torch: any device, any float dtype, no compiler.

A strip of rows holds three score-sized buffers within the workspace: 3 GEMMs, no score computed twice. Where the
columns are so many that such a strip would be thinner than `MIN_STRIP_ROWS`, they are split into panels too; then the
statistics of all panels come first and the scores are computed again for the weights: 4 GEMMs, in the same workspace.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_nce.core import atoms, workspace
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Spec
from fused_nce.core.tails import Coefficients, Nce

BUFFERS = 3  # s, t and w of a tile are alive together
MIN_STRIP_ROWS = 32  # thinner GEMMs ran below half of the machine's rate


class Plan(NamedTuple):
    """Rows a strip and columns a panel (whole images)."""

    strip: int
    panel: int


def plan(spec: Spec, n: int, m: int, d: int, wide_bytes: int, cast: bool, limit_bytes: int) -> Plan:
    """The tiling, by shape alone. `cast`: 16-bit inputs need their part of q and k in float32 beside the scores."""
    n_c = spec.layout.n_c
    row_bytes = BUFFERS * wide_bytes
    if not cast and n * m * row_bytes <= limit_bytes:
        return Plan(n, m)
    strip = min(n, limit_bytes // (m * row_bytes))
    if strip >= min(n, MIN_STRIP_ROWS) and not cast:
        return Plan(strip, m)
    strip = min(n, 128)
    column_bytes = strip * row_bytes + (d * wide_bytes if cast else 0)
    images = max(1, (limit_bytes - (strip * d * wide_bytes if cast else 0)) // (column_bytes * n_c))
    return Plan(strip, min(m, images * n_c))


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """Plain torch refuses nothing."""
    return None


def workspace_bytes(spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
    """Three tiles, the scaled strip of q, the panel of k in float32 when it is 16-bit, and O(N) statistics."""
    wide = max(dtype_bytes, 4)
    strip, panel = plan(spec, n, m, d, wide, dtype_bytes < 4, limit_bytes)
    cast = (strip + panel) * d if dtype_bytes < 4 else 0
    return wide * (BUFFERS * strip * panel + strip * d + cast + 8 * n)


def stats(problem: Problem) -> Statistics:
    """Statistics, strip by strip."""
    return _Sweep(problem).statistics()


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """Gradients from finished statistics; the scores are computed again."""
    return _Sweep(problem).gradients(needs, statistics, coefficients)


def loss(problem: Problem, tail: Nce, needs: Needs) -> tuple[Statistics, Gradients]:
    """Both, each strip's scores used for its statistics and then, in place, for its gradients."""
    sweep = _Sweep(problem)
    if not any(needs):
        return sweep.statistics(), Gradients(sweep.empty, sweep.empty, sweep.empty)
    return sweep.run(tail, needs)


class _Tile(NamedTuple):
    """One strip × panel of scores, in buffers that `weights` overwrites."""

    r: Tensor  # (strip, panel) dot products ⟨q,k⟩, unscaled
    x: Tensor  # (strip, panel) tanh(s/c), or s without a clip; −inf at the own image until `weights` restores it
    e: Tensor  # (strip, panel) exp(t − shift); 0 at the own image
    shift: Tensor | float  # (strip, 1), or 0 under a clip
    own_rows: Tensor  # rows whose image lies in this panel
    own_images: Tensor  # that image, counted from the panel's first
    own_x: Tensor  # (len(own_rows), n_c) x at the own image


class _Sweep:
    """Strips of rows, panels of columns, and what is collected over them."""

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        spec, q = problem.spec, problem.q
        self.wide = torch.promote_types(q.dtype, torch.float32)
        limit = workspace.limit_bytes(q.device.type)
        self.plan = plan(spec, problem.n, problem.m, q.shape[1], self.wide.itemsize, q.dtype != self.wide, limit)
        # One allocation for all tiles: a fresh one each costs page faults, and two tiles would be alive together.
        self.buffers = q.new_empty(BUFFERS, self.plan.strip * self.plan.panel, dtype=self.wide)
        self.empty = q.new_empty(0, dtype=self.wide)
        self.pos = q.new_empty(problem.n, spec.layout.n_c, dtype=self.wide)
        self.rows = q.new_empty(len(spec.stats), problem.n, dtype=self.wide)

    def strips(self) -> list[slice]:
        """Row slices."""
        return [slice(i, min(i + self.plan.strip, self.p.n)) for i in range(0, self.p.n, self.plan.strip)]

    def panels(self) -> list[slice]:
        """Column slices, whole images."""
        return [slice(j, min(j + self.plan.panel, self.p.m)) for j in range(0, self.p.m, self.plan.panel)]

    def statistics(self) -> Statistics:
        """Statistics alone."""
        for rows in self.strips():
            self.fold_strip(rows)
        return Statistics(self.pos, self.rows)

    def run(self, tail: Nce, needs: Needs) -> tuple[Statistics, Gradients]:
        """Statistics and gradients of the tail's loss, a strip at a time."""
        p, unit = self.p, tail.unit(self.pos.numel())
        out = self.allocate(needs)
        for rows in self.strips():
            tile = self.fold_strip(rows)
            found = Statistics(self.pos[rows], self.rows[:, rows])
            self.descend_strip(rows, found, tail.coefficients(p.spec, *found, unit, 1.0, p.n * p.m), needs, out, tile)
        return Statistics(self.pos, self.rows), out

    def gradients(self, needs: Needs, statistics: Statistics, coefficients: Coefficients) -> Gradients:
        """Gradients from finished statistics."""
        out = self.allocate(needs)
        for rows in self.strips():
            found = Statistics(statistics.pos[rows], statistics.rows[:, rows])
            d = Coefficients(coefficients.d_pos[rows], coefficients.d_rows[:, rows])
            self.descend_strip(rows, found, d, needs, out, None)
        return out

    def allocate(self, needs: Needs) -> Gradients:
        """Outputs that the first tile to reach them overwrites, empty where not wanted."""
        q, k = self.p.q, self.p.k
        return Gradients(
            torch.empty_like(q, dtype=self.wide, memory_format=torch.contiguous_format) if needs.q else self.empty,
            torch.empty_like(k, dtype=self.wide, memory_format=torch.contiguous_format) if needs.k else self.empty,
            q.new_zeros((), dtype=self.wide) if needs.scale else self.empty,
        )

    def fold_strip(self, rows: slice) -> _Tile | None:
        """Fill `pos` and `rows` for a strip; hands its tile on where one panel holds all columns."""
        parts = []
        for columns in self.panels():
            tile = self.tile(rows, columns)
            parts.append(self.fold(tile, rows))
        self.rows[:, rows] = atoms.merge_tiles(self.p.spec, parts)
        return tile if len(parts) == 1 else None

    def tile(self, rows: slice, columns: slice, lse: Tensor | None = None) -> _Tile:
        """Scores of one tile and their exponentials, shifted by `lse` (strip,) once it is known."""
        spec, clip, n_c = self.p.spec, self.p.spec.clip, self.p.spec.layout.n_c
        q, k = self.p.q[rows].to(self.wide), self.p.k[columns].to(self.wide)
        r, x, e = self.buffers[:, : q.shape[0] * k.shape[0]].view(BUFFERS, q.shape[0], k.shape[0])
        torch.mm(q, k.T, out=r)
        torch.mul(r, self.p.scale / clip if clip else self.p.scale, out=x)
        if clip:
            x.tanh_()
        image = atoms.image_of_rows(spec.layout, range(rows.start, rows.stop), self.p.offset, r.device)
        first, last = columns.start // n_c, columns.stop // n_c
        own_rows = ((image >= first) & (image < last)).nonzero().squeeze(1)
        own_images = image[own_rows] - first
        by_image = x.view(r.shape[0], -1, n_c)
        own_x = by_image[own_rows, own_images]
        by_image[own_rows, own_images] = float("-inf")
        factor = clip or 1.0
        if clip and clip <= atoms.SHIFTLESS_CLIP:
            shift: Tensor | float = 0.0
            torch.mul(x, factor, out=e).exp_()
        else:
            peak = x.amax(dim=1, keepdim=True) * factor if lse is None else lse[:, None]
            shift = torch.where(peak == float("-inf"), 0.0, peak)
            torch.mul(x, factor, out=e).sub_(shift).exp_()
        return _Tile(r, x, e, shift, own_rows, own_images, own_x)

    def fold(self, tile: _Tile, rows: slice) -> Tensor:
        """The tile's statistics, (S, strip); its positives go to `pos`."""
        factor = self.p.spec.clip or 1.0
        self.pos[rows][tile.own_rows] = tile.own_x * factor
        square = torch.linalg.vector_norm(tile.r, dim=1).mul_(self.p.scale).square_()
        shift = tile.shift.squeeze(1) if isinstance(tile.shift, Tensor) else tile.shift
        value = {
            "neg_lse": lambda: tile.e.sum(dim=1).log_().add_(shift) + atoms.poison(tile.r),
            "neg_max": lambda: tile.x.amax(dim=1) * factor,
            "square": lambda: square,
        }
        return torch.stack([value[name]() for name in self.p.spec.stats])

    def weights(self, tile: _Tile, found: Statistics, d: Coefficients) -> Tensor:
        """w = dL/ds, in place of the tile's exponentials."""
        spec = self.p.spec
        if "neg_lse" in spec.stats:
            lse, d_lse = (x[spec.stats.index("neg_lse")][:, None] for x in (found.rows, d.d_rows))
        else:  # no negative has a weight, as in a row that has none
            lse, d_lse = tile.r.new_full((1, 1), float("-inf")), tile.r.new_zeros(1, 1)
        # A row without negatives has lse = −inf and nothing to weigh.
        known = torch.where(lse == float("-inf"), 0.0, d_lse * torch.exp(tile.shift - lse))
        w = tile.e.mul_(known)
        by_image = (tile.own_rows, tile.own_images)
        w.view(w.shape[0], -1, spec.layout.n_c)[by_image] = d.d_pos[tile.own_rows]
        if spec.clip:
            tile.x.view(w.shape[0], -1, spec.layout.n_c)[by_image] = tile.own_x
            w.addcmul_(w, tile.x.square_(), value=-1)  # · (1 − tanh²)
        if "square" in spec.stats:
            w.addcmul_(tile.r, (2 * self.p.scale) * d.d_rows[spec.stats.index("square")][:, None])
        return w

    def descend_strip(
        self, rows: slice, found: Statistics, d: Coefficients, needs: Needs, out: Gradients, tile: _Tile | None
    ) -> None:
        """Add a strip's part to the gradients."""
        stats = self.p.spec.stats
        lse = found.rows[stats.index("neg_lse")] if "neg_lse" in stats else None
        # Scaling the thin factors spares a pass over the weights.
        q = self.p.q[rows].to(self.wide) * self.p.scale
        for columns in self.panels():
            part = tile or self.tile(rows, columns, lse)
            w = self.weights(part, found, d)
            if needs.scale:
                out.dscale.add_(torch.dot(w.view(-1), part.r.view(-1)))
            if needs.q:
                out.dq[rows].addmm_(w, self.p.k[columns].to(self.wide), beta=int(columns.start > 0))
            if needs.k:
                out.dk[columns].addmm_(w.T, q, beta=int(rows.start > 0))
        if needs.q:
            out.dq[rows].mul_(self.p.scale)
