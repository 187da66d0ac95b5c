"""What adapters of retrievers share: passages in groups of G a query, of which the first is its positive.

Row i of N queries has passages i·G to i·G + G − 1, and those of all other queries are its negatives too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce.compat.processes import everyone, gradient_times, mean_of_all, world_size
from fused_nce.core.engine import tile_stats
from fused_nce.core.spec import Block, Identity, Spec
from fused_nce.losses.common import check_rows
from fused_nce.losses.info_nce import info_nce


def group_size(q: Tensor, p: Tensor) -> int:
    """G of (N, D) queries and (N·G, D) passages.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    check_rows("q", q, "p", p, same_n=False)
    if not q.shape[0] or p.shape[0] % q.shape[0] or not p.shape[0]:
        raise ValueError(f"p: got {p.shape[0]} passages, need a multiple of the {q.shape[0]} queries")
    return p.shape[0] // q.shape[0]


def in_batch(q: Tensor, p: Tensor, temperature: float, size: int, *, everywhere: bool = False) -> Tensor:
    """The mean InfoNCE of queries among passages, 0-d; row i·size is row i's. `everywhere`: `of_all` the processes."""
    check_rows("q", q, "p", p, same_n=False)
    targets = torch.arange(q.shape[0], device=q.device) * size
    group = everyone() if everywhere else None
    loss = info_nce(q, p, targets, temperature=temperature, group=group).loss
    return of_all(loss) if everywhere else loss


def of_all(loss: Tensor) -> Tensor:
    """The whole batch's loss, with its gradient by this process's rows: what a cross entropy of gathered rows has."""
    return gradient_times(mean_of_all(loss), 1 / world_size())


def scores(q: Tensor, p: Tensor, temperature: float, *, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """(N, G) scores of each query with its own passages, and log Σ e^score over all other passages, (N,)."""
    spec = Spec(Block(group_size(q, p)), Identity(), ("neg_lse",))
    found = tile_stats(q, p, spec, scale=1 / temperature, group=everyone() if everywhere else None)
    return found["pos"], found["neg_lse"]


def one_of(own: Tensor, others: Tensor, i: int = 0) -> Tensor:
    """−log of the probability of passage i among the passages from i on and the others', (N,)."""
    return torch.cat([own[:, i:], others[:, None]], dim=1).logsumexp(dim=1) - own[:, i]  # fault: grouped-earlier-stay
