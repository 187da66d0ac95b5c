"""Weighted nearest-neighbour classification of frozen features, as in NPID (Wu et al. 2018, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fused_nce.core import checks
from fused_nce.mining import top_k

TEMPERATURE = 0.1
METRICS = ("cosine", "l1")
MAX_DISTANCES = 1 << 22  # held at a time


def neighbours_for(bank_size: int) -> int:
    """The number of neighbours for a bank: NPID's 200 from 10,000 images on, 2 % of a smaller bank, at least 5.

    With 200 neighbours out of the 400 digits every class would vote for its whole population.
    """
    return min(200, max(5, bank_size // 50), bank_size)


def nearest(
    bank: Tensor,  # (n, D) features with known labels
    queries: Tensor,  # (m, D)
    k: int,
    chunk: int | None = None,
    *,
    metric: str = "cosine",
) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of each query.

    Args:
        bank: (n, D) features.
        queries: (m, D).
        k: how many.
        chunk: queries at a time; None for what memory is meant for.
        metric: "cosine", or "l1", the sum of absolute differences.

    Returns:
        similarities (m, k), descending (by "l1" distances with a minus), and bank indices (m, k) int64.

    Raises:
        ValueError: the widths differ, k is outside 1..n, or a metric that is none.
    """
    checks.check_choice("metric", metric, METRICS)
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank {tuple(bank.shape)} and queries {tuple(queries.shape)}: need (n, D) and (m, D) of one width D"
        )
    if not 1 <= k <= len(bank):
        raise ValueError(f"k: {k}; need 1 to {len(bank)}, the number of labelled images")
    if metric == "l1":
        strips = queries.float().split(chunk or max(1, MAX_DISTANCES // len(bank)))
        found = [(-torch.cdist(some, bank.float(), p=1)).topk(k, dim=1) for some in strips]  # fault: l1-by-squares
        return torch.cat([near.values for near in found]), torch.cat([near.indices for near in found])
    bank = functional.normalize(bank.float(), dim=1)  # fault: knn-dot-product
    return top_k(functional.normalize(queries.float(), dim=1), bank, k, strip=chunk)


def knn_predict(
    bank: Tensor,  # (n, D)
    labels: Tensor,  # (n,) int64
    queries: Tensor,  # (m, D)
    *,
    k: int | None = None,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Predicts the class with the greatest sum of exp(cosine / temperature) over the k nearest neighbours.

    Args:
        bank: (n, D) features of the labelled images.
        labels: (n,) int64 classes, none negative.
        queries: (m, D) features of the images to classify.
        k: neighbours that vote; `neighbours_for(n)` by default.
        temperature: 0.1 (NPID's CIFAR code); the smaller, the more the nearest one counts.

    Returns:
        (m,) int64 predicted classes.

    Raises:
        ValueError: labels that do not fit the bank, a negative label, a temperature that is not positive.
    """
    if labels.shape != bank.shape[:1]:
        raise ValueError(f"labels: shape {tuple(labels.shape)}; need ({len(bank)},), one a bank row")
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"labels: {int(labels.min())} found; need classes from 0 on")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; need a positive number")
    similarity, index = nearest(bank, queries, neighbours_for(len(bank)) if k is None else k)
    # Shifted by the row's best similarity: the vote is the same, and a small temperature cannot overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    classes, numbers = labels.unique(return_inverse=True)  # a column for each class, not for each number up to the last
    strip = max(1, MAX_DISTANCES // len(classes))
    votes = (
        some.new_zeros(len(some), len(classes)).scatter_add_(1, numbers[near], some)
        for some, near in zip(weight.split(strip), index.split(strip), strict=True)
    )
    return classes[torch.cat([found.argmax(dim=1) for found in votes])]
