"""CPC on audio in the loop (arXiv 1807.03748): one window of a recording, and every step ahead predicted in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fused_nce.losses import CPCLoss
from fused_nce.models import CPC
from fused_nce.models.base import Model
from fused_nce.models.cpc import SampledCPCLoss
from fused_nce.models.encoders.cpc import AudioEncoder
from fused_nce.train.data.recordings import WindowConfig, WindowLoader
from fused_nce.train.evaluation.figures import Figures
from fused_nce.train.evaluation.recordings import evaluate as evaluate_recordings
from fused_nce.train.evaluation.scoring import Asked
from fused_nce.train.limits import AT_LEAST_0, AT_LEAST_1, Rule, each, setting
from fused_nce.train.methods import presets
from fused_nce.train.settings import BACKEND, OptimConfig

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
    sampled: int = setting(10, AT_LEAST_1)
    backend: str | None = setting(None, BACKEND)

    def build(self) -> nn.Module:
        """The loss of a step."""
        if self.negatives == "sampled":
            return SampledCPCLoss(self.sampled)
        return CPCLoss(negatives=self.negatives, backend=self.backend)


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

    channels: int = setting(512, AT_LEAST_1)
    kernels: tuple[int, ...] = setting((10, 8, 4, 4, 4), LAYERS)
    strides: tuple[int, ...] = setting((5, 4, 2, 2, 2), LAYERS)
    paddings: tuple[int, ...] = setting((2, 2, 2, 2, 1), each(AT_LEAST_0))
    hidden: int = setting(256, AT_LEAST_1)
    steps: int = setting(12, AT_LEAST_1)
    init: Literal["torch", "kaiming"] = "torch"


# `default` is the paper's on LibriSpeech (16 kHz; 300,000 updates on 8 GPUs × 8 windows are 674 epochs of its 28,539
# utterances), at Greedy InfoMax's scale of the samples. `librispeech-gim` is that code's CPC. `fsdd-tiny` is ours:
# 8 kHz, frames of 10 ms like theirs, a window of 0.32 s, shorter than four in five of the recordings.
LIBRISPEECH: dict[str, Any] = {"run": {"memory_limit_mb": 12_288}}  # its 100.6 hours take 11,052 MB as int16
PRESETS: dict[str, dict[str, Any]] = {
    "default": LIBRISPEECH,
    "librispeech": LIBRISPEECH | {"augment": {"label": "speaker"}},
    "librispeech-gim": LIBRISPEECH | {
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
class CPCConfig(presets.TwoInits):
    method: ClassVar[str] = "cpc"
    title: ClassVar[str] = "CPC"
    presets: ClassVar = PRESETS
    taps: ClassVar = ("c_t", "z_t")

    data: str = "speech"
    model: CPCModelConfig = field(default_factory=CPCModelConfig)
    loss: CPCLossConfig = field(default_factory=CPCLossConfig)
    augment: WindowConfig = field(default_factory=WindowConfig)  # type: ignore[assignment]  # no image to augment
    optim: OptimConfig = field(default_factory=lambda: optimizer(epochs=674, batch_size=64))

    def build(self, *, images: int = 1) -> CPC:
        return self.drawn(CPC.audio(**self.arguments(), negatives=self.loss.negatives, loss=self.loss.build()))

    def check_together(self) -> None:
        if self.shuffle_buffer is not None:
            raise ValueError(f"shuffle_buffer: must be null for recordings, which are held, got {self.shuffle_buffer}")
        m = self.model
        frames = AudioEncoder(1, m.kernels, m.strides, m.paddings).frames(self.augment.window)
        if frames <= m.steps:
            raise ValueError(
                f"augment.window: must give more than the {m.steps} frames of model.steps, got {self.augment.window} "
                f"samples: {max(frames, 0)} frames"
            )

    def open_loader(self, rank: int, world: int) -> WindowLoader:
        return WindowLoader(
            self.data, self.augment, self.local_batch(world),
            seed=self.seed, rank=rank, world=world, limit_bytes=self.run.memory_limit_mb << 20,
        )  # fmt: skip

    def make_views(self) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda windows: (windows,)

    def sample(self) -> Tensor:
        return torch.zeros(1, self.augment.window)

    def judge(self, model: Model, asked: Asked) -> tuple[dict[str, Any], Figures]:
        return evaluate_recordings(model, self, asked)
