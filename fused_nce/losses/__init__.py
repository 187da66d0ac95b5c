"""Losses: one file each, a spec and a tail on the engine, and what it must equal. They import no backend."""

from fused_nce.losses.amdim import AMDIMLoss, amdim_nce
from fused_nce.losses.clip import CLIPLoss, clip_loss
from fused_nce.losses.info_nce import InfoNCELoss, info_nce
from fused_nce.losses.moco import MoCoLoss, moco_nce
from fused_nce.losses.nt_xent import NTXentLoss, nt_xent
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.queue import MemoryQueue
from fused_nce.losses.siglip import SigLIPLoss, siglip_loss
from fused_nce.losses.sup_con import SupConLoss, sup_con

__all__ = [
    "AMDIMLoss",
    "CLIPLoss",
    "InfoNCELoss",
    "MemoryQueue",
    "MoCoLoss",
    "NCEOutput",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "amdim_nce",
    "clip_loss",
    "info_nce",
    "moco_nce",
    "nt_xent",
    "siglip_loss",
    "sup_con",
]
