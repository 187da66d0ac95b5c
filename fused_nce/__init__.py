"""Noise-contrastive losses and their gradients without the score tensor, and the trainers that use them."""

from fused_nce import backends as _package  # noqa: F401  (loaded before `doctor.backends` takes the name, or it would take it back)
from fused_nce._version import __version__
from fused_nce.core.dispatch import last_path
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.workspace import workspace_bytes
from fused_nce.doctor import backends, doctor
from fused_nce.losses import (
    AMDIMLoss,
    CLIPLoss,
    InfoNCELoss,
    MemoryQueue,
    MoCoLoss,
    NCEOutput,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
    amdim_nce,
    clip_loss,
    info_nce,
    moco_nce,
    nt_xent,
    siglip_loss,
    sup_con,
)
from fused_nce.verify import verify

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
    "__version__",
    "amdim_nce",
    "backends",
    "clip_loss",
    "doctor",
    "info_nce",
    "last_path",
    "moco_nce",
    "nt_xent",
    "siglip_loss",
    "sup_con",
    "tile_loss",
    "tile_stats",
    "verify",
    "workspace_bytes",
]
