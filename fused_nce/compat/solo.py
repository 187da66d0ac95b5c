"""solo-learn's contrastive losses (solo.losses, 1.0.6).

All but `mocov2plus_loss_func` take negatives from all processes wherever there are several: a process then has its own
part of the loss, and under DDP every gradient is that of one process on the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_nce.compat.base import tensor
from fused_nce.compat.processes import everyone, has_group
from fused_nce.core import checks
from fused_nce.core.engine import tile_loss
from fused_nce.core.tails import LogIn, Nce
from fused_nce.losses.common import check_rows, fixed_mean, inverse, normalized, widened
from fused_nce.losses.info_nce import info_nce
from fused_nce.losses.moco import SPEC as QUEUE
from fused_nce.losses.sup_con import SPEC as CLASSES


def simclr_loss_func(
    z: Tensor,  # (V·N, D)
    indexes: Tensor,  # (V·N,), integers
    temperature: float = 0.1,
) -> Tensor:
    """−mean_i log( Σ_pos e^s / Σ_{j≠i} e^s ), 0-d, in nats: the supervised form with its sum inside the log.

    Args:
        z: rows of all views, normalised here.
        indexes: equal for rows that are each other's positives: an image's number, or its class.
        temperature: of the softmax, > 0.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    checks.check_tensor("z", z, ("V·N", "D"))
    if tensor("indexes", indexes).is_floating_point() or indexes.is_complex():
        raise TypeError(f"indexes: got {indexes.dtype}, need integers")
    ids = indexes.to(z.device, torch.int64)
    checks.check_ids("indexes", ids, z.shape[0], "V·N", z.device)
    scale = inverse("temperature", temperature, z.device)
    found = tile_loss(normalized(z), None, CLASSES, LogIn(), scale=scale, row_ids=ids, group=everyone())
    # Upstream sums over the positives where equation 3 of SupCon averages: less log |P|, a number without a gradient.
    return found.loss - fixed_mean(found.rows["pos_count"].clamp(min=1).log())  # fault: solo-learn-positives-mean


def mocov2plus_loss_func(
    query: Tensor,  # (N, D)
    key: Tensor,  # (N, D)
    queue: Tensor,  # (D, K)
    temperature: float = 0.1,
) -> Tensor:
    """InfoNCE of each query between its key and the queue, 0-d: rows as they are. Keys and queue may have a gradient.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    check_rows("query", query, "key", key, same_n=True)
    checks.check_tensor("queue", queue, ("D", "K"))
    if queue.shape[0] != query.shape[1]:
        raise ValueError(f"queue: got width D = {queue.shape[0]}, need query's {query.shape[1]}")
    scale = inverse("temperature", temperature, query.device)
    with checks.uncast(query):
        positives = scale * (widened(query) * widened(key)).sum(dim=1, keepdim=True)
    return tile_loss(query, queue.t(), QUEUE, Nce(), scale=scale, positives=positives, parts=False).loss


moco_loss_func = mocov2plus_loss_func  # its name in 1.0.2


def mocov3_loss_func(
    query: Tensor,  # (N, D)
    key: Tensor,  # (N, D)
    temperature: float = 0.2,
) -> Tensor:
    """2·temperature·InfoNCE of the queries among the keys, 0-d; normalised here.

    The keys have a gradient only where there is no process group, as upstream.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    keys = key.detach() if has_group() else key
    found = info_nce(query, keys, temperature=temperature, normalize=True, group=everyone())
    return 2 * temperature * found.loss


def nnclr_loss_func(
    nn: Tensor,  # (N, D)
    p: Tensor,  # (N, D)
    temperature: float = 0.1,
) -> Tensor:
    """InfoNCE of the nearest neighbours among the predictions, 0-d; normalised here.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    return info_nce(nn, p, temperature=temperature, normalize=True, group=everyone()).loss
