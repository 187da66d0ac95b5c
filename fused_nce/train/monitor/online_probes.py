"""Two classifiers trained beside the encoder, on detached features: they show progress, and change nothing."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, DROPOUT = 1024, 0.2
LOGIT_CLIP, LOGIT_PENALTY = 10.0, 1e-3
NO_LABEL = -1


class ProbeOutput(NamedTuple):
    """The loss to add, and how many of how many labelled images each classifier got right."""

    loss: Tensor  # 0-d
    correct: Tensor  # (2,) linear, MLP
    labelled: Tensor  # 0-d


class OnlineProbes(nn.Module):
    """A linear classifier and an MLP on the top features, as amdim-public trains them.

    Args:
        width: of the features.
        classes: number of labels.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"classes: must be at least 2, got {classes}")
        self.linear = nn.Linear(width, classes)
        self.mlp = nn.Sequential(
            nn.Dropout(DROPOUT),
            nn.Linear(width, HIDDEN, bias=False),
            nn.BatchNorm1d(HIDDEN),
            nn.ReLU(inplace=True),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, classes),
        )

    def forward(
        self,
        features: Tensor,  # (B, width, ...) of size 1 beyond; detached here
        labels: Tensor,  # (B,) int64, −1 for none
    ) -> ProbeOutput:
        x = features.detach().flatten(1)  # fault: online-probes-train
        logits = torch.stack((self.linear(x), self.mlp(x))).float()  # (2, B, classes)
        known = labels != NO_LABEL
        hits = (logits.argmax(-1) == labels) & known
        return ProbeOutput(sum_losses(logits, labels, known), hits.sum(1), known.sum())


def sum_losses(
    logits: Tensor,  # (2, B, classes)
    labels: Tensor,  # (B,)
    known: Tensor,  # (B,) bool
) -> Tensor:  # 0-d
    """Cross-entropy of softly clipped logits (mean over the labelled) plus a penalty on the raw ones, probes summed."""
    clipped = LOGIT_CLIP * torch.tanh(logits / LOGIT_CLIP)
    target = labels.expand(2, -1)
    losses = F.cross_entropy(clipped.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=NO_LABEL)
    return losses / known.sum().clamp(min=1) + LOGIT_PENALTY * logits.square().mean((1, 2)).sum()
