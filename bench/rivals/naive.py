"""AMDIM's loss in the order its authors' code computes it, in today's torch: each step on the whole score tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def amdim_nce(
    a,  # (n_a, D) antecedents
    c,  # (n_a, n_c, D) consequents
    clip: float,
    penalty: float,
) -> Tensor:
    """NCE with a soft clip, own image masked out of the negatives, and λ·mean(s²) on the raw scores."""
    n_a, d = a.shape
    own = torch.eye(n_a, dtype=torch.float32, device=a.device)[:, :, None].expand(-1, -1, c.shape[1])  # (n_a, n_a, n_c)
    other = 1.0 - own
    raw = torch.mm(a, c.flatten(0, 1).T).float().reshape(n_a, n_a, -1) / d**0.5
    square = penalty * (raw**2).mean()
    score = clip * torch.tanh(raw / clip)
    pos = (own * score).sum(dim=1)  # (n_a, n_c)
    neg = (other * score - clip * own).flatten(1)  # (n_a, n_a·n_c), the own image at the clip's floor
    peak = neg.amax(dim=1, keepdim=True)
    mass = (other.flatten(1) * torch.exp(neg - peak)).sum(dim=1, keepdim=True)
    shifted = pos - peak
    log_softmax = shifted - torch.log(torch.exp(shifted) + mass)
    return square - log_softmax.mean()
