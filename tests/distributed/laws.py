"""Every loss whose negatives may lie on other processes, as a small network with everything that can be learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_nce import (
    AMDIMLoss,
    amdim_mixture_nce,
    amdim_nce,
    clip_loss,
    cpc_nce,
    dim_mi,
    info_nce,
    nt_xent,
    siglip_loss,
    sup_con,
)
from fused_nce.distributed import Group
from fused_nce.losses.candidates import DIRECTIONS

BATCH, WIDE, D = 24, 6, 5  # the whole batch divides by 1, 2, 3 and 4, and each part by 2


class Net(nn.Module):
    """An encoder that all rows share, and a scale and a bias inside the loss."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(torch.randn(D, WIDE, generator=generator, dtype=torch.float64) / 2)
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))

    def forward(self, name: str, x: Tensor, labels: Tensor, group: Group) -> Tensor:
        """The loss `name` of (B, 4, WIDE) inputs, four of an image."""
        return LAWS[name](self, torch.tanh(x @ self.weight.T), labels, group)

    @property
    def scale(self) -> Tensor:
        """exp(log_scale)."""
        return self.log_scale.exp()


def batch() -> tuple[Tensor, Tensor]:
    """(BATCH, 4, WIDE) inputs and (BATCH,) labels."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(BATCH, 4, WIDE, generator=generator, dtype=torch.float64)
    return x, torch.randint(5, (BATCH,), generator=generator)


def _maps(z: Tensor) -> list[dict[str, Tensor]]:
    """Two views' maps of 1, 2 and 2 locations."""
    columns = z.transpose(1, 2)[..., None]
    return [{"f1": z[:, i], "f5": columns[:, :, 1:3], "f7": columns[:, :, i : i + 2] * 1.3} for i in (0, 1)]


def _swap(z: Tensor) -> Tensor:
    """Targets that pair neighbours: the same rows of the batch, whatever part of it is here."""
    return torch.arange(len(z)) ^ 1


def _parts(net: Net, z: Tensor, y: Tensor, g: Group) -> Tensor:
    out = amdim_nce(z[:, 0], z[:, 1:], scale=net.scale, clip=4.0, penalty=0.3, group=g)
    return 2 * out.nce + 3 * out.penalty


def _dim(net: Net, z: Tensor, g: Group, globals_: int, estimator: str, anchor: str = "global") -> Tensor:
    top = z[:, 0] if globals_ == 1 else z[:, :globals_]
    return dim_mi(z[:, 2:] * net.scale, top, estimator=estimator, anchor=anchor, group=g).loss


LAWS: dict[str, Callable[[Net, Tensor, Tensor, Group], Tensor]] = {
    "amdim_nce": lambda net, z, y, g: amdim_nce(z[:, 0], z[:, 1:], scale=net.scale, clip=4.0, group=g).loss,
    "amdim_nce/rows": lambda net, z, y, g: amdim_nce(z[:, :2], z[:, 2:], clip=None, group=g).loss,
    "amdim_nce/sum": lambda net, z, y, g: amdim_nce(z[:, 0], z[:, 1:], reduction="sum", group=g).loss,
    "amdim_nce/none": lambda net, z, y, g: amdim_nce(z[:, 0], z[:, 1:], reduction="none", group=g).nce.square().mean(),
    "amdim_nce/parts": _parts,
    "amdim_mixture_nce": lambda net, z, y, g: (
        amdim_mixture_nce(z[:, :2], z[:, 2:], tau=1.5, scale=net.scale, clip=4.0, penalty=0.3, group=g).loss
    ),
    "amdim": lambda net, z, y, g: AMDIMLoss(antecedents="all", group=g)(*_maps(z)).loss,
    "info_nce": lambda net, z, y, g: (
        info_nce(z[:, 0], z[:, 1], temperature=1 / net.scale, normalize=True, group=g).loss
    ),
    "info_nce/targets": lambda net, z, y, g: (
        info_nce(
            z[:, 0], z[:, 1:3].flatten(0, 1), 2 * _swap(z), temperature=1 / net.scale, clip=5.0, penalty=0.1, group=g
        ).loss
    ),
    "info_nce/symmetric": lambda net, z, y, g: (
        info_nce(z[:, 0], z[:, 1], temperature=1 / net.scale, symmetric=True, penalty=0.2, group=g).loss
    ),
    "info_nce/symmetric, targets, sum": lambda net, z, y, g: (
        info_nce(z[:, 0], z[:, 1], _swap(z), temperature=1 / net.scale, symmetric=True, reduction="sum", group=g).loss
    ),
    "info_nce/symmetric, none": lambda net, z, y, g: (
        info_nce(z[:, 0], z[:, 1], symmetric=True, reduction="none", group=g).nce.square().mean()
    ),
    "info_nce/symmetric, targets, none": lambda net, z, y, g: (
        info_nce(z[:, 0], z[:, 1], _swap(z), symmetric=True, reduction="none", group=g).nce.square().mean()
    ),
    "info_nce/hard negatives, ids, weights": lambda net, z, y, g: (
        info_nce(
            *(z[:, 0], z[:, 1]),
            hard_negatives=z[:, 2:],
            share_hard_negatives=True,
            query_ids=y,
            row_weights=y + z[:, 0, 0].detach().square(),
            temperature=1 / net.scale,
            hardness=0.5,
            directions=("q2k", "k2q", "k2k"),
            group=g,
        ).loss
    ),
    "info_nce/own hard negatives, joint, debiased, sum": lambda net, z, y, g: (
        info_nce(
            *(z[:, 0], z[:, 1:3].flatten(0, 1), 2 * _swap(z)),
            hard_negatives=z[:, 2:],
            temperature=1 / net.scale,
            directions=DIRECTIONS,
            joint=True,
            tau_plus=0.02,
            normalize=True,
            reduction="sum",
            group=g,
        ).loss
    ),
    "info_nce/prefixes, column bias": lambda net, z, y, g: (
        info_nce(z[:, 0], z[:, 1], prefixes=(2, 5), column_bias=z[:, 3, 0], temperature=0.5, group=g).loss
    ),
    "info_nce/filters": lambda net, z, y, g: (
        info_nce(z[:, 0], z[:, 1], false_negative_margin=0.1, penalty=0.1, guide=(z[:, 2], z[:, 3]), group=g).loss
        + info_nce(
            *(z[:, 0], z[:, 1]),
            hard_negatives=z[:, 3:],
            share_hard_negatives=True,
            false_negative_margin=0.2,
            guide=(z[:, 2], z[:, 3], z[:, 1:2]),
            directions=DIRECTIONS,
            joint=True,
            label_smoothing=0.1,
            group=g,
        ).loss
    ),
    "info_nce/prefixes, filters": lambda net, z, y, g: (
        info_nce(
            *(z[:, 0], z[:, 1]),
            prefixes=(2, 3, 5),
            prefix_weights=(0.5, 1, 2),
            temperature=1 / net.scale,
            false_negative_margin=0.1,
            guide=(z[:, 2], z[:, 3]),
            group=g,
        ).loss
        + info_nce(
            *(z[:, 0], z[:, 1]),
            prefixes=(1, 5),
            temperature=1 / net.scale,
            query_ids=y,
            hard_negatives=z[:, 2:],
            share_hard_negatives=True,
            directions=DIRECTIONS,
            clip=3.0,
            group=g,
        ).loss
    ),
    "info_nce/several positives, soft targets": lambda net, z, y, g: (
        info_nce(
            *(z[:, 0], z[:, 1:3].flatten(0, 1)),
            positives=torch.stack([2 * _swap(z), 2 * _swap(z) + 1], dim=1),
            hard_negatives=z[:, 3:],
            temperature=1 / net.scale,
            label_smoothing=0.1,
            group=g,
        ).loss
        + info_nce(
            *(z[:, 0], z[:, 1]),
            soft_targets=(
                torch.stack([_swap(z), torch.arange(len(z))], dim=1),
                z.new_tensor([[0.3, 0.7]]).repeat(len(z), 1),
            ),
            row_weights=z[:, 0, 0].detach().square(),
            hardness=0.5,
            reduction="sum",
            group=g,
        ).loss
    ),
    "nt_xent": lambda net, z, y, g: nt_xent(z[:, 0], z[:, 1], temperature=1 / net.scale, group=g).loss,
    "sup_con": lambda net, z, y, g: sup_con(z[:, 0], y, temperature=1 / net.scale, group=g).loss,
    "sup_con/in": lambda net, z, y, g: (
        sup_con(z[:, :2].flatten(0, 1), y.repeat_interleave(2), temperature=1 / net.scale, variant="in", group=g).loss
    ),
    "clip_loss": lambda net, z, y, g: clip_loss(z[:, 0], z[:, 1], net.scale, group=g).loss,
    "siglip_loss": lambda net, z, y, g: siglip_loss(z[:, 0], z[:, 1], net.scale, net.bias, group=g).loss,
    "cpc_nce": lambda net, z, y, g: (
        cpc_nce(z[:, :2].transpose(0, 1) * net.scale, z[:, 2:].transpose(0, 1), weights=(1.0, 3.0), group=g).loss
    ),
    "dim_mi/jsd": lambda net, z, y, g: _dim(net, z, g, 1, "jsd"),
    "dim_mi/jsd, several globals": lambda net, z, y, g: _dim(net, z, g, 2, "jsd"),
    "dim_mi/dv": lambda net, z, y, g: _dim(net, z, g, 1, "dv"),
    "dim_mi/dv, several globals": lambda net, z, y, g: _dim(net, z, g, 2, "dv"),
    "dim_mi/nce": lambda net, z, y, g: _dim(net, z, g, 1, "nce"),
    "dim_mi/nce, local, several globals": lambda net, z, y, g: _dim(net, z, g, 2, "nce", "local"),
    "dim_mi/nce, both, several globals": lambda net, z, y, g: _dim(net, z, g, 2, "nce", "both"),
}
