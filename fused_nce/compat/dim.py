"""Deep InfoMax's losses (github.com/rdevon/DIM, cortex_DIM/functions/dim_losses.py), on any device.

`l` are locations and `m` global vectors, (N, C, L) and (N, C, M) as upstream has them, or maps (N, C, H, W), or (N, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import tile_stats
from fused_nce.core.spec import Block, Identity, Spec
from fused_nce.core.statistics import deficit, softplus
from fused_nce.losses.common import fixed_lse, fixed_mean, log_count, widened
from fused_nce.losses.dim import dim_mi

MASKED = -10.0  # what upstream sets an image's own pairs to among its negatives, where they should not be
MEASURES = ("GAN", "JSD", "X2", "KL", "RKL", "H2", "W1")


def infonce_loss(l: Tensor, m: Tensor, *, mask: str = "exact") -> Tensor:
    """InfoNCE of each location among those of the other images, for every global vector, 0-d, in nats.

    Args:
        l: (N, C, L).
        m: (N, C, M).
        mask: "exact" leaves an image's own locations out of its negatives; "reference" keeps them at a logit of −10, as
            upstream does, to compare with its figures.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    checks.check_choice("mask", mask, ("exact", "reference"))
    local, global_ = _vectors(l, m)
    if mask == "exact":
        return dim_mi(local, global_, estimator="nce").loss
    found = _scores(local, global_, "neg_lse")
    leak = torch.full_like(found["neg_lse"], MASKED + math.log(local.shape[1]))  # fault: dim-one-pair
    return fixed_mean(softplus(deficit(torch.logaddexp(found["neg_lse"], leak)[:, None], found["pos"])))


def fenchel_dual_loss(l: Tensor, m: Tensor, measure: str | None = None) -> Tensor:
    """E_product − E_joint of an f-divergence's dual, 0-d.

    Only "X2" holds the (N·M, N·L) scores, in plain torch; the others hold none of them.

    Args:
        l: (N, C, L), N >= 2.
        m: (N, C, M).
        measure: "JSD", "GAN" (it plus 2·log 2), "KL", "RKL", "H2", "X2" or "W1".

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
        NotImplementedError: for another measure, as upstream; "DV" is `donsker_varadhan_loss`.
    """
    if measure not in MEASURES:
        raise NotImplementedError(f"measure: got {measure!r}, need one of {', '.join(map(repr, MEASURES))}")
    local, global_ = _vectors(l, m)
    if local.shape[0] < 2:
        raise ValueError(f"l: got N = {local.shape[0]}, need N >= 2: one image has no product pairs")
    if measure in ("JSD", "GAN"):
        return dim_mi(local, global_, estimator="jsd").loss - (2 * math.log(2) if measure == "JSD" else 0.0)
    if measure in ("KL", "H2"):
        found = _scores(local, global_, "neg_lse")
        product = (fixed_lse(found["neg_lse"]) - log_count(_n_product(local, global_), found["neg_lse"])).exp()
        if measure == "KL":  # as since April 2019: before, the joint's term was u + 1 and the product's e^u
            return product / math.e - fixed_mean(found["pos"])
        return product - 1 - fixed_mean(1 - (-found["pos"]).exp())
    if measure == "X2":
        return _dense(local, global_, lambda u: -0.5 * (u.abs() + 1) ** 2) - fixed_mean(_joint(local, global_) ** 2)
    joint = _joint(local, global_)
    linear = _product_sum(local, global_) / _n_product(local, global_)
    return linear - fixed_mean(joint) if measure == "W1" else linear - 1 + fixed_mean((-joint).exp())


def donsker_varadhan_loss(l: Tensor, m: Tensor) -> Tensor:
    """log mean_product e^u − mean_joint u, 0-d: the paper's bound, where upstream's code stops at a shape.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    return dim_mi(*_vectors(l, m), estimator="dv").loss


def _vectors(l: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L, C) and (N, M, C)."""
    found = []
    for name, x in (("l", l), ("m", m)):
        if not isinstance(x, Tensor) or x.dim() < 2:
            seen = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: got {seen}, need (N, C, {name.upper()})")
        found.append((x[..., None] if x.dim() == 2 else x.flatten(2)).transpose(1, 2))
        checks.check_tensor(name, found[-1], ("N", name.upper(), "C"))
    if m.shape[:2] != l.shape[:2]:
        raise ValueError(f"m: got (N, C) = {tuple(m.shape[:2])}, need l's {tuple(l.shape[:2])}")
    return found[0], found[1]


def _scores(local: Tensor, global_: Tensor, statistic: str) -> dict[str, Tensor]:
    """The joint scores as `pos`, (N·M, L), and a statistic of each global vector's product scores."""
    spec = Spec(Block(local.shape[1], global_.shape[1]), Identity(), (statistic,))
    return tile_stats(global_.flatten(0, 1), local.flatten(0, 1), spec)


def _n_product(local: Tensor, global_: Tensor) -> int:
    n = local.shape[0]
    return n * (n - 1) * local.shape[1] * global_.shape[1]


def _joint(local: Tensor, global_: Tensor) -> Tensor:
    """The scores of each image with itself, (N, L, M)."""
    with checks.uncast(local):
        return torch.bmm(widened(local), widened(global_).transpose(1, 2))


def _product_sum(local: Tensor, global_: Tensor) -> Tensor:
    """Σ of all product scores: linear, so the images' sums have it, (N, N) in all."""
    with checks.uncast(local):
        s = widened(global_).sum(dim=1) @ widened(local).sum(dim=1).T
    return s.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), 0).sum()


def _dense(local: Tensor, global_: Tensor, term: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of a term of the product scores, all of which are held."""
    with checks.uncast(local):
        u = torch.einsum("imc,klc->iklm", widened(global_), widened(local))
    own = torch.eye(len(u), dtype=torch.bool, device=u.device)
    return term(u)[~own].mean()
