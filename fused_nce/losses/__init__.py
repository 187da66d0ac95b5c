"""Losses: one file each, a spec and a tail on the engine. They import no backend."""

from fused_nce.losses.amdim import AMDIMLoss, NCEOutput, amdim_nce

__all__ = ["AMDIMLoss", "NCEOutput", "amdim_nce"]
