"""The chunk loop of several prefixes (`core/prefixes.py`): a tile of scores of each, from one product of all columns.

A tile's unnormalised products grow by one block of columns after the other, and each width has its cosines from them.
Back, from the widest to the narrowest, the weights of the widths add up in the same buffer, and each block of columns
takes one product with what has been added so far.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_nce.backends.strips import Sweep
from fused_nce.backends.tiles import Tile
from fused_nce.core import atoms, prefixes
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.tails import Coefficients


class PrefixSweep(Sweep):
    """Strips and panels as of one problem, K tiles at each place."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        spec = problem.spec
        self.problems, self.blocks = prefixes.without_operands(problem), prefixes.blocks(spec)
        self.of_q = prefixes.inverse_norms(spec, problem.q)
        self.of_k = self.of_q if problem.shared else prefixes.inverse_norms(spec, problem.k)
        # scale·Σ w·r of rows and columns; one tensor in both roles has one sum.
        self.row_sums = torch.zeros_like(self.of_q)
        self.column_sums = self.row_sums if problem.shared else torch.zeros_like(self.of_k)

    def tiles(self, rows: slice, panel: slice, lse: Tensor | None) -> list[Tile]:
        """Of each prefix."""
        q, k = self.p.q[rows].to(self.wide), self.p.k[panel].to(self.wide)
        products = self._products(rows, panel)

        def cosines(i: int) -> Callable[[Tensor], Tensor]:
            def multiply(out: Tensor) -> Tensor:
                block = self.blocks[i]
                products.addmm_(q[:, block], k[:, block].T, beta=int(i > 0))  # fault: prefix-products-anew
                return torch.mul(products, self.of_q[i, rows, None], out=out).mul_(self.of_k[i, panel])

            return multiply

        each = self.buffers[1:].chunk(len(self.problems))
        found: list[Tile] = []
        for i, (part, buffers) in enumerate(zip(self.problems, each, strict=True)):
            found.append(self.kind(part, rows, panel, buffers, None if lse is None else lse[i], cosines(i)))
        return found

    def _products(self, rows: slice, panel: slice) -> Tensor:
        shape = rows.stop - rows.start, panel.stop - panel.start
        return self.buffers[0, : shape[0] * shape[1]].view(shape)

    def fold_strip(self, rows: slice) -> list[Tile]:
        """As of one problem, the statistics of each prefix one below the other."""
        parts, spec = [], self.p.spec
        pos = self.pos[rows].unflatten(1, (spec.n_widths, spec.n_pos))
        for panel in self.panels():
            tiles = self.tiles(rows, panel, None)
            parts.append(torch.cat([tile.fold(pos[:, i]) for i, tile in enumerate(tiles)]))
        self.rows[:, rows] = atoms.merge_tiles(spec.stats, parts)
        return tiles if len(parts) == 1 else []

    def descend_strip(
        self,
        rows: slice,
        found: Statistics,
        d: Coefficients,
        needs: Needs,
        out: Gradients,
        tiles: list[Tile],
    ) -> None:
        """Add a strip's part to the gradients of unnormalised products, and to the norms' sums."""
        p, spec = self.p, self.p.spec
        each = list(zip(prefixes.split(spec, *found[:2]), prefixes.split(spec, *d[:2]), strict=True))
        lse = None
        if "neg_lse" in spec.stats:
            lse = found.rows.unflatten(0, (spec.n_widths, -1))[:, spec.stats.index("neg_lse")]
        q = p.q[rows].to(self.wide)
        for panel in self.panels():
            here = tiles or self.tiles(rows, panel, lse)
            k, total = p.k[panel].to(self.wide), self._products(rows, panel)
            for i in reversed(range(spec.n_widths)):
                has, on = each[i]
                w, block = here[i].weights(Statistics(*has), Coefficients(*on)), self.blocks[i]
                along = here[i].r.mul_(w)
                along_rows = along.sum(dim=1)
                if needs.scale:
                    out.dscale.add_(along_rows.sum())
                self.row_sums[i, rows] += along_rows * p.scale
                self.column_sums[i, panel] += along.sum(dim=0) * p.scale
                w.mul_((self.of_q[i, rows] * p.scale)[:, None]).mul_(self.of_k[i, panel])
                total = total.copy_(w) if i == spec.n_widths - 1 else total.add_(w)  # fault: prefix-weights-apart
                if needs.q:
                    out.dq[rows, block].addmm_(total, k[:, block], beta=int(panel.start > 0 or p.shared))
                if p.shared and needs.q:
                    out.dq[panel, block].addmm_(total.T, q[:, block])
                elif needs.k:
                    out.dk[panel, block].addmm_(total.T, q[:, block], beta=int(rows.start > 0))

    def finish(self, out: Gradients) -> Gradients:
        """Less the norms' part."""
        spec = self.p.spec
        pairs = (out.dq, self.p.q, self.of_q, self.row_sums), (out.dk, self.p.k, self.of_k, self.column_sums)
        for dx, x, norms, sums in pairs:
            if dx.numel():
                prefixes.less_norms(spec, dx, x, norms, sums)
        return out
