"""Losses: one file each, a spec and a tail on the engine, and what it must equal. They import no backend.

Two arguments are the same in all of them. `backend` is a name of `fused_nce.backends()`, or None to choose the fastest.
`group` is None for negatives of this process alone; a `ProcessGroup`, "world" or `fused_nce.distributed.Processes` adds
the rows of all its processes to the negatives. Each process then computes the loss of its own rows: the mean of these
losses over the processes is the loss of the whole batch on one process, and under DDP so is every gradient.
"""

from fused_nce.losses.amdim import AMDIMLoss, amdim_nce
from fused_nce.losses.amdim_mixture import AMDIMMixtureLoss, MultiscaleMixtureLoss, amdim_mixture_nce
from fused_nce.losses.binary_nce import BinaryNCELoss, binary_nce
from fused_nce.losses.clip import CLIPLoss, clip_loss
from fused_nce.losses.club import CLUBLoss, club
from fused_nce.losses.cpc import CPCLoss, cpc_nce
from fused_nce.losses.dim import DIMLoss, dim_mi
from fused_nce.losses.gaussian_kl import GaussianKLLoss, gaussian_kl
from fused_nce.losses.info_nce import InfoNCELoss, info_nce
from fused_nce.losses.info_nce_oracle import oracle as _oracle  # noqa: F401  (and its examples)
from fused_nce.losses.mine import MINELoss, mine_dv
from fused_nce.losses.moco import MoCoLoss, moco_nce
from fused_nce.losses.npid import NPIDSoftmaxLoss, npid_softmax
from fused_nce.losses.npid_nce import NPIDNCELoss, npid_nce
from fused_nce.losses.nt_xent import NTXentLoss, nt_xent
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.pairs import PairContrastiveLoss, pair_contrastive
from fused_nce.losses.queue import MemoryQueue
from fused_nce.losses.siglip import SigLIPLoss, siglip_loss
from fused_nce.losses.sup_con import SupConLoss, sup_con
from fused_nce.losses.triplet import TripletMarginLoss, triplet_margin

__all__ = [
    "AMDIMLoss",
    "AMDIMMixtureLoss",
    "BinaryNCELoss",
    "CLIPLoss",
    "CLUBLoss",
    "CPCLoss",
    "DIMLoss",
    "GaussianKLLoss",
    "InfoNCELoss",
    "MINELoss",
    "MemoryQueue",
    "MoCoLoss",
    "MultiscaleMixtureLoss",
    "NCEOutput",
    "NPIDNCELoss",
    "NPIDSoftmaxLoss",
    "NTXentLoss",
    "PairContrastiveLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "amdim_mixture_nce",
    "amdim_nce",
    "binary_nce",
    "clip_loss",
    "club",
    "cpc_nce",
    "dim_mi",
    "gaussian_kl",
    "info_nce",
    "mine_dv",
    "moco_nce",
    "npid_nce",
    "npid_softmax",
    "nt_xent",
    "pair_contrastive",
    "siglip_loss",
    "sup_con",
    "triplet_margin",
]
