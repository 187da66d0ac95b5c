"""open_clip's `ClipLoss` and `SigLipLoss` (open_clip.loss, 3.3), on one process."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fused_nce.compat.processes import check_ddp_compat
from fused_nce.core import checks
from fused_nce.losses.clip import clip_loss
from fused_nce.losses.siglip import siglip_loss

Result = Tensor | dict[str, Tensor]


def _alone(world_size: int) -> None:
    if world_size != 1:
        raise NotImplementedError(f"world_size: got {world_size}, need 1: no negatives cross processes yet")


def _scalar(x: float | Tensor) -> float | Tensor:
    """A number or a 0-d tensor, of one that may have one element, as open_clip's parameters may."""
    return x.reshape(()) if isinstance(x, Tensor) and x.numel() == 1 else x


def _result(loss: Tensor, output_dict: bool) -> Result:
    return {"contrastive_loss": loss} if output_dict else loss


class _Fused(nn.Module):
    """A loss whose scores are never held: a subclass that computes its own could not be heard, and is refused."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("get_logits", "get_ground_truth"):
            if name in vars(cls):
                raise TypeError(f"{cls.__name__}: got {name}, need open_clip's own class: this one holds no logits")


class ClipLoss(_Fused):
    """CLIP's loss of unit rows; the scale is already an exponential.

    Args:
        local_loss, gather_with_grad, rank, use_horovod: of several processes, without effect on one.
        cache_labels: there are no labels to cache.
        world_size: 1.
        ddp_compat: "upstream" or "exact": whether, among several processes, the embeddings' gradients are upstream's
            (1/W of the whole batch's by default) or the whole batch's. Without effect on one.

    Raises:
        NotImplementedError: for several processes.
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        ddp_compat: str = "upstream",
    ) -> None:
        super().__init__()
        _alone(world_size)
        self.ddp_compat = check_ddp_compat(ddp_compat)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Result:
        """The loss in nats, 0-d, or {"contrastive_loss": it}. A bias moves no softmax; its gradient is 0."""
        loss = clip_loss(image_features, text_features, _scalar(logit_scale)).loss
        if isinstance(logit_bias, Tensor):  # DDP stops at a parameter without a gradient
            loss = loss + 0 * logit_bias.sum()
        return _result(loss, output_dict)


class SigLipLoss(_Fused):
    """SigLIP's loss of unit rows.

    Args:
        cache_labels: there are no labels to cache.
        rank, dist_impl, bidir: of several processes, without effect on one.
        world_size: 1.
        chunk_size: memory is bounded anyway, see `fused_nce.workspace_bytes`.

    Raises:
        NotImplementedError: for several processes.
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        bidir: bool = True,
    ) -> None:
        super().__init__()
        _alone(world_size)
        checks.check_choice("dist_impl", dist_impl, (None, "bidir", "shift", "reduce", "gather"))
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size
        self.dist_impl, self.chunk_size, self.bidir = dist_impl or "bidir", chunk_size, bidir

    def forward(
        self,
        image_features: Tensor,  # (N, D)
        text_features: Tensor,  # (N, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Result:
        """The loss in nats, a sum over pairs divided by N, 0-d, or {"contrastive_loss": it}."""
        bias = 0.0 if logit_bias is None else _scalar(logit_bias)
        return _result(siglip_loss(image_features, text_features, _scalar(logit_scale), bias).loss, output_dict)
