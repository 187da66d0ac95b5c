"""Strips of rows and panels of columns in plain torch, and what is collected over them."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from fused_nce.backends.tiles import AtomTile, Tile, kind
from fused_nce.core import atoms, workspace
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Bias, Block, Spec
from fused_nce.core.tails import Coefficients, Tail

MIN_STRIP_ROWS = 32  # thinner GEMMs ran below half of the machine's rate


def score_buffers(spec: Spec) -> int:
    """Score-sized tensors alive together; of prefixes also the unnormalised products, which become a sum of weights."""
    return kind(spec).BUFFERS * spec.n_widths + bool(spec.prefixes)


class Plan(NamedTuple):
    """Rows a strip and columns a panel (whole images)."""

    strip: int
    panel: int


def plan(spec: Spec, n: int, m: int, d: int, wide_bytes: int, cast: bool, limit_bytes: int) -> Plan:
    """The tiling, by shape alone. `cast`: 16-bit inputs need their part of q and k in float32 beside the scores."""
    n_c = spec.layout.n_c if isinstance(spec.layout, Block) else 1
    row_bytes = score_buffers(spec) * wide_bytes
    if spec.whole_rows:
        left = limit_bytes - (m * d * wide_bytes if cast else 0)
        return Plan(max(1, min(n, left // (m * row_bytes + (d * wide_bytes if cast else 0)))), m)
    if not cast and n * m * row_bytes <= limit_bytes:
        return Plan(n, m)
    strip = min(n, limit_bytes // (m * row_bytes))
    if strip >= min(n, MIN_STRIP_ROWS) and not cast:
        return Plan(strip, m)
    strip = min(n, 128)
    column_bytes = strip * row_bytes + (d * wide_bytes if cast else 0)
    images = max(1, (limit_bytes - (strip * d * wide_bytes if cast else 0)) // (column_bytes * n_c))
    return Plan(strip, min(m, images * n_c))


class Sweep:
    """Strips of rows, panels of columns, and what is collected over them."""

    def __init__(self, problem: Problem) -> None:
        self.p, self.kind = problem, kind(problem.spec)
        spec, q = problem.spec, problem.q
        self.wide = torch.promote_types(q.dtype, torch.float32)
        limit = workspace.limit_bytes(q.device.type)
        cast_inputs = q.dtype != self.wide or problem.k.dtype != self.wide
        self.plan = plan(spec, problem.n, problem.m, q.shape[1], self.wide.itemsize, cast_inputs, limit)
        # One allocation for all tiles: a fresh one each costs page faults, and two tiles would be alive together.
        held = self.kind.HELD * spec.n_widths + bool(spec.prefixes)
        self.buffers = q.new_empty(held, self.plan.strip * self.plan.panel, dtype=self.wide)
        self.empty = q.new_empty(0, dtype=self.wide)
        # A positive that no column is (a target out of range, where a GPU cannot say so) stays NaN.
        unknown = q.new_full((problem.n, spec.n_widths * spec.n_pos), float("nan"), dtype=self.wide)
        self.pos = unknown if problem.positives is None else problem.positives
        self.rows = q.new_empty(spec.n_widths * len(spec.stats), problem.n, dtype=self.wide)
        self.columns = [atoms.Merger(spec.columns) for _ in self.panels()] if spec.columns else []

    def strips(self) -> list[slice]:
        """Row slices."""
        return [slice(i, min(i + self.plan.strip, self.p.n)) for i in range(0, self.p.n, self.plan.strip)]

    def panels(self) -> list[slice]:
        """Column slices, whole images."""
        # fault: last-panel-dropped
        return [slice(j, min(j + self.plan.panel, self.p.m)) for j in range(0, self.p.m, self.plan.panel)]

    def statistics(self) -> Statistics:
        """Statistics alone."""
        for rows in self.strips():
            self.fold_strip(rows)
        columns = torch.cat([merger.result() for merger in self.columns], dim=1) if self.columns else None
        return Statistics(self.pos, self.rows, columns)

    def run(self, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
        """Statistics and gradients of the tail's loss, a strip at a time."""
        p, unit = self.p, tail.unit(self.p.n * tail.per_row(self.p.spec))
        out = self.allocate(needs)
        for rows in self.strips():
            tiles = self.fold_strip(rows)
            found = Statistics(self.pos[rows], self.rows[:, rows])
            self.descend_strip(rows, found, tail.coefficients(p.spec, *found, unit, 1.0, p.n * p.m), needs, out, tiles)
        return Statistics(self.pos, self.rows), self.finish(out)

    def gradients(self, needs: Needs, statistics: Statistics, coefficients: Coefficients) -> Gradients:
        """Gradients from finished statistics."""
        out = self.allocate(needs)
        for rows in self.strips():
            found = Statistics(statistics.pos[rows], statistics.rows[:, rows], statistics.columns)
            d = Coefficients(coefficients.d_pos[rows], coefficients.d_rows[:, rows], coefficients.d_columns)
            self.descend_strip(rows, found, d, needs, out, [])
        return self.finish(out)

    def allocate(self, needs: Needs) -> Gradients:
        """Outputs that the first tile to reach them overwrites, empty where not wanted.

        One tensor in both roles has one buffer, to which tiles add in both.
        """
        q, k, shared = self.p.q, self.p.k, self.p.shared
        new = torch.zeros_like if shared else torch.empty_like
        plain = torch.contiguous_format
        return Gradients(
            new(q, dtype=self.wide, memory_format=plain) if needs.q else self.empty,
            new(k, dtype=self.wide, memory_format=plain) if needs.k and not shared else self.empty,
            q.new_zeros((), dtype=self.wide) if needs.scale else self.empty,
            q.new_zeros((), dtype=self.wide) if needs.scale and isinstance(self.p.spec.transform, Bias) else None,
        )

    def finish(self, out: Gradients) -> Gradients:
        """The factor that a shared buffer could not take on the way."""
        if self.p.shared and out.dq.numel():
            out.dq.mul_(self.p.scale)
        return out

    def fold_strip(self, rows: slice) -> list[Tile]:
        """Fill `pos` and `rows` for a strip; hands its tiles on where one panel holds all columns."""
        parts = []
        for number, columns in enumerate(self.panels()):
            tile = self.kind(self.p, rows, columns, self.buffers, None)
            parts.append(tile.fold(self.pos[rows]))
            if self.columns:
                self.columns[number].push(cast(AtomTile, tile).fold_columns())
        self.rows[:, rows] = atoms.merge_tiles(self.p.spec.stats, parts)  # fault: panels-overwrite-instead
        return [tile] if len(parts) == 1 else []

    def descend_strip(
        self,
        rows: slice,
        found: Statistics,
        d: Coefficients,
        needs: Needs,
        out: Gradients,
        tiles: list[Tile],
    ) -> None:
        """Add a strip's part to the gradients."""
        p, stats = self.p, self.p.spec.stats
        lse = found.rows[stats.index("neg_lse")] if "neg_lse" in stats else None
        # Scaling the thin factors spares a pass over the weights.
        q = p.q[rows].to(self.wide) * (1.0 if p.shared else p.scale)  # fault: scale-missing-dk
        for columns in self.panels():
            part = tiles[0] if tiles else self.kind(p, rows, columns, self.buffers, lse)
            if found.columns is None or d.d_columns is None:
                w = part.weights(found, d)
            else:
                w = part.weights(
                    found._replace(columns=found.columns[:, columns]), d._replace(d_columns=d.d_columns[:, columns])
                )
            if needs.scale:
                # Row by row: a BLAS dot adds in a few running sums, which lose 20 times more than torch's cascade.
                out.dscale.add_(part.r.mul_(w).sum(dim=1).sum())
            if out.dbias is not None and part.bias_sum is not None:
                out.dbias.add_(part.bias_sum)  # fault: gradient-bias-dropped
            k = p.k[columns].to(self.wide) if needs.q or p.spec.distance else p.k[columns]
            if needs.q:
                out.dq[rows].addmm_(w, k, beta=int(columns.start > 0 or p.shared))  # fault: dq-not-accumulated
            if p.shared and needs.q:
                out.dq[columns].addmm_(w.T, q)  # fault: one-tensor-both
            elif needs.k:
                out.dk[columns].addmm_(w.T, q, beta=int(rows.start > 0))  # fault: dk-not-accumulated, dk-rounded-inputs
            if p.spec.distance:  # fault: distance-gradient-product
                if needs.q:
                    atoms.less_itself(out.dq[rows], w, p.q[rows].to(self.wide), dim=1)
                if p.shared and needs.q:
                    atoms.less_itself(out.dq[columns], w, k, dim=0)
                elif needs.k:
                    atoms.less_itself(out.dk[columns], w, k, dim=0, factor=p.scale)
        if needs.q and not p.shared:
            out.dq[rows].mul_(p.scale)
