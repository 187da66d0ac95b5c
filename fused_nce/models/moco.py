"""MoCo as an `nn.Module`: two views in, losses out; one process or many, a CPU or GPUs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fused_nce.core import checks
from fused_nce.core.group import gathered, world_size
from fused_nce.losses import MemoryQueue, MoCoLoss
from fused_nce.losses.common import widened
from fused_nce.models import processes
from fused_nce.models.base import Embedded, Pending, split_views
from fused_nce.models.encoders.backbones import Init, Stem
from fused_nce.models.encoders.split_norm import split_batch_norm
from fused_nce.models.projected import Projected


class MoCo(Projected):
    """Momentum Contrast (arXiv 1911.05722); with `layers=2` the head of v2 (arXiv 2003.04297).

    ```
    model = MoCo(backbone="resnet18", stem="cifar", layers=2, queue_size=4096, momentum=0.99, splits=8)
    optimizer = torch.optim.SGD(model.trained_parameters(), lr=0.06, momentum=0.9)
    for queries, keys in loader:                   # two augmentations of the same images
        optimizer.zero_grad()
        model((queries, keys)).loss.backward()
        optimizer.step()
        model.after_step()                         # the key encoder and the queue
    ```

    The key encoder is a moving average of the parameters; its BatchNorm statistics are of its own passes. A query and
    its key must not meet in one BatchNorm batch, or it tells them by their statistics: keys are encoded in a random
    order, over all processes, and given back in their own. On one process that needs `splits`.

    Args:
        backbone: `"tiny"`, a torchvision classifier's name or `"timm/NAME"`.
        stem: "imagenet" or "cifar", a ResNet's for 32 px.
        init: "kaiming" or "zero" (residual branches start at zero).
        dim: width of the projections.
        layers: of the head: 1 (v1) or 2 (v2).
        hidden: width of its layers but the last; the features' if None.
        queue_size: K, keys that are kept.
        momentum: of the key encoder.
        splits: parts of a batch that have BatchNorm statistics of their own.
        symmetric: the mean of both directions, each view once the query.
        loss: called with `(queries, keys, queue)`; `MoCoLoss()` if left out.

    Shape:
        batch: (B, 2, 3, H, W), or two tensors (B, 3, H, W): queries' and keys' views.

    Raises:
        ValueError: for a backbone that is none, or a number out of its range.
    """

    memories = ("queue",)

    def __init__(
        self,
        *,
        backbone: str = "resnet50",
        stem: Stem = "imagenet",
        init: Init = "kaiming",
        dim: int = 128,
        layers: int = 1,
        hidden: int | None = None,
        queue_size: int = 65536,
        momentum: float = 0.999,
        splits: int = 1,
        symmetric: bool = False,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(
            backbone_name=backbone, stem=stem, init=init, dim=dim, layers=layers, hidden=hidden, norm=False
        )
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: must be in [0, 1], got {momentum}")
        if checks.checked_int("splits", splits, at_least=1) > 1:
            split_batch_norm(self.encoder, splits)
        self.momentum, self.splits, self.symmetric = momentum, splits, symmetric
        self.key_encoder = copy.deepcopy(nn.Sequential(self.encoder, self.head)).requires_grad_(False)
        self.queue = MemoryQueue(queue_size, dim)
        self.loss = MoCoLoss() if loss is None else loss
        self._pending: Pending[Tensor] = Pending()

    def embed(
        self,
        batch: Tensor | Sequence[Tensor],  # (B, 2, 3, H, W), or two tensors (B, 3, H, W): queries' and keys' views
    ) -> Embedded:
        """The taps of the queries' views; the loss is called with their `z`, the keys and the queue.

        Raises:
            ValueError: if there are not two views of one shape, or only one image.
            RuntimeError: if `after_step` was never called.
        """
        view1, view2 = split_views(batch)
        # Each view a batch of its own: query and key of an image must not share statistics.
        taps = (self.encode(view1), self.encode(view2)) if self.symmetric else (self.encode(view1),)
        keys = [self._keys(view) for view in ((view2, view1) if self.symmetric else (view2,))]
        own = torch.cat(keys)
        if self.training:
            # fault: key-own-negative
            self._pending.add(keys[0])  # one key an image: its second would be a near copy
        return Embedded(taps, (torch.cat([view["z"] for view in taps]), own, self.queue.keys))

    @torch.no_grad()
    def _keys(
        self,
        view: Tensor,  # (B, 3, H, W)
    ) -> Tensor:  # (B, dim) unit rows, in the parameters' dtype
        if self.training and (self.splits > 1 or world_size() > 1):
            shuffled, order = processes.shuffle(view)
            encoded = processes.unshuffle(self.key_encoder(shuffled), order)  # fault: keys-order-shuffle
        else:
            encoded = self.key_encoder(view)
        return functional.normalize(widened(encoded), dim=1).to(next(self.key_encoder.parameters()).dtype)

    @torch.no_grad()
    def after_step(self, *, skipped: bool = False) -> None:
        """θ_k ← m·θ_k + (1 − m)·θ_q, and the keys of all processes into the queue."""
        pending = self._pending.take()
        if skipped:  # fault: skipped-update-moves
            return
        ours = (*self.encoder.parameters(), *self.head.parameters())
        for key, query in zip(self.key_encoder.parameters(), ours, strict=True):
            key.mul_(self.momentum).add_(query, alpha=1 - self.momentum)  # fault: key-encoder-follows
        for keys in pending:
            self.queue.update(gathered(keys))
