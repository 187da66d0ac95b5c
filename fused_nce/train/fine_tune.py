"""Semi-supervised fine-tuning: the whole encoder goes on learning, from a few labels a class."""

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

from fused_nce.train.features import as_vectors

Labels = NDArray[np.int64]

BATCH, MIN_UPDATES, EPOCHS = 64, 100, 10
HEAD_RATE = 1e-3
RATES = (1e-5, 1e-4, 1e-3)  # of the encoder: low keeps what it has learned, high is little better than a new one
MAX_HELD = 1000  # images that the rate is chosen on


class Subject(NamedTuple):
    """An encoder at one tap, and the images of both splits."""

    model: nn.Module
    tap: str
    transform: Callable[[Tensor], Tensor]
    probe: Tensor  # (n, 3, H, W) uint8
    test: Tensor  # (m, 3, H, W) uint8


class Tuned(nn.Module):
    """A copy of an encoder and a linear classifier on its tap, which starts at zero.

    BatchNorm keeps the statistics of pre-training: those of ten images a batch would be noise.

    Args:
        subject: the encoder.
        bank: (n, D) its features of the probe split, by which the tap is standardised.
        classes: how many.
    """

    def __init__(self, subject: Subject, bank: Tensor, classes: int) -> None:
        super().__init__()
        self.encoder, self.tap, self.transform = copy.deepcopy(subject.model).eval(), subject.tap, subject.transform
        self.mean, self.sd = bank.mean(0), bank.std(0)
        self.sd[self.sd <= 1e-6 * self.mean.abs()] = math.inf  # as the probes: a constant feature becomes 0
        self.head = nn.Linear(bank.shape[1], classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        images: Tensor,  # (B, 3, H, W) uint8
    ) -> Tensor:  # (B, classes)
        taps: dict[str, Tensor] = self.encoder.encode(self.transform(images))  # type: ignore[operator]
        logits: Tensor = self.head((as_vectors(taps[self.tap]) - self.mean) / self.sd)
        return logits

    def predict(self, images: Tensor) -> Tensor:  # (B,)
        """The classes of images, each judged by itself."""
        with torch.inference_mode():
            return torch.cat([self(part).argmax(1) for part in images.split(256)])


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
            while len(order) < min(BATCH, len(images)):
                order = torch.cat((order, torch.randperm(len(images), generator=generator)))
            rows, order = order[:BATCH], order[BATCH:]
            optimizer.zero_grad()
            F.cross_entropy(net(images[rows]), labels[rows]).backward()
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
    """Predictions of the test images for each draw of labelled rows, and the encoder's rate.

    The rate is chosen once, after the first draw, on up to 1,000 rows that no draw contains.
    """
    known, classes = torch.from_numpy(labels), int(labels.max()) + 1

    def tuned(chosen: Labels, rate: float) -> Tuned:
        rows = torch.from_numpy(chosen)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return tune(Tuned(subject, bank, classes), subject.probe[rows], known[rows], rate=rate, seed=seed)

    some = torch.from_numpy(np.random.default_rng(seed).permutation(held)[:MAX_HELD])
    first = [tuned(draws[0], rate) for rate in RATES]
    right = [int((net.predict(subject.probe[some]) == known[some]).sum()) for net in first]
    best = int(np.argmax(right))  # the lowest among equals
    rate = RATES[best]
    nets = (first[best] if i == 0 else tuned(chosen, rate) for i, chosen in enumerate(draws))
    return [net.predict(subject.test).numpy() for net in nets], rate
