"""Probes that are trained in small batches, as the papers train theirs: a linear one by SGD, and a small network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_nce.train.evaluation.probes import HELD_OUT, Array, Labels, hold_out, standardise
from fused_nce.train.machine.threads import look
from fused_nce.train.seeded import seeded

BATCH = 256
# MoCo's linear protocol: momentum 0.9, no decay, 100 epochs, the rate a tenth from epochs 60 and 80. Its rate, 30, is
# for features as they are; standardised ones are larger, so the rate is chosen, on held-out images.
SGD_EPOCHS, SGD_MILESTONES, SGD_MOMENTUM = 100, (0.6, 0.8), 0.9
SGD_RATES = (1e-3, 1e-2, 1e-1, 1.0)
# DIM's: 200 units, Adam, the rate a tenth twice. In batches of 256, not 64, and for a tenth of its updates at ten times
# its rate: on frozen features without augmentation the accuracy has settled by then.
MLP_UNITS, MLP_DROPOUT, MLP_RATE, MLP_EPOCHS, MLP_MILESTONES = 200, 0.1, 1e-3, 30, (0.5, 0.8)


class Trained(NamedTuple):
    """Predictions for the test images, and the learning rate that made them."""

    predicted: Labels  # (m,)
    rate: float


def sgd_probe(bank: Array, labels: Labels, queries: Array, *, seed: int = 0, epochs: int = SGD_EPOCHS) -> Trained:
    """Softmax regression by SGD: the rate chosen on a held-out quarter of the bank, then trained on all of it.

    Args:
        bank: (n, D) features of the probe split.
        labels: (n,) their classes.
        queries: (m, D) features of the test images, which no choice sees.
        seed: of the held-out part and the batches.
        epochs: over the bank.
    """
    bank, queries = standardise(bank, queries)
    names, numbers = np.unique(labels, return_inverse=True)
    x, y = torch.from_numpy(bank), torch.from_numpy(numbers)
    rows, held = map(torch.from_numpy, hold_out(labels, HELD_OUT, np.random.default_rng(seed)))
    weights = softmax_by_sgd(x[rows], y[rows], SGD_RATES, epochs, seed)
    right = [int((_logits(x[held], w).argmax(1) == y[held]).sum()) if w.isfinite().all() else -1 for w in weights]
    rate = SGD_RATES[int(np.argmax(right))]  # the smallest among equals
    (final,) = softmax_by_sgd(x, y, (rate,), epochs, seed)
    return Trained(names[_logits(torch.from_numpy(queries), final).argmax(1).numpy()], rate)


@torch.no_grad()
def softmax_by_sgd(
    x: Tensor,  # (n, D)
    labels: Tensor,  # (n,) int64, classes 0..K-1
    rates: tuple[float, ...],
    epochs: int,
    seed: int,
) -> Tensor:  # (R, K, D + 1), a model for each rate; the last column is the bias
    """Trains with all learning rates at once on the same batches, in one matrix product."""
    classes = int(labels.max()) + 1
    weight = torch.zeros(len(rates), classes, x.shape[1] + 1)
    velocity = torch.zeros_like(weight)
    step = torch.tensor(rates)[:, None, None]
    for done, rows in _batches(len(x), epochs, seed):
        batch = F.pad(x[rows], (0, 1), value=1.0)  # (b, D + 1)
        logits = batch @ weight.flatten(0, 1).T  # (b, R·K)
        error = logits.view(-1, len(rates), classes).softmax(2) - F.one_hot(labels[rows], classes)[:, None]
        gradient = (error.flatten(1).T @ batch / len(rows)).view_as(weight)
        velocity.mul_(SGD_MOMENTUM).add_(gradient)
        weight.sub_(step * 0.1 ** sum(done >= m for m in SGD_MILESTONES) * velocity)
    return weight


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight[:, :-1], weight[:, -1])


def mlp_probe(bank: Array, labels: Labels, queries: Array, *, seed: int = 0, epochs: int = MLP_EPOCHS) -> Trained:
    """A network of one hidden layer, as DIM's: linear, dropout, BatchNorm, ReLU, linear. Arguments as `sgd_probe`'s."""
    bank, queries = standardise(bank, queries)
    names, numbers = np.unique(labels, return_inverse=True)
    x, y = torch.from_numpy(bank), torch.from_numpy(numbers)
    with seeded(seed), torch.enable_grad():
        net = nn.Sequential(
            nn.Linear(x.shape[1], MLP_UNITS),
            nn.Dropout(MLP_DROPOUT),
            nn.BatchNorm1d(MLP_UNITS),
            nn.ReLU(),
            nn.Linear(MLP_UNITS, len(names)),
        )
        optimizer = torch.optim.Adam(net.parameters(), MLP_RATE)
        for done, rows in _batches(len(x), epochs, seed):
            optimizer.param_groups[0]["lr"] = MLP_RATE * 0.1 ** sum(done >= m for m in MLP_MILESTONES)
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.inference_mode():
        parts = [net.eval()(part).argmax(1) for part in torch.from_numpy(queries).split(4096)]
    return Trained(names[torch.cat(parts).numpy()], MLP_RATE)


def _batches(n: int, epochs: int, seed: int) -> Iterator[tuple[float, Tensor]]:
    """(share of the epochs that is over, rows): every row once an epoch, in batches of about 256."""
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for rows in torch.randperm(n, generator=generator).chunk(max(1, round(n / BATCH))):
            look()
            yield epoch / epochs, rows
