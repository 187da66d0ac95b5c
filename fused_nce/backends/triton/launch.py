"""The kernels put together: grids, splits, partial sums."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fused_nce.backends.triton import configs, gather, kernels, plan, stored
from fused_nce.backends.triton.form import Form, Partials, Terms, Wanted
from fused_nce.core import workspace
from fused_nce.core.problem import Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Bias, Block
from fused_nce.core.tails import Coefficients, Tail, fixed_sum


class Side(NamedTuple):
    """What a pass keeps (x), what it walks through (y), and what x is in it: rows for dq, columns for dk."""

    x: Tensor  # (n_x, D)
    y: Tensor  # (n_y, D)
    as_row: bool
    as_column: bool  # both, where one tensor is in both roles


class Sums(NamedTuple):
    """Partial sums of a gradient."""

    parts: Tensor  # (splits, n_x, D)
    tallies: Tensor  # (splits, n_x) of what a bias gets; empty without one
    partial: Tensor | None  # (splits, lines, N) beside which they were summed; None where normalised


class Finished(NamedTuple):
    """Room for a gradient, and for what it says of the scale and of a bias: empty where not wanted."""

    out: Tensor  # (n_x, D)
    dots: Tensor  # (blocks of D, n_x)
    on_bias: Tensor  # (n_x,)


Merge = Callable[[Tensor, Tensor, Tensor, int, dict[str, Any]], None]
"""Launches what merges splits: (partial, mirrored, room for the statistics, splits, constants)."""


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's device, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def with_rows(x: Tensor) -> Tensor:
    """With the elements of a row adjacent; rows may lie anywhere."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


class Sweep:
    """One problem's launches. Every tensor lies on its device, and every launch goes to that device's stream."""

    def __init__(self, problem: Problem, stash: torch.dtype = torch.float32) -> None:
        self.p, self.spec, self.form = problem, problem.spec, Form.of(problem)
        self.stash = stash  # of the gradients
        q, k = with_rows(problem.q), with_rows(problem.k)
        self.rows_side, self.columns_side = Side(q, k, True, False), Side(k, q, False, True)
        self.d, self.empty = q.shape[1], q.new_empty(0, dtype=torch.float32)
        self.row_sums: Sums | None = None  # dq's, where the statistics' own pass gave them
        architecture = configs.architecture_of(q.device)
        assert architecture is not None, "why_not was not asked"
        kind = architecture, torch.promote_types(q.dtype, k.dtype), self.d
        self.tile = configs.tile(*kind)
        clip = self.spec.clip
        self.limit = workspace.limit_bytes(q.device.type)
        lines = Partials.of(self.form.rows).lines
        once = self.form.symmetric and plan.mirrored_bytes(problem.n, lines, self.limit) > 0
        self.mirrors = configs.mirrored_tile(*kind) if once else None  # of a statistics pass
        self.biased = isinstance(self.spec.transform, Bias)
        # All statistics from the same tiles, and weights that are stored: for both sides, or wide rows.
        self.square = configs.square(*kind)
        sizes = problem.n, problem.m, self.d, (q.dtype, k.dtype), problem.shared, self.limit
        self.both, self.strip = plan.ways(self.spec, *sizes) if self.square else plan.Ways()
        bias: Any = problem.bias if self.biased else self.empty  # which nobody reads
        bias = bias if isinstance(bias, Tensor) else self.empty.new_full((), bias)
        self.scores = (problem.scale, *((clip, 1 / clip) if clip else (1.0, 1.0)), bias)
        ids = (problem.row_ids, problem.column_ids)
        self.row_ids, self.column_ids = (self.empty if x is None else x.contiguous() for x in ids)
        self.ceilings = self.empty if problem.ceilings is None else problem.ceilings[0].contiguous()
        # Block counts the offset in images: of rows and columns alike where a row is a column.
        block = isinstance(self.spec.layout, Block)
        self.first, self.itself = problem.offset, problem.offset * (self.form.n_c if block else 1)

    def compiled(self, tile: configs.Tile) -> dict[str, Any]:
        """What a tile's kernel is compiled for, beside the form."""
        sizes = {"X": tile.x, "Y": tile.y, "CHUNK": tile.chunk, "SLICE": tile.slice}
        return {"D": self.d, "PRECISION": self._precision(), **sizes, **tile.options}

    def _precision(self) -> str:
        """Of products of float32: TF32 where torch allows it, and where it holds both 16-bit types exactly.

        AMD's cards have none, or round it otherwise.
        """
        if torch.version.hip is not None:
            return "ieee"
        wide = torch.float32 in (self.p.q.dtype, self.p.k.dtype)
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if (wide and allowed) or (self.form.mixed and not wide) else "ieee"  # fault: triton-tf32

    def device(self) -> AbstractContextManager[Any]:
        """Of its launches."""
        return on_device(self.p.q)

    def new(self, *shape: int) -> Tensor:
        """An uninitialised float32 buffer."""
        return self.empty.new_empty(shape)

    # ---- statistics ---------------------------------------------------------------------------------------------

    def positives(self) -> Tensor:
        """(N, P) transformed scores of the positives."""
        p, form = self.p, self.form
        if p.positives is not None:
            return p.positives
        pos = self.new(p.n, form.n_pos)
        if form.n_pos:
            side, shape = self.rows_side, configs.gather_tile(self.d, form.partners)
            gather.positives_kernel[(triton.cdiv(p.n, shape.x), triton.cdiv(form.partners, shape.partners))](
                side.x, side.y, *self.scores, self.row_ids, pos, p.n, p.m, self.first, self.itself,
                side.x.stride(0), side.y.stride(0),
                FORM=form, D=self.d, X=shape.x, PARTNERS=shape.partners, WIDTH=shape.width,
                enable_fp_fusion=False,  # as in `finish`
            )  # fmt: skip
        return pos

    def merge(self, partial: Tensor, mirrored: Tensor, out: Tensor, splits: int, constants: dict[str, Any]) -> None:
        """As `Merge`."""
        n = out.shape[1]
        gather.merge_kernel[(triton.cdiv(n, 128),)](partial, mirrored, out, n, splits, **constants, X=128)

    def fold(self, side: Side, gradient: bool = False, merge: Merge | None = None) -> Tensor:
        """(S, n_x) statistics of x and, in the same pass, `row_sums`, which become dq."""
        n_x, n_y = side.x.shape[0], side.y.shape[0]
        wanted = self.form.columns if side.as_column else self.form.rows
        parts, names = Partials.of(wanted), self.spec.columns if side.as_column else self.spec.stats
        slices = triton.cdiv(self.d, self.tile.slice) if gradient else 1
        tile, programs = configs.fold_tile(self.tile, self.square, self.d, parts, gradient), plan.PROGRAMS
        mirrored = self.empty
        if self.mirrors and not gradient:
            tile, programs = self.mirrors, plan.MIRROR_PROGRAMS
            mirrored = self.new(triton.cdiv(n_x, tile.x), parts.lines, n_x)
        split = plan.split(n_x, n_y, slices, parts.lines + self.d * gradient, self.limit, programs)
        partial, out = self.new(split.splits, parts.lines, n_x), self.new(len(names), n_x)
        sums = self.new(split.splits, n_x, self.d) if gradient else self.empty
        tallies = self.new(split.splits, n_x) if gradient and self.biased else self.empty
        kernels.fold_kernel[(triton.cdiv(n_x, tile.x), split.splits, slices)](
            side.x, side.y, *self.scores, self.row_ids, self.column_ids, self.ceilings, partial, sums, tallies,
            mirrored, n_x, n_y, self.first, self.itself, split.walk, side.x.stride(0), side.y.stride(0),
            FORM=self.form, PARTIALS=parts, BY_COLUMN=side.as_column, GRADIENT=gradient,
            MIRRORED=mirrored.numel() > 0, **self.compiled(tile),
        )  # fmt: skip
        constants = {"FORM": self.form, "WANTED": wanted, "PARTIALS": parts}
        constants["MIRRORED"] = tile.x if mirrored.numel() else 0
        (merge or self.merge)(partial, mirrored, out, split.splits, constants)
        self.row_sums = Sums(sums, tallies, partial) if gradient else None
        return out

    def fold_both(self, merge: Merge | None = None) -> tuple[Tensor, Tensor | None]:
        """(S, N) statistics of rows, merged by `merge`, and (S', M) of columns, in one pass."""
        assert self.square is not None
        p, form = self.p, self.form
        tile = self.square.both if form.two_way else self.square.strip
        parts, back = Partials.of(form.rows), Partials.of(form.columns)
        count = triton.cdiv(p.n, tile.x)
        blocks = self.new(count, back.lines, p.m) if form.two_way else self.empty
        split = plan.both_split(p.n, p.m, parts.lines, 4 * blocks.numel(), self.limit)
        partial = self.new(split.splits, parts.lines, p.n)
        stored.both_kernel[(count, split.splits)](
            self.rows_side.x, self.rows_side.y, *self.scores, self.row_ids, self.column_ids, self.ceilings, partial,
            blocks, p.n, p.m, self.first, self.itself, split.walk, self.rows_side.x.stride(0),
            self.rows_side.y.stride(0), FORM=form, PARTIALS=parts, BACK=back, **self.compiled(tile),
        )  # fmt: skip
        rows, columns = self.new(len(self.spec.stats), p.n), None
        constants: dict[str, Any] = {"FORM": form, "WANTED": form.rows, "PARTIALS": parts, "MIRRORED": 0}
        (merge or self.merge)(partial, self.empty, rows, len(partial), constants)
        if form.two_way:
            columns = self.new(len(self.spec.columns), p.m)
            self.merge(blocks, self.empty, columns, count, constants | {"WANTED": form.columns, "PARTIALS": back})
        return rows, columns

    def statistics(self, gradient: bool = False, pos: Tensor | None = None, merge: Merge | None = None) -> Statistics:
        """Of rows, merged by `merge`, and columns, and the positives where they are not known."""
        if self.both and not gradient:
            rows, columns = self.fold_both(merge)
        else:
            rows, columns = self.fold(self.rows_side, gradient, merge), None
            columns = self.fold(self.columns_side) if self.spec.columns else None
        return Statistics(self.positives() if pos is None else pos, rows, columns)

    # ---- gradients ----------------------------------------------------------------------------------------------

    def terms(self, found: Statistics, d: Coefficients, form: Form) -> tuple[Tensor, Tensor]:
        """What the weights read of rows and of columns."""

        def of(n: int, x: Tensor, d_x: Tensor, wanted: Wanted, terms: Terms) -> Tensor:
            blocks = triton.cdiv(n, plan.STEP)
            out = self.new(terms.lines, blocks * plan.STEP)
            gather.terms_kernel[(blocks,)](
                x, d_x, d.d_pos, out, n, SHIFTLESS=form.shiftless, WANTED=wanted, TERMS=terms, X=plan.STEP
            )
            return out

        rows = of(self.p.n, found.rows, d.d_rows, form.rows, form.row_terms)
        if found.columns is None or d.d_columns is None:
            return rows, self.empty
        return rows, of(self.p.m, found.columns, d.d_columns, form.columns, form.column_terms)

    def weights(self, side: Side, form: Form, terms: tuple[Tensor, Tensor]) -> Sums:
        """Σ w·y over what is no gathered positive, from finished statistics."""
        n_x, n_y = side.x.shape[0], side.y.shape[0]
        slices = triton.cdiv(self.d, self.tile.slice)
        split = plan.split(n_x, n_y, slices, self.d, self.limit)
        sums = self.new(split.splits, n_x, self.d)
        tallies = self.new(split.splits, n_x) if self.biased else self.empty
        kernels.weights_kernel[(triton.cdiv(n_x, self.tile.x), split.splits, slices)](
            side.x, side.y, *self.scores, self.row_ids, self.column_ids, self.ceilings, *terms, sums,
            tallies, n_x, n_y, self.first, self.itself, split.walk, side.x.stride(0), side.y.stride(0),
            FORM=form, AS_ROW=side.as_row, AS_COLUMN=side.as_column,
            **self.compiled(configs.weights_tile(self.tile, side.as_row and side.as_column)),
        )  # fmt: skip
        return Sums(sums, tallies, None)

    def room(self, side: Side, scale: bool, sums: Tensor | None = None) -> Finished:
        """For what `finish_rows` leaves; `sums`, of all rows and of one split, may be the gradient's place."""
        n_x, shape = side.x.shape[0], configs.gather_tile(self.d, 1)
        here = sums is not None and self.stash == torch.float32
        out = sums if here else side.x.new_empty(n_x, self.d, dtype=self.stash)
        assert out is not None
        dots = self.new(triton.cdiv(self.d, shape.width), n_x) if scale else self.empty
        return Finished(out, dots, self.new(n_x) if scale and self.biased else self.empty)

    def finish_rows(
        self, side: Side, sums: Sums, found: Statistics, d: Coefficients, room: Finished, start: int = 0
    ) -> None:
        """dL/dx of the rows from `start` on that `sums` has."""
        (splits, rows), n_x, n_y, form = sums.parts.shape[:2], side.x.shape[0], side.y.shape[0], self.form
        partners = form.n_c if side.as_row else form.rows_per_image
        shape, at_once = configs.finish_tile(self.d, partners, splits)
        x = min(shape.x, plan.STRIP)  # a strip ends with a program
        gather.finish_kernel[(triton.cdiv(rows, x), triton.cdiv(self.d, shape.width))](
            side.x, side.y, self.scores[0], self.scores[2], self.row_ids, sums.parts, sums.tallies,
            self.empty if sums.partial is None else sums.partial, found.rows, d.d_rows, found.pos, d.d_pos,
            *room, n_x, n_y, self.first, self.itself, start, splits, side.x.stride(0), side.y.stride(0),
            FORM=form, PARTIALS=Partials.of(form.rows), NORMALISE=sums.partial is not None, AS_ROW=side.as_row,
            AS_COLUMN=side.as_column, DOTS=room.dots.numel() > 0, D=self.d,
            # Lanes that share a sum must hold one number; a fused multiply-add would round it anew on each.
            # fault: triton-lanes-differ
            X=x, PARTNERS=shape.partners, WIDTH=shape.width, SPLITS=at_once, enable_fp_fusion=False,
        )  # fmt: skip

    def total(self, side: Side, room: Finished) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dL/dx, dL/dscale, dL/dbias): Σ w·⟨x, y⟩ is Σ ⟨x, dL/dx⟩ / scale, before the scale has multiplied it."""
        # fault: triton-one-tensor
        share = 0.5 if side.as_row and side.as_column else 1.0  # each score was met twice
        dscale = fixed_sum(room.dots) * share if room.dots.numel() else self.empty
        return room.out, dscale, fixed_sum(room.on_bias) * share if self.biased else None

    def finish(
        self, side: Side, sums: Sums, found: Statistics, d: Coefficients, scale: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `total`, of all rows."""
        room = self.room(side, scale, sums.parts[0] if len(sums.parts) == 1 else None)
        self.finish_rows(side, sums, found, d, room)
        return self.total(side, room)

    def store(self, found: Statistics, d: Coefficients, form: Form, needs: Needs) -> Gradients:
        """As `gradients`, from the scores once more: a strip of weights at a time, by cuBLAS into both sums."""
        p, q, k, tile = self.p, self.rows_side.x, self.rows_side.y, self.square and self.square.strip
        assert tile is not None
        self.stash = q.dtype if p.blocks == 1 else torch.float32  # fault: triton-share-rounded
        by_row, terms = needs.q or (needs.scale and not needs.k), self.terms(found, d, form)
        # A target's share is in the weights, as its column needs it there.
        side = self.rows_side._replace(as_row=form.ids != "target")
        weights = q.new_empty(self.strip, plan.padded(p.m))
        sums, room = (self.new(self.strip, self.d), self.room(side, needs.scale)) if by_row else (self.empty, None)
        of_columns = self.new(p.m, self.d) if needs.k else self.empty
        for start in range(0, p.n, self.strip):
            rows = min(self.strip, p.n - start)
            stored.strip_kernel[(triton.cdiv(rows, tile.x), triton.cdiv(p.m, plan.STRIP_WALK))](
                q, k, *self.scores, self.row_ids, self.column_ids, self.ceilings, *terms, weights, p.n, p.m,
                self.first, self.itself, start, plan.STRIP_WALK, q.stride(0), k.stride(0),
                FORM=form, **self.compiled(tile),
            )  # fmt: skip
            w = weights[:rows, : p.m]
            if room is not None:
                stored.multiply(w, k, sums[:rows])
                self.finish_rows(side, Sums(sums[None, :rows], self.empty, None), found, d, room, start)
            if needs.k:
                stored.multiply(w.T, q[start : start + rows], of_columns, add=start > 0)  # fault: triton-strips-add
        dq = dk = dscale = self.empty
        del w, weights, sums  # their memory serves the columns' end  # fault: triton-sums-alive
        if room is not None:
            dq, dscale, _ = self.total(side, room)
        if needs.k:
            of_y = Sums(of_columns[None], self.empty, None)
            dk, on_scale, _ = self.finish(self.columns_side, of_y, found, d, needs.scale and room is None)
            dscale = on_scale if room is None else dscale
        return Gradients(dq if needs.q else self.empty, dk, dscale)

    def gradients(self, found: Statistics, d: Coefficients, penalised: bool, needs: Needs) -> Gradients:
        """The wanted gradients, from finished statistics."""
        form = self.form if penalised else self.form.without_square()
        found = Statistics(*(None if x is None else x.contiguous() for x in found))  # type: ignore[arg-type]
        d = Coefficients(*(None if x is None else x.contiguous() for x in d))  # type: ignore[arg-type]
        if self.strip:
            return self.store(found, d, form, needs)
        dq = dk = dscale = self.empty
        dbias: Tensor | None = None
        by_row, by_column = needs.q or (needs.scale and not needs.k), needs.k and not self.p.shared
        swept = by_column or (by_row and self.row_sums is None)
        terms = self.terms(found, d, form) if swept else (self.empty, self.empty)
        if by_row:
            side = self.rows_side._replace(as_column=self.p.shared)
            sums = self.row_sums or self.weights(side, form, terms)
            dq, dscale, dbias = self.finish(side, sums, found, d, needs.scale)
            self.row_sums = None
            del sums  # their memory serves the next pass
        if by_column:
            sums = self.weights(self.columns_side, form, terms)
            dk, on_scale, on_bias = self.finish(self.columns_side, sums, found, d, needs.scale and not by_row)
            if not by_row:
                dscale, dbias = on_scale, on_bias
        return Gradients(dq if needs.q else self.empty, dk, dscale, dbias if needs.scale else None)

    def known_before(self, tail: Tail) -> bool:
        """Whether the weights lack only one factor a row, known at its end: then the first pass can sum w·y."""
        rows = self.form.rows
        one = (rows.neg_lse >= 0) != (rows.neg_softplus >= 0)
        return one and not tail.penalty and max(rows.pos_lse, rows.pos_sum, rows.neg_sum) < 0

    def sums_at_once(self, tail: Tail, needs: Needs) -> bool:
        """Whether the statistics' pass sums dq too."""
        wanted = needs.q or (needs.scale and not needs.k)
        alone = not (self.p.shared or self.strip or self.spec.columns)  # fault: triton-wide-sums
        return wanted and self.known_before(tail) and alone


def stats(problem: Problem) -> Statistics:
    """One score GEMM, of columns too; two where their statistics ask for more than a maximum and a sum."""
    sweep = Sweep(problem)
    with sweep.device():
        return sweep.statistics()


def grads(problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
    """The scores again, and one GEMM a gradient, for each of dq and dk: once for both where weights are stored."""
    sweep = Sweep(problem)
    with sweep.device():
        return sweep.gradients(statistics, coefficients, True, needs)


def loss(problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
    """Statistics and gradients.

    If a row's weights lack only one factor (`known_before`), the statistics pass also sums dq: 2u, then 2u for dk.
    With a penalty dq has two terms whose ratio is known only when the row is finished. A second accumulator would need
    a GEMM of its own, which costs as much as computing the scores again, so dq takes a second pass: 1u + 2u, then 2u
    for dk. Where k is q, one pass after the statistics gives the whole gradient: 1u + 2u,
    or 0.5u + 2u where `plan.mirrored_bytes` lets the statistics see each pair of rows once. Rows beyond `plan.WIDE`
    take 2u and 1u for each gradient where `plan.ways` stores their weights.
    """
    sweep, spec = Sweep(problem), problem.spec
    with sweep.device():
        found = sweep.statistics(gradient=sweep.sums_at_once(tail, needs))
        if not any(needs):
            return found, Gradients(sweep.empty, sweep.empty, sweep.empty)
        unit = tail.unit(problem.n * tail.per_row(spec))
        d = tail.coefficients(spec, found.pos, found.rows, None, unit, 1.0, problem.n * problem.m)
        return found, sweep.gradients(found, d, bool(tail.penalty), needs)
