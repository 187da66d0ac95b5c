"""Two ways to draw an encoder's weights: a method that offers both is compared with both, untrained."""

import dataclasses
from typing import Any, Literal

from torch import nn

from fused_nce.train.config import TrainConfig

Init = Literal["torch", "kaiming"]


def draw_(encoder: nn.Module, init: Init) -> None:
    """As torch does it, or every convolution by Kaiming's rule for ReLU (He et al. 2015), its bias 0."""
    for layer in encoder.modules() if init == "kaiming" else ():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def both(config: TrainConfig) -> dict[str, TrainConfig]:
    """A configuration with each `model.init`, by the names that an evaluation prints."""
    model: Any = config.model
    names = {"random, torch's init": "torch", "random, Kaiming init": "kaiming"}
    return {name: dataclasses.replace(config, model=dataclasses.replace(model, init=i)) for name, i in names.items()}
