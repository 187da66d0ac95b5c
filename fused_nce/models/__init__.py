"""Self-supervised models as plain `nn.Module`s, for any training loop."""

from fused_nce.models.aae import AAE
from fused_nce.models.amdim import AMDIM
from fused_nce.models.bigan import BiGAN
from fused_nce.models.cpc import CPC
from fused_nce.models.dim import DIM
from fused_nce.models.dim_generator import PriorGenerator
from fused_nce.models.distil import Distilled
from fused_nce.models.moco import MoCo
from fused_nce.models.nat import NAT
from fused_nce.models.npid import NPID
from fused_nce.models.simclr import SimCLR
from fused_nce.models.supcon import SupCon
from fused_nce.models.vae import VAE

__all__ = [
    "AAE", "AMDIM", "CPC", "DIM", "NAT", "NPID", "VAE", "BiGAN", "Distilled", "MoCo", "PriorGenerator", "SimCLR",
    "SupCon",
]  # fmt: skip
