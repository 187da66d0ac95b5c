"""What DIM's paper measures of a code beside accuracy: its information on the image, and between its own units.

Both are Donsker-Varadhan bounds, in nats. The critic is trained on the probe split and the bound taken on the test
split, which it has not seen: on the critic's own images it would count what was learned by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_nce.losses import MINELoss, mine_dv
from fused_nce.train.evaluation.features import mean_and_sd
from fused_nce.train.seeded import seeded

SHUFFLES = 5  # of the test split, for the mean over pairs drawn apart
MINE_UPDATES, MINE_BATCH, MINE_RATE, MINE_AVERAGE = 1500, 128, 5e-4, 0.01
NDM_UPDATES, NDM_BATCH, NDM_RATE = 1000, 512, 1e-3  # the paper: batches of 10,000 at 1e-4


class ImageCritic(nn.Module):
    """A score of an image and a code: three convolutions, then a network of two hidden layers on both.

    Args:
        width: D of the code.
        channels: of the first convolution.
    """

    def __init__(self, width: int, channels: int = 32) -> None:
        super().__init__()
        c = (3, channels, 2 * channels, 4 * channels)
        layers = [m for i in range(3) for m in (nn.Conv2d(c[i], c[i + 1], 4, 2, 1), nn.ReLU())]
        self.image = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * c[3], 512))
        self.code = nn.Linear(width, 512, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))

    def score(
        self,
        seen: Tensor,  # (B, 512), from `image`
        code: Tensor,  # (B, D)
    ) -> Tensor:  # (B,)
        scores: Tensor = self.rest(seen + self.code(code)).squeeze(1)  # the first layer on both, side by side
        return scores


def mine(
    bank: Tensor,  # (n, D) codes of the probe split, standardised
    images: Tensor,  # (n, 3, H, W) uint8
    queries: Tensor,  # (m, D) of the test split
    tests: Tensor,  # (m, 3, H, W) uint8
    *,
    seed: int,
    updates: int = MINE_UPDATES,
) -> float:
    """A lower bound on I(image; code) (MINE), of the test split, in nats."""

    def pixels(x: Tensor) -> Tensor:
        return x.float() / 127.5 - 1

    with seeded(seed):
        critic, loss = ImageCritic(bank.shape[1]), MINELoss(MINE_AVERAGE)
        with torch.enable_grad():
            optimizer = torch.optim.Adam(critic.parameters(), MINE_RATE)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
            for _ in range(updates):
                rows = torch.randperm(len(bank))[:MINE_BATCH]
                seen, codes = critic.image(pixels(images[rows])), bank[rows]
                optimizer.zero_grad()
                loss(critic.score(seen, codes), critic.score(seen, codes.roll(1, 0))).loss.backward()
                optimizer.step()
                schedule.step()
        with torch.inference_mode():
            seen = torch.cat([critic.image(pixels(part)) for part in tests.split(256)])
            apart = [critic.score(seen, queries[_elsewhere(len(queries))]) for _ in range(SHUFFLES)]
            return float(mine_dv(critic.score(seen, queries), torch.cat(apart)).stats["mi_bound"])


def ndm(
    bank: Tensor,  # (n, D) codes of the probe split
    queries: Tensor,  # (m, D) of the test split
    *,
    seed: int,
    updates: int = NDM_UPDATES,
) -> float:
    """The neural dependency measure: how far a code's units are from independent, of the test split, in nats.

    The joint of the units against the product of their marginals, each unit shuffled over the batch by itself; a
    network of 1000 and 200 units, trained on the f-GAN bound of the KL divergence, judged by Donsker and Varadhan's.
    """
    with seeded(seed):
        net = nn.Sequential(
            nn.Linear(bank.shape[1], 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1)
        )
        with torch.enable_grad():
            optimizer = torch.optim.Adam(net.parameters(), NDM_RATE)
            schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [updates // 2, 3 * updates // 4], 0.1)
            for _ in range(updates):
                codes = bank[torch.randint(len(bank), (NDM_BATCH,))]
                optimizer.zero_grad()
                ((net(shuffled(codes)) - 1).exp().mean() - net(codes).mean()).backward()
                optimizer.step()
                schedule.step()
        with torch.inference_mode():
            apart = torch.cat([net(shuffled(queries)) for _ in range(SHUFFLES)]).squeeze(1)
            return float(mine_dv(net(queries).squeeze(1), apart).stats["mi_bound"])


def shuffled(
    codes: Tensor,  # (n, D)
) -> Tensor:
    """Permutes each column by itself: keeps the marginals, removes the dependence."""
    return codes.gather(0, torch.rand_like(codes).argsort(0))


def _elsewhere(count: int) -> Tensor:
    """For each row, the number of another row."""
    return (torch.arange(count) + torch.randint(1, count, (count,))) % count


def standardised(
    bank: Tensor,  # (n, D)
    queries: Tensor,  # (m, D)
) -> tuple[Tensor, Tensor]:
    """Standardises both by the bank's mean and deviation; both measures are invariant to this."""
    mean, sd = mean_and_sd(bank)
    return (bank - mean) / sd, (queries - mean) / sd
