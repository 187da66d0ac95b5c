"""Self-supervised models as plain `nn.Module`s, for any training loop."""

from fused_nce.models.amdim import AMDIM
from fused_nce.models.cpc import CPC
from fused_nce.models.dim import DIM

__all__ = ["AMDIM", "CPC", "DIM"]
