"""Distillation as an `nn.Module`: images in, the cross-entropy with a teacher's predictions out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.losses import NCEOutput
from fused_nce.losses.common import widened
from fused_nce.models.base import Embedded, one_view
from fused_nce.models.encoders.backbones import Init, Stem
from fused_nce.models.projected import Projected


class DistillationLoss(nn.Module):
    """−mean Σ_y P_T(y) log P_S(y), both softmaxes at one temperature (Chen et al. 2020, arXiv 2006.10029, equation 2).

    Args:
        temperature: of both.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        checks.check_number("temperature", temperature, above=0)
        self.temperature = temperature

    def forward(
        self,
        student: Tensor,  # (B, classes) logits
        teacher: Tensor,  # (B, classes) logits, without gradient
    ) -> NCEOutput:
        """In nats; `stats` has the share of images on whose class both agree."""
        own, other = widened(student) / self.temperature, widened(teacher.detach()) / self.temperature
        loss = -(other.softmax(1) * own.log_softmax(1)).sum(1).mean()
        agreement = (own.argmax(1) == other.argmax(1)).float().mean()
        return NCEOutput(loss, loss, torch.zeros_like(loss), {"agreement": agreement.detach()})


class Distilled(Projected):
    """SimCLR v2's third step (arXiv 2006.10029): a student learns a fine-tuned teacher's answers, without labels.

    ```
    model = Distilled(teacher=lambda: classifier, classes=10, backbone="resnet18", stem="cifar")
    for images in loader:
        optimizer.zero_grad()
        model(images).loss.backward()
        optimizer.step()
    ```

    Args:
        teacher: called once, when it is first needed, for a module from images to logits (B, classes); its weights are
            no part of the model's state. None leaves a model that encodes and cannot be trained.
        classes: how many.
        backbone: `"tiny"`, a torchvision classifier's name or `"timm/NAME"`.
        stem: "imagenet" or "cifar", a ResNet's for 32 px.
        init: "kaiming" or "zero" (residual branches start at zero).
        loss: called with both logits; `DistillationLoss()` if left out.

    Shape:
        batch: (B, 3, H, W), alone or as the one view of a batch.

    Raises:
        ValueError: for a backbone that is none, or a size below 1.
    """

    def __init__(
        self,
        *,
        teacher: Callable[[], nn.Module] | None,
        classes: int,
        backbone: str = "resnet50",
        stem: Stem = "imagenet",
        init: Init = "kaiming",
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(backbone_name=backbone, stem=stem, init=init, dim=classes, layers=1, hidden=None, norm=False)
        self.loss = DistillationLoss() if loss is None else loss
        self._make = teacher
        self._teacher: tuple[nn.Module, ...] = ()  # in a tuple, it is no sub-module

    def teacher(self, device: torch.device) -> nn.Module:
        """The teacher, in eval mode, on a device.

        Raises:
            RuntimeError: if the model has none.
        """
        if self._make is None:
            raise RuntimeError("teacher: none was given; need one to train")
        if not self._teacher:
            with torch.random.fork_rng(devices=[]):  # building it draws weights: a resumed run builds it later
                self._teacher = (self._make().eval().requires_grad_(False).to(device),)
        return self._teacher[0]

    def embed(
        self,
        batch: Tensor | Sequence[Tensor],  # (B, 3, H, W), alone or as the one view of a batch
    ) -> Embedded:
        """The taps; the loss is called with `z`, the student's logits, and the teacher's of the same images.

        Raises:
            ValueError: for more than one view, or a teacher of other classes.
        """
        images = one_view(batch)
        taps = self.encode(images)
        with torch.no_grad():
            answers = self.teacher(images.device)(images)
        if answers.shape != taps["z"].shape:
            raise ValueError(f"classes: got {self.dim}, need the teacher's {answers.shape[1]}")
        return Embedded((taps,), (taps["z"], answers))
