"""AMDIM's loss of mixture features (Bachman, Hjelm, Buchwalter 2019, arXiv:1906.00910, section 3.5).

An image has m antecedents, the components of a mixture, and each consequent is explained by those that explain it best:
the posterior of component j is q_ji = softmax_j(τ·s_ji), s the log-softmax scores of `amdim_nce`. With the posterior's
entropy at its weight 1/τ, Σ_j q_ji·s_ji + H(q_i)/τ is (1/τ)·log Σ_j e^(τ·s_ji), and its gradient q_ji.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import tile_stats
from fused_nce.core.group import Group, peers
from fused_nce.core.spec import Block, Identity, Spec, TanhClip
from fused_nce.core.statistics import deficit, softplus
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.amdim import AMDIMLoss, check_features, check_settings, locations
from fused_nce.losses.common import dense_nce, fixed_mean
from fused_nce.losses.heard import heard
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register


@heard
def amdim_mixture_nce(
    antecedents: Tensor,  # (n_a, m, D)
    consequents: Tensor,  # (n_k, n_c, D)
    *,
    tau: float,
    offset: int = 0,
    scale: float | Tensor | None = None,
    clip: float | None = 20.0,
    penalty: float = 0.04,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """−mean_ai (1/τ)·log Σ_j e^(−τ·nce_aji) + λ·mean s², nce_aji the elements of `amdim_nce`: with m = 1 it is that.

    Costs one score GEMM forward and three in the backward, the (n_a, m, n_k, n_c) scores never held.

    Args:
        antecedents: (n_a, m, D), the m components of each image; float64, 32, 16 or bfloat16.
        consequents: (n_k, n_c, D), the other view's n_c locations of n_k >= n_a images; same dtype and device.
        tau: > 0, how sharply components compete; the entropy of their posterior has weight 1/τ.
        offset: image a is consequents' image a + offset, among this process's own.
        scale: factor of the dot product, > 0; None is 1/√D, a 0-d tensor is learnable.
        clip: range c of the soft clip c·tanh(s/c), in units of the score; None for none.
        penalty: λ of the mean square of all scores, before the clip.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput(loss, nce, penalty, stats), in nats; `nce` is at least −log(m)/τ. `stats` has pos_mean, the mean
        posterior entropy (log m: all alike, 0: one explains all) and best, the mean nce of the best component alone.

    Raises:
        TypeError, ValueError: as `amdim_nce`; tau <= 0.

    Example:
        ```
        amdim_mixture_nce(torch.randn(8, 4, 16), torch.randn(8, 49, 16), tau=1.0).loss
        ```
    """
    check_features(antecedents, consequents, offset)
    if antecedents.dim() != 3:
        raise ValueError(f"antecedents: got shape {tuple(antecedents.shape)}, need (n_a, m, D)")
    check_settings(scale, clip, penalty, antecedents.device)
    checks.check_number("tau", tau, above=0)
    n_a, m, d = antecedents.shape
    spec = Spec(
        Block(consequents.shape[1], m),
        Identity() if clip is None else TanhClip(float(clip)),
        ("neg_lse", "square") if penalty else ("neg_lse",),
    )
    found = tile_stats(
        antecedents.reshape(-1, d),
        consequents.reshape(-1, d),
        spec,
        scale=1 / math.sqrt(d) if scale is None else scale,
        offset=offset,
        group=group,
        backend=backend,
    )
    each = softplus(deficit(found["neg_lse"][:, None], found["pos"])).view(n_a, m, -1)  # −s_aji
    nce = mixture(each, tau)
    square = torch.zeros_like(nce)
    if penalty:
        everyone = peers(group)
        columns = consequents.shape[0] * consequents.shape[1] * (everyone.size if everyone is not None else 1)
        square = fixed_sum(found["square"]) * (penalty / (n_a * m * columns))
    with torch.no_grad():
        log_q = (-tau * each).log_softmax(dim=1)
        stats = {
            "pos_mean": fixed_mean(found["pos"]),
            "entropy": -fixed_sum(log_q.exp() * log_q) * m / log_q.numel(),
            "best": fixed_mean(each.amin(dim=1)),
        }
    return NCEOutput(nce + square, nce, square, {name: x.detach() for name, x in stats.items()})


def mixture(each: Tensor, tau: float) -> Tensor:
    """−mean (1/τ)·log Σ_j e^(−τ·each_aji), 0-d, of losses (n_a, m, n_c)."""
    return fixed_mean((-tau * each).logsumexp(dim=1)) / -tau  # fault: mixture-best-component


class AMDIMMixtureLoss(LossModule):
    """AMDIM's loss with a mixture of m vectors an image (`amdim_mixture_nce`), its settings kept.

    Args:
        tau: > 0, how sharply the components compete.
        scale: factor of the dot product, > 0; None is 1/√D.
        clip: range c of the soft clip; None for none.
        penalty: λ of the mean squared score.
        group, backend: as in `amdim_mixture_nce`.

    Shape:
        antecedents: (n_a, m, D).
        consequents: (n_k, n_c, D), n_k >= n_a.

    Example:
        ```
        AMDIMMixtureLoss(tau=1.0)(torch.randn(8, 4, 16), torch.randn(8, 49, 16)).loss
        ```
    """

    def __init__(
        self,
        tau: float,
        *,
        scale: float | None = None,
        clip: float | None = 20.0,
        penalty: float = 0.04,
        group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(tau=tau, scale=scale, clip=clip, penalty=penalty, group=group, backend=backend)
        checks.check_number("tau", tau, above=0)
        check_settings(scale, clip, penalty, torch.device("cpu"))

    def forward(
        self,
        antecedents: Tensor,  # (n_a, m, D)
        consequents: Tensor,  # (n_k, n_c, D)
    ) -> NCEOutput:
        """`amdim_mixture_nce` of the batch."""
        return amdim_mixture_nce(antecedents, consequents, **self.kept())


class MultiscaleMixtureLoss(nn.Module):
    """`AMDIMLoss` with a mixture for f1: the pairs from f1 by `amdim_mixture_nce`, the others as they were.

    Args:
        pairs: as `AMDIMLoss`; at least one from the map of size 1.
        antecedents: as `AMDIMLoss`, of the other pairs.
        tau: as `amdim_mixture_nce`.
        scale, clip, penalty, group, backend: as `amdim_nce`, of all pairs.

    Shape:
        each view: as `AMDIMLoss`'s, with the components "m1" (B, m, D) in the place of "f1".

    Example:
        ```
        views = [{f"f{s}": torch.randn(8, 16, s, s) for s in (1, 5, 7)} | {"m1": torch.randn(8, 4, 16)} for _ in "12"]
        MultiscaleMixtureLoss()(*views).loss
        ```

    Returns:
        NCEOutput; `stats` has those of the other pairs, and the mean entropy and best of the mixtures.

    Raises:
        ValueError: without a pair from f1; `AMDIMLoss` lists the rest.
    """

    def __init__(
        self,
        pairs: Sequence[str] = ("1>5", "1>7", "5>5"),
        antecedents: str = "sample",
        *,
        tau: float = 1.0,
        scale: float | None = None,
        clip: float | None = 20.0,
        penalty: float = 0.04,
        group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {
            "scale": scale, "clip": clip, "penalty": penalty, "group": group, "backend": backend
        }  # fmt: skip
        AMDIMLoss(pairs, antecedents, **shared)  # its checks
        self.pairs, self.antecedents = tuple(pairs), antecedents
        self.targets = [pair.partition(">")[2] for pair in dict.fromkeys(pairs) if pair.startswith("1>")]
        if not self.targets:
            raise ValueError(f"pairs: got {tuple(pairs)}, need one from map 1, which the mixture stands for")
        others = [pair for pair in pairs if not pair.startswith("1>")]
        self.mixture = AMDIMMixtureLoss(tau, **shared)
        self.others = AMDIMLoss(others, antecedents, **shared) if others else None

    def forward(self, view1: Mapping[str, Tensor], view2: Mapping[str, Tensor]) -> NCEOutput:
        """The loss of two views' maps: pairs summed, both directions averaged."""
        ways = [
            self.mixture(own["m1"], locations(f"f{target}", other))
            for target in self.targets
            for own, other in ((view1, view2), (view2, view1))
        ]
        loss, nce, penalty = (torch.stack(each).sum() / 2 for each in zip(*(out[:3] for out in ways), strict=True))
        stats = {name: torch.stack([out.stats[name] for out in ways]).mean() for name in ("entropy", "best")}
        if self.others is None:
            return NCEOutput(loss, nce, penalty, stats)
        rest = self.others(view1, view2)
        return NCEOutput(loss + rest.loss, nce + rest.nce, penalty + rest.penalty, rest.stats | stats)


def oracle(
    antecedents: Tensor,
    consequents: Tensor,
    *,
    tau: float,
    scale: float | Tensor,
    clip: float | None = 20.0,
    penalty: float = 0.04,
) -> Tensor:
    """The loss, dense, by posteriors and their entropy."""
    (n_a, m, d), (n_k, n_c, _) = antecedents.shape, consequents.shape
    s = dense_scores(antecedents.reshape(-1, d), consequents.reshape(-1, d), scale)
    t = s if clip is None else clip * torch.tanh(s / clip)
    own = (torch.arange(n_a).repeat_interleave(m))[:, None] == torch.arange(n_k * n_c) // n_c
    score = -dense_nce(t, own, ~own).view(n_a, m, n_c)
    q = (tau * score).softmax(dim=1)
    objective = (q * score).sum(dim=1) - (q * q.log()).sum(dim=1) / tau
    return penalty * s.square().mean() - objective.mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "antecedents": features(seed, size.n, 2, size.d),
        "consequents": features(seed + 1, size.n, size.p, size.d),
        "tau": 1.5,
        "scale": torch.tensor(0.41),
        "clip": 4.0,
    }


register(
    Entry(
        amdim_mixture_nce,
        AMDIMMixtureLoss,
        "−mean_ai (1/τ)·log Σ_j e^(−τ·nce_aji) + λ·mean s², nce_aji of amdim_nce",
        "Bachman et al. 2019, arXiv:1906.00910",
        _draw,
        oracle,
    )
)
