"""InfoNCE (van den Oord, Li, Vinyals 2018, arXiv:1807.03748).

Each query is classified among all keys, of which one is its own: mean_i −log(e^(s_i,t(i)) / Σ_j e^(s_ij)),
s = ⟨q, k⟩ / temperature. `symmetric` averages it with the same of every key among all queries (Radford et al. 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.group import Group
from fused_nce.core.spec import Block, Identity, Index, Spec, TanhClip, cached
from fused_nce.core.tails import REDUCTIONS, Nce
from fused_nce.losses.common import check_rows, dense_nce, inverse
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, places, register


def info_nce(
    queries: Tensor,  # (N, D)
    keys: Tensor,  # (M, D)
    targets: Tensor | None = None,  # (N,) int64
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = False,
    symmetric: bool = False,
    clip: float | None = None,
    penalty: float = 0.0,
    reduction: str = "mean",
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """InfoNCE of queries among keys, without holding the (N, M) scores.

    Args:
        queries: (N, D), float64, 32, 16 or bfloat16.
        keys: (M, D), same dtype and device; M = N without targets.
        targets: (N,) int64, the key of each query, among this process's; None is i for query i.
        temperature: of the softmax, > 0; a 0-d tensor is learnable.
        normalize: scale every row to unit norm first.
        symmetric: average with the keys' classification among the queries; needs targets to be a permutation.
        clip: range c of a soft clip c·tanh(s/c) of the scores; None for none.
        penalty: λ of λ·mean(s²) over all scores, before the clip.
        reduction: of `nce`: "mean", "sum", or "none" for (N,). The penalty stays a mean.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, float32 (float64 for float64 inputs), in nats; chance is log M. `stats` is of the queries' direction:
        top1, pos_mean, neg_lse_mean, nce_minus_chance, mi_bound.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    check_rows("queries", queries, "keys", keys, same_n=targets is None)
    n, m = queries.shape[0], keys.shape[0]
    if clip is not None:
        checks.check_number("clip", clip, above=0)
    checks.check_number("penalty", penalty, at_least=0)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    if targets is not None:
        checks.check_ids("targets", targets, n, "N", queries.device)
        if symmetric:
            _check_permutation(targets, m)
    tail = Nce(float(penalty), reduction)
    spec = _spec(targets is not None, None if clip is None else float(clip), tail.stats, symmetric, normalize)
    scale = inverse("temperature", temperature, queries.device)
    parts = loss_of(
        *(queries, keys, spec, tail),
        scale=scale,
        row_ids=targets,
        normalize=normalize,
        group=group,
        backend=backend,
    )
    nce = parts.nce.squeeze(1) if reduction == "none" else parts.nce
    return NCEOutput(parts.loss, nce, parts.penalty, parts.report)


@cached
def _spec(targets: bool, clip: float | None, stats: tuple[str, ...], symmetric: bool, normalize: bool) -> Spec:
    """The C++ kernels compute neg_lse, neg_max and square at once; `square` costs the others a pass."""
    transform = Identity() if clip is None else TanhClip(clip)
    layout, columns = Index() if targets else Block(1), ("neg_lse",) if symmetric else ()
    return Spec(layout, transform, stats, columns, unit_norm=normalize)


def _check_permutation(targets: Tensor, m: int) -> None:
    """Each key the target of one query. Only a CPU's targets are read; a GPU checks its own, without a wait."""
    if targets.shape[0] != m:
        raise ValueError(f"targets: got N = {targets.shape[0]} for M = {m} keys, need a permutation for symmetric=True")
    whole = (targets.sort().values == torch.arange(m, device=targets.device)).all()
    need = "targets: got one key twice or none, need a permutation for symmetric=True"
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(whole):
            raise ValueError(need)
    else:
        torch._assert_async(whole, need)


class InfoNCELoss(nn.Module):
    """InfoNCE of queries among keys (`info_nce`), its settings kept; the temperature may be learned.

    Args:
        temperature: a number > 0; the start where it is learned.
        learnable: make it a parameter, `log_scale` = log(1 / temperature), 0-d.
        options: `normalize`, `symmetric`, `clip`, `penalty`, `reduction`, `group` and `backend` of `info_nce`.

    Shape:
        queries: (N, D).
        keys: (M, D).
        targets: (N,) int64, the key of each query; i for query i if left out.

    Example:
        ```
        InfoNCELoss(learnable=True)(torch.randn(8, 16), torch.randn(8, 16)).loss
        ```
    """

    def __init__(self, temperature: float = 0.1, *, learnable: bool = False, **options: Any) -> None:
        super().__init__()
        checks.check_number("temperature", temperature, above=0)
        self.temperature, self.options = temperature, options
        self.log_scale = nn.Parameter(-torch.tensor(float(temperature)).log()) if learnable else None

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"temperature={self.temperature}, learnable={self.log_scale is not None}, {self.options}"

    def forward(self, queries: Tensor, keys: Tensor, targets: Tensor | None = None) -> NCEOutput:
        """`info_nce` of the batch."""
        temperature = self.temperature if self.log_scale is None else (-self.log_scale).exp()
        return info_nce(queries, keys, targets, temperature=temperature, **self.options)


def oracle(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = False,
    clip: float | None = None,
    penalty: float = 0.0,
) -> Tensor:
    """The loss, dense."""
    s = dense_scores(queries, keys, 1 / temperature)
    t = s if clip is None else clip * torch.tanh(s / clip)
    places = torch.arange(len(queries)) if targets is None else targets
    own = places[:, None] == torch.arange(len(keys))
    there = dense_nce(t, own, ~own).mean()
    both = (there + dense_nce(t.T, own.T, ~own.T).mean()) / 2 if symmetric else there
    return both + penalty * s.square().mean()


def _entry(**options: Any) -> Entry:
    def draw(seed: int, size: Size) -> dict[str, Any]:
        n, m = size.n, size.m if options.get("targets") and not options.get("symmetric") else size.n
        found = {"queries": features(seed, n, size.d), "keys": features(seed + 1, m, size.d), **options}
        if options.get("targets"):
            permuted = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            found["targets"] = permuted if options.get("symmetric") else places(seed, m, n)
        if options.get("temperature") is None:
            found["temperature"] = torch.tensor(0.7)
        return found

    return Entry(
        "info_nce",
        info_nce,
        InfoNCELoss,
        "mean_i −log(e^(s_i,t(i)) / Σ_j e^(s_ij))",
        "van den Oord et al. 2018, arXiv:1807.03748",
        draw,
        oracle,
    )


register(_entry(temperature=0.5))
register(_entry(), "learned temperature")
register(_entry(temperature=0.4, targets=True, clip=5.0, penalty=0.03), "targets, clip, penalty")
register(_entry(symmetric=True), "symmetric")
register(_entry(symmetric=True, targets=True, temperature=0.3, penalty=0.1), "symmetric, targets, penalty")
