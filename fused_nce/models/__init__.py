"""Self-supervised models as plain `nn.Module`s, for any training loop."""

from fused_nce.models.amdim import AMDIM
from fused_nce.models.cpc import CPC
from fused_nce.models.dim import DIM
from fused_nce.models.distil import Distilled
from fused_nce.models.moco import MoCo
from fused_nce.models.npid import NPID
from fused_nce.models.simclr import SimCLR
from fused_nce.models.supcon import SupCon

__all__ = ["AMDIM", "CPC", "DIM", "NPID", "Distilled", "MoCo", "SimCLR", "SupCon"]
