"""CPC's InfoNCE of several prediction steps (van den Oord, Li, Vinyals 2018, arXiv:1807.03748, equation 4).

A context predicts what comes s steps later by a matrix of its own, s_ij = ⟨W_s c_i, z_j⟩ without normalisation or
temperature. Each prediction is classified among the targets of its step, its own being the positive; the steps are
averaged. Nothing crosses steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import loss_of, tile_stats
from fused_nce.core.gathered import gathered_scores
from fused_nce.core.group import Group
from fused_nce.core.spec import Block, Labels, Spec
from fused_nce.core.statistics import deficit, softplus
from fused_nce.core.tails import Nce
from fused_nce.losses.common import dense_nce, exposed, fixed_mean, widened
from fused_nce.losses.heard import heard
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, ids, places, register

BATCH = Spec(Block(1), stats=Nce().stats)
# The columns of a row's sequence are its `pos` set: less the row itself, they are the negatives.
NEGATIVES = ("batch", "sequence")
Step = tuple[Tensor, dict[str, Tensor]]  # a loss and its detached stats
SEQUENCE = Spec(Labels(), stats=("pos_lse", "pos_max"), drop_self=True)


@heard
def cpc_nce(
    predictions: Tensor,  # (S, N, D), W_s c_i
    targets: Tensor,  # (S, N, D), z_(i+s)
    *,
    weights: Sequence[float] | None = None,
    negatives: str | Tensor = "batch",  # or (N, m) int64
    groups: Tensor | None = None,  # (N,) int64
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """Σ_s w_s·mean_i −log(e^(s_ii) / (e^(s_ii) + Σ_neg e^(s_ij))) / Σ_s w_s, without holding the (S, N, N) scores.

    Args:
        predictions: (S, N, D), of S steps and N positions (of all sequences); float64, 32, 16 or bfloat16.
        targets: (S, N, D), what each is a prediction of; same dtype and device.
        weights: S numbers >= 0, not all 0; None is the mean over the steps.
        negatives: "batch", all other targets of the step; "sequence", those of the row's own group, which costs the
            scores of the whole batch, and one GEMM more; or (N, m) int64, each row's own sample of the N targets, the
            same in every step. What is sampled counts as often as it comes, the row's own target too.
        groups: (N,) int64, the sequence of each position; needed by "sequence", and by nothing else.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats. `stats` is the plain mean over the steps, and "step0/top1" etc. of each; "sequence" and
        samples have top1 and pos_mean, and samples nce_minus_chance and mi_bound, by the chance level log(1 + m). A
        position without negatives costs 0.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        cpc_nce(torch.randn(3, 32, 16), torch.randn(3, 32, 16)).loss
        ```
    """
    checks.check_tensor("predictions", predictions, ("S", "N", "D"))
    checks.check_tensor("targets", targets, ("S", "N", "D"))
    checks.check_pair("predictions", predictions, "targets", targets)
    if targets.shape != predictions.shape:
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, need predictions's {tuple(predictions.shape)}")
    n_steps, n = predictions.shape[:2]
    columns = None
    if isinstance(negatives, Tensor):
        checks.check_indices("negatives", negatives, n, n, predictions.device)
        _check_alone(group, "a sample", "which is of one process's targets")
        columns = torch.cat((torch.arange(n, device=negatives.device)[:, None], negatives), dim=1)
        negatives = "sample"
    else:
        checks.check_choice("negatives", negatives, NEGATIVES)
    if negatives == "sequence":
        checks.check_ids("groups", groups, n, "N", predictions.device)
        _check_alone(group, "'sequence'", "which lies on one process")
    elif groups is not None:
        raise ValueError(f"groups: got a tensor with negatives={negatives!r}, need None, or negatives='sequence'")
    steps = [
        _step(prediction, target, share, groups, columns, group, backend)
        for prediction, target, share in zip(
            predictions.unbind(0), targets.unbind(0), _shares(weights, n_steps), strict=True
        )
    ]
    loss = torch.stack([step for step, _ in steps]).sum()
    means = torch.stack([x for _, found in steps for x in found.values()]).view(n_steps, -1).mean(dim=0)
    stats = dict(zip(steps[0][1], means.unbind(0), strict=True))
    stats |= {f"step{i}/{name}": x for i, (_, found) in enumerate(steps) for name, x in found.items()}
    return NCEOutput(loss, loss, torch.zeros_like(loss), stats)


def _check_alone(group: Group, negatives: str, why: str) -> None:
    if group is not None:
        raise ValueError(f"group: got one with negatives={negatives}, need None: of a sequence or a sample, {why}")


def _shares(weights: Sequence[float] | None, n_steps: int) -> list[float]:
    """Each step's part of the loss; they add up to 1."""
    if weights is None:
        return [1 / n_steps] * n_steps
    tensor, weights = isinstance(weights, Tensor), checks.checked_items("weights", weights)
    if tensor or len(weights) != n_steps:
        seen = "a tensor" if tensor else f"{len(weights)} of them"
        raise ValueError(f"weights: got {seen}, need a number for each of S = {n_steps} steps")
    for weight in weights:
        checks.check_number("weights", weight, at_least=0)
    total = sum(map(float, weights))
    if not total > 0:
        raise ValueError(f"weights: got {tuple(weights)}, need one > 0")
    return [float(weight) / total for weight in weights]


def _step(
    prediction: Tensor,
    target: Tensor,
    share: float,
    groups: Tensor | None,
    columns: Tensor | None,  # (N, 1 + m), the row's own first
    group: Group,
    backend: str | None,
) -> Step:
    """`share` times one step's loss, of (N, D) predictions and targets."""
    if columns is not None:
        s = exposed(gathered_scores(prediction, target, columns, backend=backend))
        own, others = s[:, 0], s[:, 1:]
        chance = math.log(columns.shape[1])
        return _classified(own, others.logsumexp(dim=1), others.amax(dim=1), share, chance)  # fault: cpc-sampled-own
    if groups is None:
        parts = loss_of(prediction, target, BATCH, Nce(weight=share), group=group, backend=backend)
        return parts.loss, parts.report
    found = tile_stats(prediction, target, SEQUENCE, row_ids=groups, column_ids=groups, backend=backend)
    with checks.uncast(prediction):
        own = (widened(prediction) * widened(target)).sum(dim=1)
    return _classified(own, found["pos_lse"], found["pos_max"], share)


def _classified(own: Tensor, lse: Tensor, highest: Tensor, share: float, chance: float | None = None) -> Step:
    """Of each row's positive and two statistics of its negatives, (N,) each; chance level where all rows have one."""
    nce = fixed_mean(softplus(deficit(lse, own)))
    stats = {"top1": fixed_mean((own > highest).to(own.dtype)), "pos_mean": fixed_mean(own)}
    if chance is not None:
        stats |= {"nce_minus_chance": nce - chance, "mi_bound": chance - nce}
    return share * nce, {name: x.detach() for name, x in stats.items()}


class CPCLoss(LossModule):
    """CPC's InfoNCE of S prediction steps (`cpc_nce`), its settings kept.

    Args:
        weights: S numbers >= 0 for the steps; None is their mean.
        negatives: "batch" or "sequence".
        group, backend: as in `cpc_nce`.

    Shape:
        predictions, targets: (S, N, D).
        groups: (N,) int64, the sequence of each position, with "sequence" alone.
        negatives: (N, m) int64, a sample of the targets in the place of the setting.

    Example:
        ```
        CPCLoss()(torch.randn(3, 32, 16), torch.randn(3, 32, 16)).loss
        ```
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        *,
        negatives: str = "batch",
        group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(weights=weights, negatives=negatives, group=group, backend=backend)
        checks.check_choice("negatives", negatives, NEGATIVES)
        self.gathers = negatives == "batch"

    def forward(
        self,
        predictions: Tensor,  # (S, N, D)
        targets: Tensor,  # (S, N, D)
        groups: Tensor | None = None,  # (N,)
        negatives: Tensor | None = None,  # (N, m)
    ) -> NCEOutput:
        """`cpc_nce` of the batch, with the negatives sampled where they are given."""
        settings = self.kept()
        if negatives is not None:
            settings["negatives"] = negatives
        return cpc_nce(predictions, targets, groups=groups, **settings)


def oracle(
    predictions: Tensor,
    targets: Tensor,
    *,
    weights: Sequence[float] | None = None,
    negatives: str | Tensor = "batch",
    groups: Tensor | None = None,
) -> Tensor:
    """The loss from the scores of every step against every step, of which a mask keeps each step's own."""
    n_steps, n, d = predictions.shape
    s = dense_scores(predictions.reshape(-1, d), targets.reshape(-1, d), 1.0)
    step = torch.arange(n_steps).repeat_interleave(n)
    kept = step[:, None] == step
    own = torch.eye(len(s), dtype=torch.bool)
    if isinstance(negatives, Tensor):
        sampled = torch.cat([negatives + i * n for i in range(n_steps)])
        # Scores of their own: where a row's own target is sampled too, its two weights are two roundings.
        others = dense_scores(predictions.reshape(-1, d), targets.reshape(-1, d), 1.0).gather(1, sampled)
        rows = -torch.nn.functional.logsigmoid(s.diagonal() - others.logsumexp(dim=1))
    elif negatives == "sequence" and groups is not None:
        kept &= groups.repeat(n_steps)[:, None] == groups.repeat(n_steps)
        rows = dense_nce(s, own, kept & ~own)
    else:
        rows = dense_nce(s, own, kept & ~own)
    each = rows.view(n_steps, n).mean(dim=1)
    w = s.new_tensor(weights or [1.0] * n_steps)
    return (w * each).sum() / w.sum()


def _entry(**options: Any) -> Entry:
    negatives = options.get("negatives")

    def draw(seed: int, size: Size) -> dict[str, Any]:
        shape = size.p, size.n, size.d
        found = {"predictions": features(seed, *shape), "targets": features(seed + 1, *shape), **options}
        if options.get("weights"):
            found["weights"] = tuple(1 / (1 + step) for step in range(size.p))
        if negatives == "sequence":
            found["groups"] = ids(seed, size.n, 1 + size.n // 3)
        if negatives == "sample":
            found["negatives"] = places(seed, size.n, size.n, 2 * size.p)
        return found

    return Entry(
        cpc_nce,
        CPCLoss,
        "mean_s mean_i −log(e^(s_ii) / Σ_j e^(s_ij)), of each step s",
        "van den Oord et al. 2018, arXiv:1807.03748",
        draw,
        oracle,
        two_paths=("predictions", "targets") if negatives == "sequence" else (),
    )


register(_entry())
register(_entry(weights=True), "weights")
register(_entry(negatives="sequence", weights=True), "sequence")
register(_entry(negatives="sample"), "sampled")
