"""The supervised contrastive loss (Khosla et al. 2020, arXiv:2004.11362): rows of one label are each other's positives.

s = ⟨z, z'⟩ / temperature of unit vectors, A(i) all rows but i, P(i) those of i's label. Equation 2, the sum outside the
log: −1/|P(i)| Σ_p log(e^(s_ip) / Σ_A e^(s_ia)). Equation 3, inside: −log(1/|P(i)| Σ_p e^(s_ip) / Σ_A e^(s_ia)), never
larger, and worse in the paper. Of temperature/0.07, by which the authors' code multiplies, there is nothing here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.group import Group
from fused_nce.core.spec import Labels, Spec
from fused_nce.core.tails import LogIn, LogOut
from fused_nce.losses import registry
from fused_nce.losses.common import inverse, masked_lse
from fused_nce.losses.heard import heard
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, register

SPEC = Spec(Labels(), stats=LogOut.READS, drop_self=True)
UNIT = replace(SPEC, unit_norm=True)
TAILS = {"out": LogOut(), "in": LogIn()}


@heard
def sup_con(
    features: Tensor,  # (N, D)
    labels: Tensor,  # (N,) int64
    *,
    temperature: float | Tensor = 0.1,
    variant: str = "out",
    normalize: bool = True,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """The supervised contrastive loss of N rows, every view a row of its own, without holding the (N, N) scores.

    Args:
        features: (N, D), float64, 32, 16 or bfloat16.
        labels: (N,) int64, on the features' device; any values.
        temperature: of the softmax, > 0; a 0-d tensor is learnable.
        variant: "out" (equation 2) or "in" (equation 3).
        normalize: scale every row to unit norm first; False for rows that are.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats; the mean over all N rows, of which one without a positive counts as 0. `stats` has top1 (of
        the rows with a positive, those whose nearest other has their label), pos_mean, neg_lse_mean, positives_a_row.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        sup_con(torch.randn(8, 16), torch.arange(8) % 3).loss
        ```
    """
    checks.check_tensor("features", features, ("N", "D"))
    checks.check_ids("labels", labels, features.shape[0], "N", features.device)
    checks.check_choice("variant", variant, tuple(TAILS))
    scale = inverse("temperature", temperature, features.device)
    parts = loss_of(
        *(features, None, UNIT if normalize else SPEC, TAILS[variant]),
        scale=scale,
        row_ids=labels,
        normalize=normalize,
        group=group,
        backend=backend,
    )
    return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)


class SupConLoss(LossModule):
    """Supervised contrastive learning (`sup_con`), its settings kept.

    Args:
        temperature: of the softmax, > 0.
        variant: "out" (the mean over positives outside the log) or "in".
        normalize: scale every row to unit norm first.
        group, backend: as in `sup_con`.

    Shape:
        features: (N, D), all views of all images.
        labels: (N,) int64.

    Example:
        ```
        SupConLoss()(torch.randn(8, 16), torch.arange(8) % 3).loss
        ```
    """

    gathers = True

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        variant: str = "out",
        normalize: bool = True,
        group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature=temperature, variant=variant, normalize=normalize, group=group, backend=backend)
        inverse("temperature", temperature, torch.device("cpu"))
        checks.check_choice("variant", variant, tuple(TAILS))

    def forward(self, features: Tensor, labels: Tensor) -> NCEOutput:
        """`sup_con` of the batch."""
        return sup_con(features, labels, **self.kept())


def oracle(
    features: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.1, variant: str = "out", normalize: bool = True
) -> Tensor:
    """The loss, dense: log softmax_p as a logistic loss against all others, its slope precise where p → 1."""
    z = nn.functional.normalize(features, dim=1) if normalize else features
    s = dense_scores(z, z, 1 / temperature)
    itself = torch.eye(len(z), dtype=torch.bool)
    own = (labels[:, None] == labels) & ~itself
    count = own.sum(dim=1).clamp(min=1)
    if variant == "in":
        log_share = (
            nn.functional.logsigmoid(masked_lse(s, own) - masked_lse(s, ~own & ~itself)) - count.to(s.dtype).log()
        )
        return -torch.where(own.any(dim=1), log_share, 0.0).mean()
    log_p = nn.functional.logsigmoid(s - masked_lse(s[:, None, :], ~itself[:, None, :] & ~itself))
    return -(torch.where(own, log_p, 0.0).sum(dim=1) / count).mean()


def _entry(variant: str) -> Entry:
    def draw(seed: int, size: Size) -> dict[str, Any]:
        return {
            "features": registry.features(seed, size.n, size.d, unit=True),
            "labels": registry.ids(seed, size.n, 1 + size.n // 2),
            "temperature": torch.tensor(0.3),
            "variant": variant,
            "normalize": False,
        }

    formula = {"out": "mean_i −1/|P| Σ_p log softmax_A(s_i)_p", "in": "mean_i −log 1/|P| Σ_p softmax_A(s_i)_p"}
    return Entry(sup_con, SupConLoss, formula[variant], "Khosla et al. 2020, arXiv:2004.11362", draw, oracle)


register(_entry("out"))
register(_entry("in"), "in")
