"""CPC on audio in the loop (arXiv 1807.03748): one window of a recording, and every step ahead predicted in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fused_nce.core.dispatch import BACKENDS
from fused_nce.losses import CPCLoss
from fused_nce.models import CPC
from fused_nce.models.cpc_sampled import SampledCPCLoss
from fused_nce.models.encoders.cpc import AudioEncoder
from fused_nce.train.config import OptimConfig, TrainConfig
from fused_nce.train.limits import ABOVE_0, AT_LEAST_0, AT_LEAST_1, Rule, each, one_of, optional
from fused_nce.train.methods import inits
from fused_nce.train.recordings import WindowLoader

LAYERS = Rule("at least one layer, each at least 1", lambda v: len(v) > 0 and all(map(AT_LEAST_1.holds, v)))


@dataclass
class CPCLossConfig:
    """InfoNCE of each step.

    Args:
        negatives: "batch", every other target of the step; "sequence", those of the prediction's own sequence or image;
            "sampled", a few of the batch for each prediction.
        sampled: how many.
        backend: engine backend, of all but "sampled"; chosen by the machine if left out.
    """

    negatives: Literal["batch", "sequence", "sampled"] = "batch"
    sampled: int = 10
    backend: str | None = None

    def build(self) -> nn.Module:
        """The loss of a step."""
        if self.negatives == "sampled":
            return SampledCPCLoss(self.sampled)
        return CPCLoss(negatives=self.negatives, backend=self.backend)


LOSS_RULES: dict[str, Rule] = {"loss.sampled": AT_LEAST_1, "loss.backend": optional(one_of(BACKENDS))}


@dataclass
class CPCModelConfig:
    """Strided convolutions and a GRU.

    Args:
        channels: of the convolutions.
        kernels: of the layers.
        strides: of the layers; their product is the samples of a frame.
        paddings: of the layers.
        hidden: units of the GRU.
        steps: frames ahead that are predicted, each by a matrix of its own.
        init: of the encoder: torch's, or Kaiming's for ReLU.
    """

    channels: int = 512
    kernels: tuple[int, ...] = (10, 8, 4, 4, 4)
    strides: tuple[int, ...] = (5, 4, 2, 2, 2)
    paddings: tuple[int, ...] = (2, 2, 2, 2, 1)
    hidden: int = 256
    steps: int = 12
    init: Literal["torch", "kaiming"] = "torch"


@dataclass
class WindowConfig:
    """What the model is given of a recording.

    Args:
        window: samples, from a random place; a shorter recording ends in zeros.
        level: the share of full scale that becomes 1, or null for each recording's own root mean square.
        label: that the online classifiers learn, of those in the shards; null for none.
    """

    window: int = 20480
    level: float | None = 0.063
    label: str | None = None


# `default` is the paper's on LibriSpeech (16 kHz; 300,000 updates on 8 GPUs × 8 windows are 674 epochs of its 28,539
# utterances), at Greedy InfoMax's scale of the samples. `librispeech-gim` is that code's CPC. `fsdd-tiny` is ours:
# 8 kHz, frames of 10 ms like theirs, a window of 0.32 s, shorter than four in five of the recordings.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "librispeech": {"augment": {"label": "speaker"}},
    "librispeech-gim": {
        "loss": {"negatives": "sampled", "sampled": 10},
        "augment": {"label": "speaker"},
        "optim": {"epochs": 1000, "batch_size": 8},
    },
    "fsdd-tiny": {
        "model": {
            "channels": 128, "kernels": [10, 8, 4, 4], "strides": [5, 4, 2, 2], "paddings": [2, 2, 2, 1],
            "hidden": 128, "steps": 8,
        },
        "augment": {"window": 2560, "level": None, "label": "digit"},
        "optim": {"epochs": 40, "batch_size": 32, "lr": 1e-3, "warmup_updates": 50, "schedule": "cosine"},
    },
}  # fmt: skip


def optimizer(**changes: Any) -> OptimConfig:
    """Adam at a constant rate, as the paper trains both kinds."""
    shared: dict[str, Any] = {
        "lr": 2e-4, "betas": (0.9, 0.999), "weight_decay": 0.0, "warmup_updates": 0, "schedule": "constant"
    }  # fmt: skip
    return OptimConfig(**shared | changes)


@dataclass
class CPCConfig(TrainConfig):
    __doc__ = TrainConfig.__doc__

    method: ClassVar[str] = "cpc"
    title: ClassVar[str] = "CPC"
    presets: ClassVar = PRESETS
    taps: ClassVar = ("c_t", "z_t")
    view_count: ClassVar[int] = 1
    rules: ClassVar = {
        **LOSS_RULES,
        "model.channels": AT_LEAST_1,
        "model.kernels": LAYERS,
        "model.strides": LAYERS,
        "model.paddings": each(AT_LEAST_0),
        "model.hidden": AT_LEAST_1,
        "model.steps": AT_LEAST_1,
        "augment.window": AT_LEAST_1,
        "augment.level": optional(ABOVE_0),
        "augment.label": optional(Rule("the name of a label", bool)),
    }

    data: str = "speech"
    model: CPCModelConfig = field(default_factory=CPCModelConfig)
    loss: CPCLossConfig = field(default_factory=CPCLossConfig)
    augment: WindowConfig = field(default_factory=WindowConfig)  # type: ignore[assignment]  # no image to augment
    optim: OptimConfig = field(default_factory=lambda: optimizer(epochs=674, batch_size=64))

    def build(self, *, images: int = 1) -> CPC:
        settings = {name: value for name, value in vars(self.model).items() if name != "init"}
        model = CPC.audio(**settings, negatives=self.loss.negatives, loss=self.loss.build())
        inits.draw_(model.encoder, self.model.init)
        return model

    def check_together(self) -> None:
        m = self.model
        frames = AudioEncoder(1, m.kernels, m.strides, m.paddings).frames(self.augment.window)
        if frames <= m.steps:
            raise ValueError(
                f"augment.window: must give more than the {m.steps} frames of model.steps, got {self.augment.window} "
                f"samples: {max(frames, 0)} frames"
            )

    def open_loader(self, rank: int, world: int) -> WindowLoader:
        return WindowLoader(self, rank=rank, world=world)

    def make_views(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda windows: (windows,)

    def sample(self) -> Tensor:
        return torch.zeros(1, self.augment.window)

    def untrained(self) -> dict[str, TrainConfig]:
        return inits.both(self)

    def judge(self) -> Callable[..., tuple[dict[str, Any], Any]]:
        from fused_nce.train.evaluate_audio import evaluate

        return evaluate
