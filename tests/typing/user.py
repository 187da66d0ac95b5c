"""A user's file: every public name is called, as a type checker and an editor see it. It runs too."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

import fused_nce
from fused_nce import distributed, models
from fused_nce.core.spec import Block, Spec
from fused_nce.core.tails import Nce
from fused_nce.losses import NCEOutput

N, D = 8, 4
q, k = torch.randn(N, D, requires_grad=True), torch.randn(N, D)
labels = torch.arange(N) % 3
bank, indices = torch.randn(20, D), torch.arange(N)
maps = {"f1": torch.randn(N, D), "f5": torch.randn(N, 25, D), "f7": torch.randn(N, 49, D)}
components = {"f1": torch.randn(N, 2, D), "f5": torch.randn(N, 25, D), "f7": torch.randn(N, 49, D)}
positives, negatives = torch.randn(N), torch.randn(N, 3)


def functions() -> list[NCEOutput]:
    """Each function of the losses."""
    return [
        fused_nce.info_nce(q, k, normalize=True, temperature=0.1, hard_negatives=torch.randn(N, 2, D)),
        fused_nce.nt_xent(q, k, temperature=0.5),
        fused_nce.clip_loss(q, k, torch.tensor(10.0)),
        fused_nce.siglip_loss(q, k, 10.0, -10.0),
        fused_nce.moco_nce(q, k, bank),
        fused_nce.sup_con(q, labels),
        fused_nce.cpc_nce(torch.randn(2, N, D), torch.randn(2, N, D)),
        fused_nce.amdim_nce(q, maps["f5"]),
        fused_nce.amdim_mixture_nce(components["f1"], maps["f5"], tau=1.0),
        fused_nce.npid_nce(q, bank, indices, torch.randint(20, (N, 5)), z=20.0),
        fused_nce.npid_softmax(q, bank, indices),
        fused_nce.dim_mi(maps["f5"], q),
        fused_nce.mine_dv(positives, negatives.flatten()),
        fused_nce.binary_nce(positives, negatives, torch.zeros(N), torch.zeros(N, 3)),
        fused_nce.triplet_margin(q, labels),
        fused_nce.pair_contrastive(q, labels),
        fused_nce.club(q, k, torch.zeros(N, D)),
        fused_nce.gaussian_kl(q, torch.zeros(N, D)),
    ]


def modules() -> dict[str, nn.Module]:
    """Each module of the losses."""
    return {
        "info_nce": fused_nce.InfoNCELoss(temperature=0.1),
        "nt_xent": fused_nce.NTXentLoss(),
        "clip": fused_nce.CLIPLoss(),
        "siglip": fused_nce.SigLIPLoss(),
        "moco": fused_nce.MoCoLoss(),
        "sup_con": fused_nce.SupConLoss(),
        "cpc": fused_nce.CPCLoss(),
        "amdim": fused_nce.AMDIMLoss(),
        "amdim mixture": fused_nce.AMDIMMixtureLoss(tau=1.0),
        "multiscale mixture": fused_nce.MultiscaleMixtureLoss(),
        "npid": fused_nce.NPIDNCELoss(),
        "npid softmax": fused_nce.NPIDSoftmaxLoss(),
        "dim": fused_nce.DIMLoss(),
        "mine": fused_nce.MINELoss(),
        "binary": fused_nce.BinaryNCELoss(),
        "triplet": fused_nce.TripletMarginLoss(),
        "pairs": fused_nce.PairContrastiveLoss(),
        "club": fused_nce.CLUBLoss(),
        "gaussian": fused_nce.GaussianKLLoss(),
        "queue": fused_nce.MemoryQueue(64, D),
    }


def tools() -> None:
    """What is not a loss."""
    spec = Spec(Block(1))
    rows: dict[str, Tensor] = fused_nce.tile_stats(q, k, spec, scale=0.1)
    assert rows["pos"].shape == (N, 1)
    loss: Tensor = fused_nce.tile_loss(q, k, spec, Nce(), scale=0.1).loss
    scores: Tensor = fused_nce.gathered_scores(q, k, torch.zeros(N, 2, dtype=torch.long))
    assert scores.shape == (N, 2)
    size: int = fused_nce.workspace_bytes(spec, N, N, D, backend="chunked")
    assert size > 0
    found: Tensor = fused_nce.mine_hard_negatives(q.detach(), bank, 2, progress=False).indices
    assert found.shape == (N, 2)
    encoder = nn.Linear(D, D)
    step = fused_nce.GradientCache(encoder, lambda z: fused_nce.info_nce(z, k).loss, part=3)
    step.backward(torch.randn(N, D))
    fused_nce.verify(fused_nce.info_nce, fused_nce.info_nce, q.detach(), k, show=False)
    with contextlib.suppress(ValueError):  # there is no loss that it knows
        fused_nce.patch(nn.Sequential(encoder), show=False)
    path = fused_nce.last_path()
    assert path is not None
    backend: str = path.backend
    report: str = fused_nce.doctor()
    reasons: dict[str, str | None] = fused_nce.backends()
    assert backend in reasons
    assert fused_nce.__version__ in report
    torch.autograd.grad(loss, q)


def networks() -> list[nn.Module]:
    """Each model; a batch in, losses out."""
    tiny = models.SimCLR(backbone="tiny", dim=8)
    loss: Tensor = tiny((torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))).loss
    assert loss.isfinite()
    return [
        tiny,
        models.AAE(architecture="tiny32", decoder=16),
        models.AMDIM(image_size=32, ndf=4, n_rkhs=16, n_depth=1),
        models.BiGAN(architecture="tiny32", decoder=16),
        models.CPC.vision(image_size=64, patch_size=16),
        models.DIM(architecture="tiny32"),
        models.Distilled(teacher=lambda: nn.Identity(), classes=10, backbone="tiny"),
        models.MoCo(backbone="tiny", dim=8, queue_size=16),
        models.NAT(size=10, architecture="tiny32"),
        models.NPID(size=10, backbone="tiny", dim=8),
        models.PriorGenerator(architecture="tiny32", decoder=16),
        models.SupCon(backbone="tiny", dim=8),
        models.VAE(architecture="tiny32", decoder=16),
    ]


def processes(group: distributed.Group = None) -> None:
    """What a loss's `group` may be, and what stands beside it; of one process here."""
    ring = distributed.Processes(ring=True)
    assert ring.ring
    size: int = distributed.world_size(group)
    everyone: Tensor = distributed.all_gather(q, group)
    assert everyone.shape == (size * N, D)
    assert issubclass(distributed.ProcessLostError, Exception)


if __name__ == "__main__":
    networks()
    processes()
    assert all(out.loss.isfinite() for out in functions())
    modules()
    tools()
