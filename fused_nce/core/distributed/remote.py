"""A problem whose columns lie on several processes, as one that this process can solve: all keys, its own rows.

Every process has the same numbers of rows and keys, gathered by rank. So process r's images, targets and rows
themselves are where they were, plus r times one process's: the layout's offset says it, and no loss knows of processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.distributed.collectives import gather
from fused_nce.core.distributed.processes import dtype_number, settings
from fused_nce.core.group import Peers
from fused_nce.core.ops import Scores
from fused_nce.core.spec import Block, Index, Layout, Several, Spec


def agreement(x: Scores, peers: Peers, tail: str | None) -> dict[str, int | str]:
    """What the processes must have in common, numbers first."""
    n, d = x.q.shape
    # Where one process differentiates its keys and another does not, the backward would wait for ever.
    grad = torch.is_grad_enabled() and x.keys.requires_grad
    sizes = {"N": n, "M": x.keys.shape[0], "D": d, "dtype": dtype_number(x.keys), "keys' requires_grad": int(grad)}
    return sizes | settings(peers, x.scale if x.scale_tensor is None else x.scale_tensor, x.spec, tail)


def spread(x: Scores, spec: Spec, peers: Peers, tail: str | None = None) -> list[Scores]:
    """The rows against the keys of all processes; with column statistics, also the keys against the rows of all.

    A loss that classifies both ways is two such sweeps: the statistics of a column whose rows lie elsewhere are those
    of a row in the other.

    Raises:
        ValueError: the processes disagree, a target is out of this process's range, or filters meet column statistics.
        ProcessLostError: one does not come.
    """
    both = bool(spec.columns)
    if both and spec.filters:
        raise ValueError(f"group: got columns {spec.columns} with the filters {spec.filters}, need one of the two")
    rows = [x.q] if both else []
    beside = {name: y for name in ("column_ids", "guide_k") if (y := getattr(x, name)) is not None}  # the keys
    k, *rest = gather([x.keys, *rows, *beside.values()], peers, agreement(x, peers, tail))
    found: dict[str, Any] = dict(zip(beside, rest[len(rows) :], strict=True))
    there = x._replace(k=k, **found)
    if not both:
        return [_shifted(there, spec, peers)]
    one_way = replace(spec, columns=())
    other, back = _transposed(x, one_way)
    return [
        _shifted(there._replace(spec=one_way.code), one_way, peers),
        _shifted(other._replace(k=rest[0], spec=back.code), back, peers),
    ]


def _transposed(x: Scores, spec: Spec) -> tuple[Scores, Spec]:
    """Keys as rows; what they are compared with, the rows of all, is for the caller to add.

    Raises:
        ValueError: where a key has no row, so that its direction would have another mean.
    """
    n, m = x.q.shape[0], x.keys.shape[0]
    layout: Layout = Index()
    if isinstance(spec.layout, Block):
        layout = Block(spec.layout.rows_per_image, spec.layout.n_c)
        paired = x.offset == 0 and n * spec.layout.n_c == m * spec.layout.rows_per_image
    else:
        paired = n == m
    if not paired:
        raise ValueError(f"group: got N = {n}, M = {m}, offset = {x.offset}, need one image of rows for each of keys")
    row_ids = x.row_ids.argsort() if x.row_ids is not None else None  # of a permutation, its inverse
    return x._replace(q=x.keys, row_ids=row_ids), replace(spec, layout=layout)


def _shifted(x: Scores, spec: Spec, peers: Peers) -> Scores:
    """Ids and offset among the keys of all processes, from those among its own."""
    m = x.keys.shape[0] // peers.size
    before = peers.rank * m
    unit = spec.layout.n_c if isinstance(spec.layout, Block) else 1
    row_ids = x.row_ids
    if isinstance(spec.layout, Index):
        targets = cast(Tensor, row_ids)
        if targets.device.type == "cpu" and not torch.compiler.is_compiling():
            checks.check_targets(targets, m, x.offset if spec.drop_self else None)
        # One that is out of this process's range must not become another process's key.
        row_ids = torch.where((targets < 0) | (targets >= m), m * peers.size, targets + before)
    elif isinstance(spec.layout, Several):
        row_ids = torch.where(cast(Tensor, row_ids) < 0, -1, cast(Tensor, row_ids) + before)
    return x._replace(row_ids=row_ids, offset=x.offset + before // unit)


def back_at(spec: Spec, nce: Tensor, x: Scores) -> Tensor:
    """Elements of the keys' direction, (M, P'), where the rows' direction has them, (N, P)."""
    if isinstance(spec.layout, Block):
        n_c, per_image = spec.layout.n_c, spec.layout.rows_per_image
        return nce.view(-1, n_c, per_image).transpose(1, 2).reshape(-1, n_c)
    return nce[cast(Tensor, x.row_ids)]
