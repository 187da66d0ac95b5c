"""pytorch-metric-learning's losses, dense, from lists of pairs, in plain torch: as its documentation defines them."""

from __future__ import annotations

import torch
from torch import nn


def pairs(ids, other_ids, itself):
    """(row, column) positives and negatives; row i is column i + itself, no positive of its own."""
    every = [(i, j) for i in range(len(ids)) for j in range(len(other_ids))]
    positive = [(i, j) for i, j in every if ids[i] == other_ids[j] and (itself is None or j != i + itself)]
    return positive, [(i, j) for i, j in every if ids[i] != other_ids[j]]


def reduce(losses, reducer, zero):
    """The mean; under AvgNonZero of those above 0."""
    kept = [x for x in losses if reducer == "mean" or float(x.detach()) > 0]
    return torch.stack(kept).mean() if kept else zero


def scores(q, k, normalize):
    """(N, M) dot products."""
    if normalize:
        q, k = (nn.functional.normalize(x, dim=1) for x in (q, k))
    return q @ k.T


def nt_xent(q, k, positive, negative, temperature, normalize=True, reducer="mean"):
    """Each positive pair among the negatives of its row."""
    s, zero = scores(q, k, normalize) / temperature, 0 * (q.sum() + k.sum())
    if not positive or not negative:
        return zero
    losses = []
    for i, j in positive:
        others = torch.stack([s[a, n] for a, n in negative if a == i] or [zero - torch.inf])
        losses.append(torch.cat((s[i, j][None], others)).logsumexp(0) - s[i, j])
    return reduce(losses, reducer, zero)


def sup_con(q, k, positive, negative, temperature, normalize=True, reducer="nonzero"):
    """Each row's mean log-probability of its positives among all its pairs."""
    s, zero = scores(q, k, normalize) / temperature, 0 * (q.sum() + k.sum())
    if not positive or not negative:
        return zero
    losses = []
    for i in range(len(q)):
        own = [j for a, j in positive if a == i]
        row = own + [n for a, n in negative if a == i]
        losses.append(s[i, row].logsumexp(0) - s[i, own].mean() if own else zero)
    return reduce(losses, reducer, zero)
