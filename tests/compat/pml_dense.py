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


def distances(q, k, normalize, similar):
    """(N, M) Euclidean distances by the differences, or similarities, negated: the nearer the smaller."""
    if similar:
        return -scores(q, k, normalize)
    if normalize:
        q, k = (nn.functional.normalize(x, dim=1) for x in (q, k))
    return (q[:, None] - k + 0 * q.sum()).square().sum(2).clamp(min=1e-30).sqrt()


def contrastive(q, k, positive, negative, pos_margin, neg_margin, normalize=True, similar=False, reducer="nonzero"):
    """The two hinges' means."""
    d, zero = distances(q, k, normalize, similar), 0 * (q.sum() + k.sum())
    sign = -1 if similar else 1
    own = [torch.relu(d[i, j] - sign * pos_margin) for i, j in positive]
    others = [torch.relu(sign * neg_margin - d[i, j]) for i, j in negative]
    return reduce(own, reducer, zero) + reduce(others, reducer, zero)


def triplet(q, k, positive, negative, margin, normalize=True, similar=False, reducer="nonzero"):
    """The mean over all triplets."""
    d, zero = distances(q, k, normalize, similar), 0 * (q.sum() + k.sum())
    hinges = [torch.relu(margin + d[a, p] - d[a, n]) for a, p in positive for i, n in negative if i == a]
    return reduce(hinges, reducer, zero)
