"""Deep InfoMax's estimators of local-global mutual information (Hjelm et al. 2019, arXiv:1808.06670).

u = ⟨global, local⟩ of every global vector with every location of every image, without scale or clip. Those of one image
are samples of the joint distribution, the others of the product of the marginals:

- "jsd", equation 4: mean_joint softplus(−u) + mean_product softplus(u), each mean with a weight of 1;
- "dv", equation 2: −mean_joint u + log mean_product e^u, one log for the whole batch;
- "nce", equation 5: every joint pair is classified against the product pairs that share its global vector (anchor
  "global"), its location ("local"), or either, averaged ("both").
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.group import Group, peers
from fused_nce.core.spec import Block, Identity, Spec
from fused_nce.core.statistics import deficit, softplus
from fused_nce.core.tails import Nce, fixed_sum
from fused_nce.losses.common import dense_nce, fixed_lse, fixed_mean, log_count, output
from fused_nce.losses.heard import heard
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register

ESTIMATORS = ("jsd", "dv", "nce")
ANCHORS = ("global", "local", "both")


@heard
def dim_mi(
    local: Tensor,  # (B, L, D)
    global_: Tensor,  # (B, D) or (B, G, D)
    *,
    estimator: str = "jsd",
    anchor: str = "global",
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """The negative of a bound on the information between an image's locations and its global vectors, to be minimised.

    The (B·G, B·L) scores are never held. "nce" leaves its gradients with the forward, three GEMMs (four for "both");
    the others, whose terms are averaged over the batch, cost four.

    Args:
        local: (B, L, D), L locations of each image; float64, 32, 16 or bfloat16.
        global_: (B, D), or (B, G, D) for several global vectors an image; same dtype and device.
        estimator: "jsd", "dv" or "nce".
        anchor: of "nce", "global", "local" or "both"; the others have none.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats. `stats` has pos_mean; of "dv" and "nce" `mi_bound`, a lower bound on the information; of
        "jsd" `js_bound`, one on the Jensen-Shannon divergence of joint and product. DIM's own code reports "jsd" less
        2·log 2.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed. One image has no product pairs:
            "jsd" and "dv" refuse it, of "nce" it costs 0, with a warning.

    Example:
        ```
        dim_mi(torch.randn(8, 49, 16), torch.randn(8, 16), estimator="nce").loss
        ```
    """
    checks.check_tensor("local", local, ("B", "L", "D"))
    several = isinstance(global_, Tensor) and global_.dim() == 3
    checks.check_tensor("global_", global_, ("B", "G", "D") if several else ("B", "D"))
    checks.check_pair("local", local, "global_", global_)
    if global_.shape[0] != local.shape[0]:
        raise ValueError(f"global_: got B = {global_.shape[0]}, need local's {local.shape[0]}")
    _check_settings(estimator, anchor)
    if estimator == "nce":
        return _nce(local, global_, anchor, group, backend)
    return _divergence(local, global_, estimator, group, backend)


def _check_settings(estimator: str, anchor: str) -> None:
    checks.check_choice("estimator", estimator, ESTIMATORS)
    checks.check_choice("anchor", anchor, ANCHORS)
    if estimator != "nce" and anchor != "global":
        raise ValueError(f"anchor: got {anchor!r} with estimator={estimator!r}, which has none, need the default")


def _nce(local: Tensor, global_: Tensor, anchor: str, group: Group, backend: str | None) -> NCEOutput:
    """Global vectors as rows and locations as columns, or the other way; "both" reads rows and columns of one sweep."""
    rows, columns = (local, global_) if anchor == "local" else (global_, local)
    d = local.shape[2]
    n_rows, n_columns = (x.shape[1] if x.dim() == 3 else 1 for x in (rows, columns))
    spec = Spec(Block(n_columns, n_rows), Identity(), Nce().stats, ("neg_lse",) if anchor == "both" else ())
    parts = tile_loss(rows.reshape(-1, d), columns.reshape(-1, d), spec, Nce(), group=group, backend=backend)
    return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)


def _divergence(local: Tensor, global_: Tensor, estimator: str, group: Group, backend: str | None) -> NCEOutput:
    """Of "jsd" and "dv", whose two means are over the whole batch: no row has a loss of its own."""
    images, n_c, d = local.shape
    n_global = global_.shape[1] if global_.dim() == 3 else 1
    everyone = peers(group)
    world = everyone.size if everyone is not None else 1
    if images * world == 1:
        raise ValueError(f"local: got B = 1, need B >= 2 for estimator={estimator!r}: one image has no product pairs")
    n_product = images * (images * world - 1) * n_c * n_global  # of this process's rows
    name = {"jsd": "neg_softplus", "dv": "neg_lse"}[estimator]
    spec = Spec(Block(n_c, n_global), Identity(), (name,))
    found = tile_stats(global_.reshape(-1, d), local.reshape(-1, d), spec, group=group, backend=backend)
    if estimator == "jsd":
        product = fixed_sum(found[name]) / n_product
        loss = fixed_mean(softplus(deficit(0.0, found["pos"]))) + product
        bound = {"js_bound": math.log(2) - loss / 2}
    else:
        total = fixed_lse(found[name])
        if everyone is not None:
            from fused_nce.core.distributed.collectives import gather

            # One log for all: the processes' sums meet, and each owes the others a part of its gradient.
            total = fixed_lse(gather([total[None]], everyone, None)[0])
        loss = total - log_count(world * n_product, total) - fixed_mean(found["pos"])
        bound = {"mi_bound": -loss}
    return output(loss, {"pos_mean": fixed_mean(found["pos"]), **bound})


class DIMLoss(LossModule):
    """Deep InfoMax's bound on the information of local and global vectors (`dim_mi`), its settings kept.

    Args:
        estimator: "jsd", "dv" or "nce".
        anchor: of "nce": "global", "local" or "both".
        group, backend: as in `dim_mi`.

    Shape:
        local: (B, L, D).
        global_: (B, D) or (B, G, D).

    Example:
        ```
        DIMLoss("nce")(torch.randn(8, 49, 16), torch.randn(8, 16)).loss
        ```
    """

    gathers = True

    def __init__(
        self, estimator: str = "jsd", *, anchor: str = "global", group: Group = None, backend: str | None = None
    ) -> None:
        super().__init__(estimator=estimator, anchor=anchor, group=group, backend=backend)
        _check_settings(estimator, anchor)

    def forward(self, local: Tensor, global_: Tensor) -> NCEOutput:
        """`dim_mi` of the batch."""
        return dim_mi(local, global_, **self.kept())


def oracle(local: Tensor, global_: Tensor, *, estimator: str = "jsd", anchor: str = "global") -> Tensor:
    """The loss, dense."""
    d = local.shape[2]
    rows = global_.reshape(-1, d)
    u = dense_scores(rows, local.reshape(-1, d), 1.0)
    image = [torch.arange(len(u)) * len(local) // len(u), torch.arange(u.shape[1]) // local.shape[1]]
    own = image[0][:, None] == image[1]
    if estimator == "jsd":
        zero = u.new_zeros(())
        return torch.logaddexp(zero, -u[own]).mean() + torch.logaddexp(zero, u[~own]).mean()
    if estimator == "dv":
        return u[~own].exp().mean().log() - u[own].mean()
    ways = {"global": dense_nce(u, own, ~own).mean(), "local": dense_nce(u.T, own.T, ~own.T).mean()}
    return (ways["global"] + ways["local"]) / 2 if anchor == "both" else ways[anchor]


def _entry(*global_shape: int, **options: Any) -> Entry:
    def draw(seed: int, size: Size) -> dict[str, Any]:
        local = features(seed, size.n, size.p, size.d)
        return {"local": local, "global_": features(seed + 1, size.n, *global_shape, size.d), **options}

    formulas = {
        "jsd": "mean_joint softplus(−u) + mean_product softplus(u)",
        "dv": "−mean_joint u + log mean_product e^u",
        "nce": "mean_joint −log(e^u / (e^u + Σ_product e^u))",
    }
    return Entry(
        dim_mi,
        DIMLoss,
        formulas[options["estimator"]],
        "Hjelm et al. 2019, arXiv:1808.06670",
        draw,
        oracle,
    )


for _estimator in ESTIMATORS:
    register(_entry(estimator=_estimator), "" if _estimator == "jsd" else _estimator)
    register(_entry(2, estimator=_estimator), f"{_estimator}, several globals")
register(_entry(estimator="nce", anchor="local"), "nce, local")
register(_entry(2, estimator="nce", anchor="local"), "nce, local, several globals")
register(_entry(2, estimator="nce", anchor="both"), "nce, both, several globals")
