"""Triplets of a row's scores without a list of them: sorted within the row, a count a score is all there is to know.

A row's loss Σ max(0, 1 − t_p + t_n), over positives p and negatives n, is linear in the scores between its kinks: it is
Σ_j c_j·t_j plus the number of active triplets, where c_j = dL/dt_j is how many of them j is the negative of, less how
many it is the positive of. Each c_j is a place in a sorted row: O(M log M), where the triplets are O(M²).
"""

from __future__ import annotations

import torch
from torch import Tensor

MININGS = ("all", "semihard")


def counts(mining: str, t: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """c = dL/dt, (N, M): whole numbers.

    Args:
        mining: "all" triplets; or "semihard", of each positive the one with the nearest of the negatives beyond it.
        t: (N, M) scores, in margins.
        pos: (N, M) bool, each row's positives.
        neg: (N, M) bool, its negatives.
    """
    return {"all": _all, "semihard": _semihard}[mining](t, pos, neg)


def _all(t: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """A triplet is active where t_n > t_p − 1: one comparison of two numbers, the same from either side."""
    reach, others = (t - 1).masked_fill(~pos, float("inf")), t.masked_fill(~neg, float("-inf"))
    below = torch.searchsorted(reach.sort(dim=1).values, others)  # positives that a negative is active with
    above = t.shape[1] - torch.searchsorted(others.sort(dim=1).values, reach, right=True)
    return (below - above).to(t.dtype)


def _semihard(t: Tensor, pos: Tensor, neg: Tensor) -> Tensor:
    """Of the negatives with t_n < t_p the largest, active where t_n > t_p − 1.

    A negative's positives are those between it and the next negative, and within its reach: ranges of the sorted row.
    """
    own, others = t.masked_fill(~pos, float("inf")), t.masked_fill(~neg, float("-inf"))
    others, order = others.sort(dim=1, stable=True)
    place = torch.searchsorted(others, own) - 1
    nearest = others.gather(1, place.clamp(min=0))
    chosen = pos & (place >= 0) & (nearest > t - 1)
    own = own.sort(dim=1).values
    last = torch.searchsorted(own - 1, others)
    first = torch.searchsorted(own, others, right=True)
    until = torch.cat((first[:, 1:], pos.sum(dim=1, keepdim=True)), dim=1)
    hits = (torch.minimum(until, last) - first).clamp(min=0)
    return torch.zeros_like(t).scatter_(1, order, hits.to(t.dtype)) - chosen.to(t.dtype)
