"""MoCo's InfoNCE against a queue (He, Fan, Wu, Xie, Girshick 2020, arXiv:1911.05722).

s = ⟨·,·⟩ / temperature of unit vectors; the positive is a query's own key, the negatives are the K keys of a queue and
nothing else. Only the queries have a gradient: two GEMMs, the fewest there can be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.spec import Separate, Spec
from fused_nce.core.tails import Nce
from fused_nce.losses.common import check_rows, dense_nce, inverse
from fused_nce.losses.module import LossModule
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, register

SPEC, TAIL = Spec(Separate(1), stats=Nce().stats), Nce()


def moco_nce(
    queries: Tensor,  # (N, D)
    keys: Tensor,  # (N, D)
    queue: Tensor,  # (K, D)
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    backend: str | None = None,
) -> NCEOutput:
    """InfoNCE of each query between its key and a queue of older keys, without holding the (N, 1 + K) logits.

    The queue may be written to before the backward: the gradients have left with the forward. `nce` is thus detached.

    Args:
        queries: (N, D), float64, 32, 16 or bfloat16.
        keys: (N, D), the keys of the same images; no gradient.
        queue: (K, D), K >= 1 rows of unit norm (`MemoryQueue.keys`), any float dtype; no gradient.
        temperature: of the softmax, > 0; a 0-d tensor is learnable.
        normalize: scale queries and keys to unit norm first; the queue is used as it is.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest.

    Returns:
        NCEOutput, in nats; chance is log(1 + K). `stats["top1"]` is the share of queries that choose their own key.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        queue = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
        moco_nce(torch.randn(8, 16), torch.randn(8, 16), queue).loss
        ```
    """
    check_rows("queries", queries, "keys", keys, same_n=True)
    checks.check_tensor("queue", queue, ("K", "D"))
    if queue.device != queries.device:
        raise ValueError(f"queue: got device {queue.device}, need queries's {queries.device}")
    if queue.shape[1] != queries.shape[1]:
        raise ValueError(f"queue: got width D = {queue.shape[1]}, need queries's {queries.shape[1]}")
    scale = inverse("temperature", temperature, queries.device)
    parts = loss_of(
        *(queries, queue.detach(), SPEC, TAIL),
        scale=scale,
        own_keys=keys.detach(),
        normalize=normalize,
        parts=False,
        backend=backend,
    )
    return NCEOutput(parts.loss, parts.nce, parts.penalty, parts.report)


class MoCoLoss(LossModule):
    """MoCo's InfoNCE against a queue (`moco_nce`), its settings kept.

    Args:
        temperature: of the softmax, > 0.
        normalize: scale queries and keys to unit norm first.
        backend: as in `moco_nce`.

    Shape:
        queries, keys: (N, D).
        queue: (K, D), without a gradient.

    Example:
        ```
        queue = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
        MoCoLoss()(torch.randn(8, 16), torch.randn(8, 16), queue).loss
        ```
    """

    def __init__(self, temperature: float = 0.07, *, normalize: bool = True, backend: str | None = None) -> None:
        super().__init__(temperature=temperature, normalize=normalize, backend=backend)
        inverse("temperature", temperature, torch.device("cpu"))

    def forward(self, queries: Tensor, keys: Tensor, queue: Tensor) -> NCEOutput:
        """`moco_nce` of the batch."""
        return moco_nce(queries, keys, queue, **self.kept())


def oracle(
    queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float | Tensor = 0.07, normalize: bool = True
) -> Tensor:
    """The loss as MoCo's builder writes it: logits of the positive and the queue, of which the first is right."""
    if normalize:
        queries, keys = (nn.functional.normalize(x, dim=1) for x in (queries, keys))
    both = dense_scores(queries, torch.cat((keys, queue)), 1 / temperature)
    n = len(queries)
    logits = torch.cat((both[:, :n].diagonal()[:, None], both[:, n:]), dim=1)
    right = (torch.arange(logits.shape[1]) == 0).expand_as(logits)
    return dense_nce(logits, right, ~right).mean()


def _draw(seed: int, size: Size) -> dict[str, Any]:
    return {
        "queries": features(seed, size.n, size.d, unit=True),
        "keys": features(seed + 1, size.n, size.d, unit=True),
        "queue": features(seed + 2, size.m, size.d, unit=True),
        "temperature": torch.tensor(0.2),
        "normalize": False,
    }


register(
    Entry(
        moco_nce,
        MoCoLoss,
        "mean_i −log(e^(s_i⁺) / (e^(s_i⁺) + Σ_queue e^s))",
        "He et al. 2020, arXiv:1911.05722",
        _draw,
        oracle,
        frozen=("keys", "queue"),
        two_paths=("queries",),
    )
)
