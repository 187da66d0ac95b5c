"""Self-supervised models as plain `nn.Module`s, for any training loop."""

from fused_nce.models.amdim import AMDIM

__all__ = ["AMDIM"]
