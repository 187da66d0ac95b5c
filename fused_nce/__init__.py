"""Noise-contrastive losses and their gradients without the score tensor, and the trainers that use them."""

from fused_nce import backends as _package  # noqa: F401  (loaded before `doctor.backends` takes the name, or it would take it back)
from fused_nce._version import __version__
from fused_nce.core.dispatch import last_path
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.workspace import workspace_bytes
from fused_nce.doctor import backends, doctor
from fused_nce.losses import AMDIMLoss, NCEOutput, amdim_nce

__all__ = [
    "AMDIMLoss",
    "NCEOutput",
    "__version__",
    "amdim_nce",
    "backends",
    "doctor",
    "last_path",
    "tile_loss",
    "tile_stats",
    "workspace_bytes",
]
