"""NT-Xent of SimCLR (Chen, Kornblith, Norouzi, Hinton 2020, arXiv:2002.05709).

2N views, s = ⟨z, z'⟩ / temperature of unit vectors; each is classified among all others but itself, its twin being the
positive. The views are one tensor in both roles: its gradient is (W + Wᵀ)·z.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core.engine import loss_of
from fused_nce.core.group import Group
from fused_nce.core.spec import Block, Spec
from fused_nce.core.tails import Nce
from fused_nce.losses.common import check_rows, dense_nce, inverse
from fused_nce.losses.heard import heard
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register

# Twins side by side are the two columns of one image: no tensor of targets, and the self is left out by arithmetic.
SPEC = Spec(Block(2, 2), stats=Nce().stats, drop_self=True)
UNIT, TAIL = replace(SPEC, unit_norm=True), Nce()


@heard
def nt_xent(
    view0: Tensor,  # (N, D)
    view1: Tensor,  # (N, D)
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """NT-Xent of two views of N images, without holding the (2N, 2N) scores.

    Args:
        view0: (N, D), float64, 32, 16 or bfloat16.
        view1: (N, D), same dtype and device.
        temperature: of the softmax, > 0; a 0-d tensor is learnable.
        normalize: scale every row to unit norm first; False for rows that are.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats; chance is log(2N − 1). One image alone has no negatives: 0, with a warning.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        nt_xent(torch.randn(8, 16), torch.randn(8, 16), temperature=0.1).loss
        ```
    """
    check_rows("view0", view0, "view1", view1, same_n=True)
    scale = inverse("temperature", temperature, view0.device)
    parts = loss_of(
        *(view0, view1, UNIT if normalize else SPEC, TAIL),
        scale=scale,
        normalize=normalize,
        twins=True,
        group=group,
        backend=backend,
    )
    return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)


class NTXentLoss(LossModule):
    """SimCLR's NT-Xent of two views (`nt_xent`), its settings kept.

    Args:
        temperature: of the softmax, > 0.
        normalize: scale every row to unit norm first.
        group, backend: as in `nt_xent`.

    Shape:
        view0, view1: (N, D).

    Example:
        ```
        NTXentLoss(temperature=0.5)(torch.randn(8, 16), torch.randn(8, 16)).loss
        ```
    """

    gathers = True

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        normalize: bool = True,
        group: Group = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(temperature=temperature, normalize=normalize, group=group, backend=backend)
        inverse("temperature", temperature, torch.device("cpu"))

    def forward(self, view0: Tensor, view1: Tensor) -> NCEOutput:
        """`nt_xent` of the batch."""
        return nt_xent(view0, view1, **self.kept())


def oracle(view0: Tensor, view1: Tensor, *, temperature: float | Tensor = 0.5, normalize: bool = True) -> Tensor:
    """The loss, dense, with the views one after the other."""
    z = torch.cat((view0, view1))
    z = nn.functional.normalize(z, dim=1) if normalize else z
    s = dense_scores(z, z, 1 / temperature)
    itself = torch.eye(len(z), dtype=torch.bool)
    twin = itself.roll(len(view0), dims=1)
    return dense_nce(s, twin, ~twin & ~itself).mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    views = features(seed, 2, size.n, size.d, unit=True)
    return {"view0": views[0], "view1": views[1], "temperature": torch.tensor(0.4), "normalize": False}


register(
    Entry(
        nt_xent,
        NTXentLoss,
        "1/2N Σ_i LSE_{j≠i} s_ij − s_i,twin(i)",
        "Chen et al. 2020, arXiv:2002.05709",
        _draw,
        oracle,
    )
)
