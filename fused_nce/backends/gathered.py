"""Gathered columns in plain torch, a block of rows at a time: the (N, m, D) of them never stand in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_nce.core.problem import GatheredGradients
from fused_nce.core.tails import fixed_sum


class Block(NamedTuple):
    """Rows and columns of the indices, with the gathered rows."""

    rows: slice
    columns: slice
    at: Tensor  # (b·c,) int64, within the M there are
    missing: Tensor  # (b, c) bool, out of range
    k: Tensor  # (b, c, D), wide


def blocks(k: Tensor, indices: Tensor, wide: torch.dtype, limit_bytes: int | None) -> Iterator[Block]:
    """Whole rows of the indices, or parts of one, whose gathered rows, wide, and a product of their size fit."""
    (n, m), (size, d) = indices.shape, k.shape
    pair_bytes = d * (2 * wide.itemsize + (k.itemsize if k.dtype != wide else 0)) + 9
    pairs = n * m if limit_bytes is None else max(1, limit_bytes // pair_bytes)
    strip, panel = max(1, pairs // m), min(pairs, m)
    for i in range(0, n, strip):
        for j in range(0, m, panel):
            rows, columns = slice(i, min(i + strip, n)), slice(j, min(j + panel, m))
            part = indices[rows, columns]
            at = part.clamp(0, size - 1).flatten()
            yield Block(rows, columns, at, at.view_as(part) != part, k[at].to(wide).view(*part.shape, d))


def scores(q: Tensor, k: Tensor, indices: Tensor, limit_bytes: int | None) -> Tensor:
    """⟨q_i, k_(indices_ij)⟩, (N, m); NaN for an index out of range."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(indices.shape, dtype=wide)
    for block in blocks(k, indices, wide, limit_bytes):
        found = torch.bmm(block.k, q[block.rows, :, None].to(wide)).squeeze(2)
        out[block.rows, block.columns] = found.masked_fill_(block.missing, float("nan"))  # fault: gathered-out-range
    return out


def grads(
    q: Tensor,
    k: Tensor,
    indices: Tensor,
    d: Tensor,
    need_q: bool,
    need_k: bool,
    need_scale: bool,
    limit_bytes: int | None,
) -> GatheredGradients:
    """Σ_j d_ij k_(index_ij), Σ d_ij q_i over all that chose a row of k, Σ d·s; each in an order of the shapes alone."""
    wide = d.dtype
    dq, dk = (x.new_zeros(x.shape if need else (0,), dtype=wide) for x, need in ((q, need_q), (k, need_k)))
    dscale = d.new_zeros(())
    for block in blocks(k, indices, wide, limit_bytes):
        rows, columns = block.rows, block.columns
        w = d[rows, columns].masked_fill(block.missing, float("nan"))
        part = q[rows].to(wide)
        if need_q or need_scale:
            towards = torch.bmm(w[:, None], block.k).squeeze(1)  # Σ_j d_ij k_(index_ij), (b, D)
            dscale += fixed_sum(towards * part) if need_scale else 0  # fault: gathered-learnable-scale
            if need_q:
                dq[rows] += towards  # fault: gathered-last-block
        if need_k:
            pull = torch.mul(w[:, :, None], part[:, None], out=block.k).flatten(0, 1)
            # On a GPU the one adds by atomics, in any order, and the other sorts.
            dk.index_add_(0, block.at, pull) if d.device.type == "cpu" else dk.index_put_((block.at,), pull, True)
    return GatheredGradients(dq, dk, dscale)
