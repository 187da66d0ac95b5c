"""Noise-contrastive losses and their gradients without the score tensor, and the trainers that use them."""

from . import backends as _package  # noqa: F401  (loaded before `doctor.backends` takes the name, or it would take it back)
from ._version import __version__
from .core.dispatch import last_path
from .core.engine import tile_loss, tile_stats
from .core.workspace import workspace_bytes
from .doctor import backends, doctor
from .losses import AMDIMLoss, NCEOutput, amdim_nce

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
