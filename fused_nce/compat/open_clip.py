"""open_clip's `ClipLoss` and `SigLipLoss` (open_clip.loss, 3.3), on one process or many."""

from __future__ import annotations

import torch
import torch.distributed.nn
from torch import Tensor

from fused_nce.compat.base import Adapter, scalar
from fused_nce.compat.processes import check_ddp_compat, check_world, gradient_times, mean_of_all
from fused_nce.core import checks
from fused_nce.core.group import Group, Processes, gathered
from fused_nce.losses.clip import clip_loss
from fused_nce.losses.info_nce import info_nce
from fused_nce.losses.siglip import siglip_loss

Result = Tensor | dict[str, Tensor]


def _result(loss: Tensor, output_dict: bool) -> Result:
    return {"contrastive_loss": loss} if output_dict else loss


def _logits(q: Tensor, k: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
    scores = scale * q @ k.T
    return scores if bias is None else scores + bias


def _siglip(
    image: Tensor, text: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None, group: Group
) -> Tensor:
    bias = 0.0 if logit_bias is None else scalar(logit_bias, image)
    return siglip_loss(image, text, scalar(logit_scale, image), bias, group=group).loss


class ClipLoss(Adapter):
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

    HOOKS = ("get_logits", "get_ground_truth")
    SHOWN = ("local_loss", "gather_with_grad", "rank", "world_size", "ddp_compat")

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
        scale = scalar(logit_scale, image_features)
        if self.world_size == 1:
            loss = clip_loss(image_features, text_features, scale).loss
        else:
            check_world(self.world_size, self.rank)
            loss = self._among_processes(image_features, text_features, scale)
        if isinstance(logit_bias, Tensor):  # DDP stops at a parameter without a gradient
            loss = loss + 0 * logit_bias.sum().to(loss.device)
        return _result(loss, output_dict)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """(num_logits,) classes of the rows of `get_logits`."""
        shift = self.rank * num_logits if self.world_size > 1 and self.local_loss else 0
        return torch.arange(num_logits, device=device) + shift

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All scores, images by texts and texts by images, held in memory. The loss itself does not call this."""
        images, texts = (self._of_all(x) for x in (image_features, text_features))
        if self.world_size > 1 and not self.local_loss:
            logits = _logits(images, texts, logit_scale, logit_bias)
            return logits, logits.T
        there = _logits(image_features, texts, logit_scale, logit_bias)
        return there, _logits(text_features, images, logit_scale, logit_bias)

    def _of_all(self, x: Tensor) -> Tensor:
        """The rows of all processes, with the gradient that upstream's settings give them."""
        if self.world_size == 1:
            return x
        check_world(self.world_size, self.rank)
        if self.gather_with_grad:
            return torch.cat(torch.distributed.nn.functional.all_gather(x))
        parts = list(gathered(x).chunk(self.world_size))
        if not self.local_loss:
            parts[self.rank] = x
        return torch.cat(parts)

    def _among_processes(self, image: Tensor, text: Tensor, scale: float | Tensor) -> Tensor:
        """This process's part of the loss, or the value of the whole."""
        exact = self.ddp_compat == "exact" or self.gather_with_grad
        # fault: processes-cliploss-local_loss
        if self.local_loss and not exact:  # the other processes' rows are constants to both directions
            mine = torch.arange(len(image), device=image.device) + self.rank * len(image)
            there = info_nce(image, gathered(text), mine, temperature=1 / scale).loss
            back = info_nce(text, gathered(image), mine, temperature=1 / scale).loss
            return (there + back) / 2
        share = 1 if exact else 1 / self.world_size  # fault: processes-cliploss-has
        loss = clip_loss(gradient_times(image, share), gradient_times(text, share), scale, group="world").loss
        return loss if self.local_loss else mean_of_all(loss)  # fault: processes-cliploss-reports


class SigLipLoss(Adapter):
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

    HOOKS = ("get_logits", "get_ground_truth", "_loss", "_chunked_loss")
    SHOWN = ("rank", "world_size", "dist_impl")

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
        if self.world_size > 1:
            check_world(self.world_size, self.rank)
        group = None if self.world_size == 1 else Processes(ring=self.dist_impl in ("bidir", "shift"))
        return _result(_siglip(image_features, text_features, logit_scale, logit_bias, group), output_dict)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The loss of this process's pairs; with `negative_only` of the same pairs as if none belonged together."""
        loss = _siglip(image_features, text_features, logit_scale, logit_bias, None)
        if negative_only:  # softplus(s) − softplus(−s) is s
            s = logit_scale * (image_features * text_features).sum(dim=1) + (0.0 if logit_bias is None else logit_bias)
            loss = loss + s.mean()
        return loss

    _chunked_loss = _loss

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """(num_logits, num_logits): 1 on the diagonal and −1 elsewhere, or everywhere."""
        signs = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return signs if negative_only else signs.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:
        """All scores, held in memory. The loss itself does not call this."""
        return _logits(image_features, text_features, logit_scale, logit_bias)
