"""Double backward: the forward once more in differentiable torch, which autograd then differentiates as often as asked.

The ops' gradients leave with the forward and carry no graph. A backward under `create_graph=True` that was asked of
the backend "chunked" comes here instead: strips of rows, not kept by the forward and computed anew in the backward.
The gradients that it returns hold the graph of all of them, so memory grows with N·M from there on, as in eager torch.
Slower than any kernel, and exact to any order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_nce.core import atoms, prefixes, workspace
from fused_nce.core.problem import Problem
from fused_nce.core.spec import Separate
from fused_nce.core.statistics import STATISTIC, Scores, poison
from fused_nce.core.tails import Tail

BUFFERS = 24  # score-sized tensors that a strip's graph holds


def check_asked_for(backend: str, inputs_kept: bool) -> None:
    """A double backward that can be served.

    Raises:
        RuntimeError: for another backend than "chunked", or a loss that kept no inputs.
    """
    if (backend or os.environ.get("FUSED_NCE_BACKEND", "")) != "chunked":
        raise RuntimeError(
            "fused_nce: double backward (create_graph=True) is not supported: the gradients leave with the forward "
            "and carry no graph of their own; backend='chunked' has one"
        )
    if not inputs_kept:
        raise RuntimeError(
            "fused_nce: double backward (create_graph=True) is not supported by a loss that lets its bank change "
            "before the backward (parts=False): it keeps no inputs"
        )


def gradients(
    outputs: Sequence[Tensor], upstream: Sequence[Tensor | None], leaves: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """d outputs / d leaf, with a graph; None where not wanted."""
    pairs = [(y, g) for y, g in zip(outputs, upstream, strict=True) if g is not None and y.requires_grad]
    wanted = [cast(Tensor, x) for x, need in zip(leaves, needs, strict=True) if need]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs:
        ys, gs = zip(*pairs, strict=True)
        grads = torch.autograd.grad(ys, wanted, gs, create_graph=True, allow_unused=True)
    found = iter(grads)
    return [next(found) if need else None for need in needs]


def statistics(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(N, P) positives, (S, N) row and (S', M) column statistics, differentiable in what the problem is made of."""
    if problem.spec.prefixes:
        each = [statistics(part) for part in prefixes.problems(problem)]
        return torch.cat([x for x, *_ in each], dim=1), torch.cat([x for _, x, _ in each]), each[0][2]
    p, wide = problem, torch.promote_types(problem.q.dtype, torch.float32)
    strip = max(1, workspace.limit_bytes(p.q.device.type) // (p.m * wide.itemsize * BUFFERS))
    if p.spec.columns:
        strip = p.n  # a merge of two empty parts has no derivative
    parts = [
        checkpoint(_strip, p, slice(i, min(i + strip, p.n)), wide, use_reentrant=False, preserve_rng_state=False)
        for i in range(0, p.n, strip)
    ]
    pos, rows, columns = zip(*parts, strict=True)
    return torch.cat(pos), torch.cat(rows, dim=1), columns[0]


def _strip(p: Problem, rows: slice, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    here, every, spec = range(rows.start, rows.stop), range(p.m), p.spec
    q, k = p.q[rows].to(wide), p.k.to(wide)
    r = q @ k.T
    s = p.scale * (atoms.to_half_distances(r, q, k) if spec.distance else r)
    of = atoms.sets(p, here, every, r)
    t = atoms.transformed(p, s, r, of)
    x = Scores(s, t, of)
    pos = t[:, :0]
    if isinstance(spec.layout, Separate):
        pos = cast(Tensor, p.positives)[rows]
    elif spec.n_pos:
        pos = t.gather(1, atoms.positive_columns(p, here))
    down = _fold(spec.columns, x, 0) if spec.columns else s.new_empty(0, p.m)
    return pos, atoms.merge_tiles(spec.stats, [_fold(spec.stats, x, 1)]), down


def _fold(names: Sequence[str], x: Scores, dim: int) -> Tensor:
    """`atoms.fold_tile`, but an empty set has no derivative: that of log 0 is a NaN, which no mask stops twice."""
    found = []
    for name in names:
        stat = STATISTIC[name]
        if stat.merge is None:
            found.append(stat.value(x, dim))  # linear in the scores, with no log in it
            continue
        inside, scores = getattr(x.of, stat.over), x.s if stat.of == "s" else x.t
        some = inside.any(dim, keepdim=True)
        value = stat.fold(scores.masked_fill(~inside, stat.empty), dim)
        # fault: double-backward-empty
        value = torch.where(some.squeeze(dim), value, stat.fold(torch.full_like(scores, stat.empty), dim))
        found.append(value + poison(x.s, dim) if stat.poisoned else value)
    return torch.stack(found)


def loss(problem: Problem, tail: Tail, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nce, penalty) of differentiable statistics."""
    pos, rows, columns = found
    at = atoms.at_positives(problem, columns if problem.spec.columns else None)
    return tail.values(problem.spec, pos, rows, at, problem.m)
