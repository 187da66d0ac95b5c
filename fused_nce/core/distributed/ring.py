"""Blocks of keys that go round the processes: a backend made of another. A process holds its own keys and one block.

Process r has its own rows and, at step t, the keys of process r − t. Two rounds: in the first every visit gives
statistics of the rows, merged as those of tiles are; in the second, from the finished statistics, gradients. A
block's accumulator (its gradient, or its columns' statistics) follows one step behind it and returns to the block's
owner after the last step. Communication overlaps with the computation.

Process by process the sums have a fixed order, so the bits are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fused_nce.core import atoms, checks, defaults
from fused_nce.core.distributed.processes import agree, dtype_number, finish, lost, settings
from fused_nce.core.group import Peers
from fused_nce.core.problem import Backend, Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Labels, Separate, Spec
from fused_nce.core.tails import Coefficients, Tail

MARK = "ring"
Choose = Callable[[Spec, Tensor, Tensor | None, str], tuple[str, Backend]]  # `dispatch.choose`


def code(peers: Peers, backend: str, spec: Spec) -> str:
    """The ring on a backend ("" to choose) as the ops' backend string.

    Raises:
        ValueError: for statistics that no visit has a part of.
    """
    if spec.whole_rows:
        raise ValueError(f"group: got ring=True with stats {spec.stats}, which need whole rows, need ring=False")
    wire = "" if peers.wire_dtype is None else checks.DTYPES.index(peers.wire_dtype)
    return f"{MARK}|{peers.name}|{peers.rank}|{peers.size}|{peers.timeout_s}|{wire}|{backend}"


def parse(backend: str) -> tuple[Peers, str]:
    """What `code` wrote, and the backend."""
    _, name, rank, size, timeout_s, wire, inner = backend.split("|")
    dtype = checks.DTYPES[int(wire)] if wire else None
    return Peers(name, int(rank), int(size), True, dtype, float(timeout_s)), inner


class KeyBlock(NamedTuple):
    """What goes round. Tensors of the same shapes on every process, None where there are none."""

    k: Tensor  # (M, D), in the dtype of the wire
    column_ids: Tensor | None
    guide: Tensor | None = None  # (M, G)
    columns: Tensor | None = None  # (S', M) finished statistics
    d_columns: Tensor | None = None  # (S', M)


class Ring:
    """A `Backend` (`core/problem.py`) that has been chosen: the rows of this process against the keys of all."""

    slopes, summary = staticmethod(defaults.slopes), staticmethod(defaults.summary)
    mirrored, tiles, ways = staticmethod(defaults.mirrored), staticmethod(defaults.tiles), staticmethod(defaults.ways)
    losses = whole_loss = gathered_scores = gathered_grads = None
    BOTH_WAYS = False

    def __init__(self, peers: Peers, problem: Problem, backend: str, choose: Choose) -> None:
        """`backend` as a caller asked for it; it must run both the own block and another's."""
        self.peers = peers
        problem = self._rounded(problem)
        block = _visited(problem, KeyBlock(problem.k, problem.column_ids, problem.guide_k))
        self.other_name, self.other = choose(block.spec, block.q, block.k, backend)
        self.name, self.own = choose(problem.spec, problem.q, None if problem.shared else problem.k, backend)

    def stats(self, problem: Problem, **more: int | str) -> Statistics:
        """Of all columns; those of the own columns over all rows. `more` is agreed on with the sizes."""
        n, d = problem.q.shape
        sizes = {"N": n, "M": problem.m, "D": d, "dtype": dtype_number(problem.k), **more}
        if problem.guide_k is not None:
            sizes["G"] = problem.guide_k.shape[1]
        agree(self.peers.name, self.peers.timeout_s, sizes | settings(self.peers, problem.scale, problem.spec.code))
        problem = self._rounded(problem)
        rows, spec, own = atoms.Merger(problem.spec.stats), problem.spec, []

        def visit(at_owner: bool, block: KeyBlock) -> Tensor | None:
            found = (self.own.stats if at_owner else self.other.stats)(
                problem if at_owner else _visited(problem, block)
            )
            rows.push(found.rows)
            if at_owner:
                own.append(found.pos)
            return found.columns

        columns = self._round(self._block(problem), visit, lambda one, two: atoms.merge_two(spec.columns, one, two))
        if columns is not None and spec.columns:
            columns = atoms.merge_tiles(spec.columns, [columns])
        return Statistics(own[0], rows.result(), columns)

    def grads(self, problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
        """Of the rows over all columns, and of the own keys over all rows."""
        wide = statistics.rows.dtype
        none = problem.q.new_empty(0, dtype=wide)
        one_gradient, problem = problem.shared, self._rounded(problem)
        if one_gradient and not problem.shared:
            needs = needs._replace(k=needs.q)
        total = {"dq": none, "dscale": none, "dbias": None}
        needs_there = needs._replace(k=needs.q if problem.shared else needs.k)

        def visit(at_owner: bool, block: KeyBlock) -> Tensor | None:
            found = statistics._replace(columns=block.columns)
            d = coefficients._replace(d_columns=block.d_columns)
            if at_owner:
                out = self.own.grads(problem, found, d, needs)
            else:
                there = _visited(problem, block)
                pos = there.positives if there.positives is not None else found.pos
                out = self.other.grads(
                    there, found._replace(pos=pos), d._replace(d_pos=torch.zeros_like(pos)), needs_there
                )
            for name, had in total.items():
                part = getattr(out, name)
                if part is not None and part.numel():
                    total[name] = part.to(wide) if had is None or not had.numel() else had.add_(part)
            if not needs_there.k:
                return None
            return out.dk.to(wide) if out.dk.numel() else problem.q.new_zeros(problem.k.shape, dtype=wide)

        block = self._block(problem)._replace(columns=statistics.columns, d_columns=coefficients.d_columns)
        dk = self._round(block, visit, torch.add)
        dq = total["dq"] if total["dq"] is not None else none
        if one_gradient and dk is not None:
            dq, dk = dq.add_(dk), None
        dscale = total["dscale"] if total["dscale"] is not None else none
        return Gradients(dq, none if dk is None else dk, dscale, total["dbias"])

    def loss(self, problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
        """Both rounds; only the first where no gradient is wanted."""
        wanted = int("".join(str(int(need)) for need in needs))
        more: dict[str, int | str] = {"gradients wanted": wanted, "loss, penalty, reduction, weight": tail.code}
        found = self.stats(problem, **more)
        none = problem.q.new_empty(0, dtype=found.rows.dtype)
        if not any(needs):
            return found, Gradients(none, none, none)
        unit = tail.unit(problem.n * tail.per_row(problem.spec))
        return found, self.grads(problem, found, defaults.slopes(problem, tail, found, unit, 1.0), needs)

    def _rounded(self, problem: Problem) -> Problem:
        """Its keys as the other processes see them: every score is that of the same key, wherever its row lies."""
        wire = self.peers.wire_dtype
        if wire is None or wire == problem.k.dtype:
            return problem
        return problem._replace(k=problem.k.to(wire).to(problem.k.dtype), shared=False)

    def _block(self, problem: Problem) -> KeyBlock:
        wire = self.peers.wire_dtype or problem.k.dtype
        return KeyBlock(problem.k.to(wire).contiguous(), problem.column_ids, problem.guide_k)

    def _round(
        self,
        block: KeyBlock,
        visit: Callable[[bool, KeyBlock], Tensor | None],
        merge: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor | None:
        """Every block visits every process; its accumulator, merged in the visits' order, returns to its owner."""
        size = self.peers.size
        accumulator: Tensor | None = None
        for step in range(size):
            following = block if step < size - 1 else None
            behind = accumulator if step else None
            works, came, so_far = self._pass_on(following, behind)
            part = visit(step == 0, block)
            self._wait(works)
            accumulator = part if so_far is None or part is None else merge(so_far, part)
            block = came or block
        works, _, total = self._pass_on(None, accumulator)
        self._wait(works)
        return total

    def _pass_on(
        self, block: KeyBlock | None, accumulator: Tensor | None
    ) -> tuple[list[Any], KeyBlock | None, Tensor | None]:
        """Begin to send to the next process, and to receive the same from the one before."""
        sent = [*(block or ()), accumulator]
        came = [None if x is None else torch.empty_like(x) for x in sent]
        group, ops = self.peers.group, []
        for tag, (out, into) in enumerate(zip(sent, came, strict=True)):
            if out is None or into is None:
                continue
            ends = (dist.isend, out.contiguous(), 1), (dist.irecv, into, -1)
            for act, x, way in ends:
                peer = (self.peers.rank + way) % self.peers.size
                ops.append(dist.P2POp(act, x, group=group, tag=tag, group_peer=peer))
        with lost("the ring", self.peers.timeout_s):
            works = dist.batch_isend_irecv(ops) if ops else []
        return works, None if block is None else KeyBlock(*came[:-1]), came[-1]  # type: ignore[arg-type]

    def _wait(self, works: list[Any]) -> None:
        on_host = "cpu" in {device.type for device in self.peers.group._device_types}
        for work in works:
            finish("the ring", self.peers.timeout_s, partial(_same, work), host=on_host)


def _visited(problem: Problem, block: KeyBlock) -> Problem:
    """The rows against another process's keys: no row is among them, and none has a positive there but by its label."""
    spec, p = problem.spec, max(1, problem.spec.n_pos)
    labels = isinstance(spec.layout, Labels)
    positives = problem.positives
    if not labels and positives is None:
        positives = problem.q.new_zeros(
            problem.n, p * spec.n_widths, dtype=torch.promote_types(problem.q.dtype, torch.float32)
        )
    return problem._replace(
        k=block.k.to(problem.k.dtype),
        spec=replace(spec, layout=spec.layout if labels else Separate(p), drop_self=False, unit_norm=False),
        offset=0,
        positives=positives,
        row_ids=problem.row_ids if labels else None,
        column_ids=block.column_ids,
        guide_k=block.guide,
        shared=False,
    )


def _same(work: Any) -> Any:
    return work


def backend(problem: Problem, requested: str, choose: Choose) -> tuple[str, Backend]:
    """The name and backend of what `code` wrote.

    Raises:
        ValueError, RuntimeError: as `choose`.
    """
    peers, inner = parse(requested)
    ring = Ring(peers, problem, inner, choose)
    return f"{MARK}, {ring.name}", cast(Backend, ring)
