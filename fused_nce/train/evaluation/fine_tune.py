"""Semi-supervised fine-tuning: the whole encoder is trained further, on a few labels a class."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fused_nce.train.evaluation.features import as_vectors, mean_and_sd
from fused_nce.train.machine import threads
from fused_nce.train.seeded import seeded

Labels = NDArray[np.int64]
Transform = Callable[[Tensor], Tensor]

BATCH, MIN_UPDATES, EPOCHS = 64, 100, 10
HEAD_RATE = 1e-3
RATES = (1e-5, 1e-4, 1e-3)  # of the encoder: low keeps what it has learned, high is little better than a new one
MAX_HELD = 1000  # images that the rate is chosen on


class Subject(NamedTuple):
    """An encoder at one tap, and the images of both splits."""

    model: nn.Module
    tap: str
    transform: Transform
    probe: Tensor  # (n, 3, H, W) uint8
    test: Tensor  # (m, 3, H, W) uint8


class Tuned(nn.Module):
    """An encoder and a linear classifier on one of its taps, which starts at zero.

    BatchNorm keeps the statistics of pre-training: those of ten images a batch would be noise.

    Args:
        encoder: has `encode(x) -> {tap: tensor}`.
        tap: its name.
        transform: uint8 images to what the encoder wants.
        mean: (D,) of the tap, by which it is standardised.
        sd: (D,) its deviation; infinite where it is constant.
        classes: how many.
    """

    mean: Tensor
    sd: Tensor

    def __init__(
        self, encoder: nn.Module, tap: str, transform: Transform, mean: Tensor, sd: Tensor, classes: int
    ) -> None:
        super().__init__()
        self.encoder, self.tap, self.transform = encoder.eval(), tap, transform
        self.register_buffer("mean", mean)
        self.register_buffer("sd", sd)
        self.head = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def of(cls, subject: Subject, bank: Tensor, classes: int) -> Tuned:
        """A copy of an encoder, standardised by its features (n, D) of the probe split."""
        mean, sd = mean_and_sd(bank)
        return cls(copy.deepcopy(subject.model), subject.tap, subject.transform, mean, sd, classes)

    def forward(
        self,
        x: Tensor,  # (B, 3, H, W) as the encoder wants them
    ) -> Tensor:  # (B, classes)
        taps: dict[str, Tensor] = self.encoder.encode(x)  # type: ignore[operator]
        logits: Tensor = self.head((as_vectors(taps[self.tap]) - self.mean) / self.sd)
        return logits

    def predict(
        self,
        images: Tensor,  # (B, 3, H, W) uint8
    ) -> Tensor:  # (B,)
        """The classes of images, each judged by itself."""
        with torch.inference_mode():
            return torch.cat([self(self.transform(part)).argmax(1) for part in images.split(256)])


def tune(net: Tuned, images: Tensor, labels: Tensor, *, rate: float, seed: int) -> Tuned:
    """Trains encoder and classifier by Adam on batches of 64, 10 epochs and at least 100 updates, along a cosine.

    Args:
        net: changed in place.
        images: (n, 3, H, W) uint8, as they are: no augmentation.
        labels: (n,) int64.
        rate: of the encoder; the classifier's is 1e-3.
        seed: of the batches.
    """
    encoder = [p for p in net.encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([{"params": encoder, "lr": rate}, {"params": net.head.parameters(), "lr": HEAD_RATE}])
    count = max(MIN_UPDATES, math.ceil(EPOCHS * len(images) / BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for _ in range(count):
            threads.look()
            while len(order) < min(BATCH, len(images)):
                order = torch.cat((order, torch.randperm(len(images), generator=generator)))
            rows, order = order[:BATCH], order[BATCH:]
            optimizer.zero_grad()
            F.cross_entropy(net(net.transform(images[rows])), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return net


def fine_tune(
    subject: Subject,
    bank: Tensor,  # (n, D)
    labels: Labels,  # (n,) of the probe split, classes 0..K-1
    draws: list[Labels],
    held: Labels,
    *,
    seed: int,
) -> tuple[list[Labels], float]:
    """Predictions of the test images for each draw of labelled rows, and the encoder's rate, chosen on the first."""
    net, rate = choose(subject, bank, labels, draws[0], held, seed=seed)
    found = [net.predict(subject.test).numpy()]
    for chosen in draws[1:]:
        net = _tuned(subject, bank, labels, chosen, rate, seed)
        found.append(net.predict(subject.test).numpy())
    return found, rate


def choose(
    subject: Subject, bank: Tensor, labels: Labels, chosen: Labels, held: Labels, *, seed: int
) -> tuple[Tuned, float]:
    """The encoder tuned on the chosen rows at the rate that gets most of up to 1,000 held-out rows right; the rate."""
    known = torch.from_numpy(labels)
    some = torch.from_numpy(np.random.default_rng(seed).permutation(held)[:MAX_HELD])
    nets = [_tuned(subject, bank, labels, chosen, rate, seed) for rate in RATES]
    right = [int((net.predict(subject.probe[some]) == known[some]).sum()) for net in nets]
    best = int(np.argmax(right))  # the lowest among equals
    return nets[best], RATES[best]


def _tuned(subject: Subject, bank: Tensor, labels: Labels, chosen: Labels, rate: float, seed: int) -> Tuned:
    rows, known = torch.from_numpy(chosen), torch.from_numpy(labels)
    with seeded(seed):
        net = Tuned.of(subject, bank, int(known.max()) + 1)
        return tune(net, subject.probe[rows], known[rows], rate=rate, seed=seed)
