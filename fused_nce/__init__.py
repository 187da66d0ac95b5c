"""Noise-contrastive losses and their gradients without the score tensor, and the trainers that use them."""

from fused_nce import backends as _package  # noqa: F401  (loaded before `doctor.backends` takes the name, or it would take it back)
from fused_nce import losses
from fused_nce._version import __version__
from fused_nce.core.dispatch import last_path, workspace_bytes
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.gathered import gathered_scores
from fused_nce.doctor import backends, doctor
from fused_nce.grad_cache import GradientCache
from fused_nce.losses import *  # noqa: F403  (its `__all__` is the one list of losses)
from fused_nce.mining import mine_hard_negatives
from fused_nce.patch import patch
from fused_nce.verify import verify

__all__ = [
    "GradientCache",
    "__version__",
    "backends",
    "doctor",
    "gathered_scores",
    "last_path",
    "mine_hard_negatives",
    "patch",
    "tile_loss",
    "tile_stats",
    "verify",
    "workspace_bytes",
]
__all__ += losses.__all__
