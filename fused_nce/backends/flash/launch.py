"""The kernels put together: grids, splits, partial sums."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fused_nce.backends.flash import configs, gather, kernels, plan
from fused_nce.backends.flash.plan import STATISTICS
from fused_nce.core import atoms, workspace
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.tails import Coefficients, Nce, fixed_sum


class Side(NamedTuple):
    """What a pass keeps (x) and what it walks through (y): rows and columns for dq, columns and rows for dk."""

    x: Tensor  # (n_x, D)
    y: Tensor  # (n_y, D)
    x_first: int  # the image of x's row 0
    y_first: int
    x_per_image: int
    y_per_image: int
    by_column: bool


class Sums(NamedTuple):
    """Partial sums of a gradient."""

    parts: Tensor  # (splits, n_x, D)
    partial: Tensor | None  # (splits, 3, N) the statistics beside which they were summed; None where normalised


class Sweep:
    """One problem's launches. Every tensor lies on its device, and every launch goes to that device's stream."""

    def __init__(self, problem: Problem) -> None:
        self.p, self.spec = problem, problem.spec
        # The elements of a row must be adjacent; rows may lie anywhere.
        q, k = (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (problem.q, problem.k))
        layout, d = self.spec.block, q.shape[1]
        self.rows_side = Side(q, k, problem.offset, 0, layout.rows_per_image, layout.n_c, False)
        self.columns_side = Side(k, q, 0, problem.offset, layout.n_c, layout.rows_per_image, True)
        self.d, self.empty = d, q.new_empty(0, dtype=torch.float32)
        self.row_sums: Sums | None = None  # dq's, where the statistics' own pass gave them
        architecture = configs.architecture_of(q.device)
        assert architecture is not None, "why_not was not asked"
        self.tile = configs.tile(architecture, q.dtype, d)
        clip = self.spec.clip
        self.clip, self.inverse_clip = (clip, 1 / clip) if clip else (1.0, 1.0)
        self.limit = workspace.limit_bytes(q.device.type)
        self.shiftless = clip is not None and clip <= atoms.SHIFTLESS_CLIP
        self.images = {"N_C": layout.n_c, "ROWS_PER_IMAGE": layout.rows_per_image}
        self.compiled: dict[str, Any] = {
            "D": d,
            "CLIP": clip is not None,
            "TENSOR_SCALE": isinstance(problem.scale, Tensor),
        }
        tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.tiled = self.compiled | {
            "PRECISION": "tf32" if tf32 else "ieee",
            "X": self.tile.x,
            "Y": self.tile.y,
            "CHUNK": self.tile.chunk,
            "SLICE": self.tile.slice,
            "num_warps": self.tile.warps,
            "num_stages": self.tile.stages,
        }

    def device(self) -> AbstractContextManager[Any]:
        """Launches go to the tensors' device, whichever is current."""
        return torch.cuda.device(self.p.q.device) if self.p.q.is_cuda else nullcontext()

    def new(self, *shape: int) -> Tensor:
        """An uninitialised float32 buffer."""
        return self.p.q.new_empty(shape, dtype=torch.float32)

    def positives(self) -> Tensor:
        """(N, P) transformed scores of the positives."""
        p, n_c = self.p, self.spec.block.n_c
        side, shape = self.rows_side, configs.gather_tile(self.d, n_c)
        pos = self.new(p.n, n_c)
        gather.positives_kernel[(triton.cdiv(p.n, shape.x), triton.cdiv(n_c, shape.partners))](
            side.x, side.y, p.scale, self.clip, self.inverse_clip, pos, p.n, p.m, p.offset,
            side.x.stride(0), side.y.stride(0),
            X=shape.x, PARTNERS=shape.partners, WIDTH=shape.width, **self.images, **self.compiled,
        )  # fmt: skip
        return pos

    def rows(self, gradient: bool) -> Tensor:
        """(3, N) statistics, and in the same pass `row_sums`, which become dq."""
        p, side = self.p, self.rows_side
        split = plan.split(p.n, p.m, self.d, self.limit)
        partial, out = self.new(split.parts, len(STATISTICS), p.n), self.new(len(STATISTICS), p.n)
        sums = self.new(split.parts, p.n, self.d) if gradient else self.empty
        slices = triton.cdiv(self.d, self.tile.slice) if gradient else 1
        kernels.rows_kernel[(triton.cdiv(p.n, self.tile.x), split.parts, slices)](
            side.x, side.y, p.scale, self.clip, self.inverse_clip, partial, sums, p.n, p.m, p.offset, split.walk,
            side.x.stride(0), side.y.stride(0),
            SHIFTLESS=self.shiftless, GRADIENT=gradient, **self.images, **self.tiled,
        )  # fmt: skip
        gather.merge_kernel[(triton.cdiv(p.n, 128),)](partial, out, p.n, split.parts, SHIFTLESS=self.shiftless, X=128)
        self.row_sums = Sums(sums, partial) if gradient else None
        return out

    def weights(self, side: Side, neg_lse: Tensor, d_neg_lse: Tensor, d_square: Tensor | None) -> Sums:
        """Σ w·y over the negatives and the penalty, from finished rows."""
        (n_x, _), (n_y, _) = side.x.shape, side.y.shape
        split = plan.split(n_x, n_y, self.d, self.limit)
        sums = self.new(split.parts, n_x, self.d)
        grid = (triton.cdiv(n_x, self.tile.x), split.parts, triton.cdiv(self.d, self.tile.slice))
        kernels.weights_kernel[grid](
            side.x, side.y, self.p.scale, self.clip, self.inverse_clip, neg_lse, d_neg_lse,
            self.empty if d_square is None else d_square, sums, n_x, n_y, side.x_first, side.y_first, split.walk,
            side.x.stride(0), side.y.stride(0), X_PER_IMAGE=side.x_per_image, Y_PER_IMAGE=side.y_per_image,
            BY_COLUMN=side.by_column, SQUARE=d_square is not None, **self.tiled,
        )  # fmt: skip
        return Sums(sums, None)

    def finish(
        self, side: Side, sums: Sums, neg_lse: Tensor, d_neg_lse: Tensor, pos: Tensor, d_pos: Tensor, scale: bool
    ) -> tuple[Tensor, Tensor]:
        """(dL/dx, dL/dscale): dL/dscale = Σ w·⟨x, y⟩ is Σ ⟨x, dL/dx⟩ / scale, before the scale has multiplied it."""
        (n_x, _), (n_y, _) = side.x.shape, side.y.shape
        splits = sums.parts.shape[0]
        shape = configs.gather_tile(self.d, side.y_per_image)
        widths = triton.cdiv(self.d, shape.width)
        out = sums.parts[0] if splits == 1 else self.new(n_x, self.d)
        dots = self.new(widths, n_x) if scale else self.empty
        gather.finish_kernel[(triton.cdiv(n_x, shape.x), widths)](
            side.x, side.y, self.p.scale, self.inverse_clip, sums.parts,
            self.empty if sums.partial is None else sums.partial, neg_lse, d_neg_lse, pos, d_pos, out, dots,
            n_x, n_y, side.x_first, side.y_first, splits, side.x.stride(0), side.y.stride(0),
            N_C=self.spec.block.n_c, X_PER_IMAGE=side.x_per_image, Y_PER_IMAGE=side.y_per_image,
            SHIFTLESS=self.shiftless, NORMALISE=sums.partial is not None, BY_COLUMN=side.by_column, DOTS=scale,
            X=shape.x, PARTNERS=shape.partners, WIDTH=shape.width, **self.compiled,
        )  # fmt: skip
        return out, fixed_sum(dots) if scale else self.empty

    def statistics(self, rows: Tensor) -> Statistics:
        """The spec's choice of the (3, N) rows, in its order, and the positives."""
        names = self.spec.stats
        # Not indexed by a list: that is a tensor on the host, and copying it would wait for the GPU.
        chosen = rows if names == STATISTICS else torch.stack([rows[STATISTICS.index(name)] for name in names])
        return Statistics(self.positives(), chosen)

    def gradients(self, found: Statistics, d: Coefficients, square: bool, needs: Needs) -> Gradients:
        """The wanted gradients, from finished statistics; the penalty's part where `square`."""
        names = self.spec.stats
        if "neg_lse" in names:
            neg_lse, d_neg_lse = (x[names.index("neg_lse")].contiguous() for x in (found.rows, d.d_rows))
        else:  # no negative has a weight, as in a row that has none
            neg_lse, d_neg_lse = torch.full_like(found.rows[0], float("-inf")), torch.zeros_like(found.rows[0])
        d_square = d.d_rows[names.index("square")].contiguous() if square else None
        finished = (neg_lse, d_neg_lse, found.pos.contiguous(), d.d_pos.contiguous())
        dq = dk = dscale = self.empty
        by_row = needs.q or (needs.scale and not needs.k)
        if by_row:
            sums = self.row_sums or self.weights(self.rows_side, neg_lse, d_neg_lse, d_square)
            dq, dscale = self.finish(self.rows_side, sums, *finished, needs.scale)
            self.row_sums = None
            del sums  # their memory serves the next pass
        if needs.k:
            sums = self.weights(self.columns_side, neg_lse, d_neg_lse, d_square)
            dk, by_column = self.finish(self.columns_side, sums, *finished, needs.scale and not by_row)
            dscale = dscale if by_row else by_column
        return Gradients(dq if needs.q else self.empty, dk, dscale)


def stats(problem: Problem) -> Statistics:
    """One score GEMM."""
    sweep = Sweep(problem)
    with sweep.device():
        return sweep.statistics(sweep.rows(gradient=False))


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The scores again, and one GEMM a gradient, for each of dq and dk."""
    sweep = Sweep(problem)
    with sweep.device():
        return sweep.gradients(statistics, coefficients, "square" in problem.spec.stats, needs)


def loss(problem: Problem, tail: Nce, needs: Needs) -> tuple[Statistics, Gradients]:
    """Statistics and gradients.

    Without a penalty the pass that gives the statistics gives dq too: 2u, and 2u for dk. A penalty's share of dq stands
    in another proportion to the negatives', unknown until the row is finished: a second accumulator, with a GEMM of its
    own, would cost what computing the scores again does, so that is done: 1u + 2u, and 2u for dk.
    """
    sweep = Sweep(problem)
    single = not tail.penalty and (needs.q or (needs.scale and not needs.k))
    with sweep.device():
        found = sweep.statistics(sweep.rows(gradient=single))
        if not any(needs):
            return found, Gradients(sweep.empty, sweep.empty, sweep.empty)
        unit = tail.unit(found.pos.numel())
        d = tail.coefficients(problem.spec, *found, unit, 1.0, problem.n * problem.m)
        return found, sweep.gradients(found, d, bool(tail.penalty), needs)
