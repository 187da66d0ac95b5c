"""open_clip's `ClipLoss` and `SigLipLoss` (open_clip.loss, 3.3), on one process or many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.compat.processes import check_ddp_compat, check_world, gathered, gradient_times, mean_of_all
from fused_nce.core import checks
from fused_nce.core.group import Processes
from fused_nce.losses.clip import clip_loss
from fused_nce.losses.info_nce import info_nce
from fused_nce.losses.siglip import siglip_loss

Result = Tensor | dict[str, Tensor]


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

    Among W processes each computes its own part, whatever the settings: they say what is reported and which gradients
    are upstream's. With gather_with_grad those are, under DDP, the whole batch's. By default upstream's embeddings have
    1/W of them while the scale has all of its own, and with local_loss alone they lack the other processes' terms.

    Args:
        local_loss: report this process's part of the loss, not the whole batch's.
        gather_with_grad: see above.
        cache_labels: there are no labels to cache.
        rank: of this process in the default group, where world_size > 1.
        world_size: 1, for negatives of this process alone, or the size of the default group.
        use_horovod: on one process only.
        ddp_compat: "upstream" for those gradients, "exact" for the whole batch's with any settings.

    Raises:
        NotImplementedError: for several of Horovod's processes.
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
        if use_horovod and world_size > 1:
            raise NotImplementedError(f"use_horovod: got True for {world_size} processes, need torch.distributed")
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
        scale = _scalar(logit_scale)
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, scale).loss
        else:
            check_world(self.world_size, self.rank)
            loss = self._among_processes(image_features, text_features, scale)
        if isinstance(logit_bias, Tensor):  # DDP stops at a parameter without a gradient
            loss = loss + 0 * logit_bias.sum()
        return _result(loss, output_dict)

    def _among_processes(self, image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        """This process's part of the loss, or the value of the whole."""
        exact = self.ddp_compat == "exact" or self.gather_with_grad
        if self.local_loss and not exact:  # the other processes' rows are constants to both directions
            mine = torch.arange(len(image), device=image.device) + self.rank * len(image)
            there = info_nce(image, gathered(text), mine, temperature=1 / scale).loss
            back = info_nce(text, gathered(image), mine, temperature=1 / scale).loss
            return (there + back) / 2
        share = 1 if exact else 1 / self.world_size
        loss = clip_loss(gradient_times(image, share), gradient_times(text, share), scale, group="world").loss
        return loss if self.local_loss else mean_of_all(loss)


class SigLipLoss(_Fused):
    """SigLIP's loss of unit rows.

    Args:
        cache_labels: there are no labels to cache.
        rank: of this process in the default group, where world_size > 1.
        world_size: 1, for negatives of this process alone, or the size of the default group.
        dist_impl, bidir: how upstream's texts travel; all of its ways have one result. "shift" and "bidir" pass them
            round here too, so that none holds them all; "gather" and "reduce" gather.
        chunk_size: memory is bounded anyway, see `fused_nce.workspace_bytes`.

    Raises:
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
        if self.world_size > 1:
            check_world(self.world_size, self.rank)
        group = None if self.world_size == 1 else Processes(ring=self.dist_impl in ("bidir", "shift"))
        loss = siglip_loss(image_features, text_features, _scalar(logit_scale), bias, group=group).loss
        return _result(loss, output_dict)
