"""Noise as targets in the loop (arXiv 1704.05310), one of DIM's baselines."""

from dataclasses import dataclass, field
from typing import ClassVar

from fused_nce.models import NAT
from fused_nce.train.limits import AT_LEAST_1, setting
from fused_nce.train.methods.coded import PRESETS, CodeConfig, CodedConfig


@dataclass
class NATLossConfig:
    """The distance from a point of its own.

    Args:
        every: in the first of so many passes points are exchanged within each batch; a pass is as many images as there
            are.
    """

    every: int = setting(1, AT_LEAST_1)


@dataclass
class NATConfig(CodedConfig):
    method: ClassVar[str] = "nat"
    title: ClassVar[str] = "NAT"
    presets: ClassVar = PRESETS
    extras: ClassVar = ("indices",)
    stats: ClassVar = ("moved",)

    model: CodeConfig = field(default_factory=CodeConfig)
    loss: NATLossConfig = field(default_factory=NATLossConfig)

    def build(self, *, images: int = 1) -> NAT:
        return self.drawn(NAT(size=images, **self.arguments(), every=self.loss.every))
