"""Contrastive predictive coding as an `nn.Module`: waveforms or images in, losses out; no trainer needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.losses import CPCLoss, NCEOutput, cpc_nce
from fused_nce.losses.module import LossModule
from fused_nce.models.base import Embedded, Model, check_floats, check_images, one_view
from fused_nce.models.encoders.cpc import AudioEncoder, GRUContext, NoContext, PatchEncoder, PixelCNN

NEGATIVES = ("batch", "sequence", "sampled")


class SampledCPCLoss(LossModule):
    """`cpc_nce` of one step against `count` negatives a prediction, drawn with replacement from the other targets.

    Greedy InfoMax's code (Löwe et al. 2019) draws 10 for audio and 16 for images. At chance the loss is log(1 + count).

    Args:
        count: negatives of each prediction.
        backend: as `cpc_nce`'s.

    Raises:
        ValueError: for a count below 1.
    """

    def __init__(self, count: int = 10, *, backend: str | None = None) -> None:
        super().__init__(count=checks.checked_int("sampled", count, at_least=1), backend=backend)

    def forward(
        self,
        predictions: Tensor,  # (1, N, D)
        targets: Tensor,  # (1, N, D)
    ) -> NCEOutput:
        """The loss of a step.

        Raises:
            ValueError: for a single target, which has no negative.
        """
        n = targets.shape[1]
        if n < 2:
            raise ValueError(f"targets: got N = {n}, need at least 2: one has no negatives")
        drawn = torch.randint(n - 1, (n, self.count), device=targets.device)
        drawn = drawn + (drawn >= torch.arange(n, device=targets.device)[:, None])  # never its own
        return cpc_nce(predictions, targets, negatives=drawn, backend=self.backend)


class EachStep(nn.Module):
    """The mean of a loss over prediction steps that differ in their number of positions.

    Args:
        loss: called once a step, with predictions and targets (1, N, D) and, if there are any, groups (N,).
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *steps: tuple[Tensor, ...]) -> NCEOutput:
        """`stats` has the loss's own, a mean over the steps, and "step1/nce", "step1/top1" and so on of each."""
        parts = [self.loss(prediction[None], target[None], *groups) for prediction, target, *groups in steps]
        loss, nce, penalty = (torch.stack(list(column)).mean() for column in zip(*(p[:3] for p in parts), strict=True))
        # The loss was given one step at a time, and calls each the first: its names for a step are of no use.
        each = [{"nce": p.nce.detach()} | {n: x for n, x in p.stats.items() if "/" not in n} for p in parts]
        stats = {name: torch.stack([found[name] for found in each]).mean() for name in each[0]}
        stats |= {f"step{k}/{name}": x for k, found in enumerate(each, 1) for name, x in found.items()}
        return NCEOutput(loss, nce, penalty, stats)


class CPC(Model):
    """Contrastive predictive coding (van den Oord, Li, Vinyals 2018, arXiv:1807.03748).

    ```
    model = CPC.audio()                                       # or CPC.vision(image_size=64, patch_size=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    for waveforms in loader:                                  # (B, 20480)
        optimizer.zero_grad()
        model(waveforms).loss.backward()
        optimizer.step()
    ```

    Row r of the context predicts rows r + skip + 1 to r + skip + K of z, each by a matrix of its own, W_k c, without
    bias, norm or temperature. Each prediction is classified among the targets of its step, its own being the positive.
    The loss is the mean over the K steps, each of which counts once, whatever its number of positions.

    Args:
        encoder: makes z (B, D, R, W), and has `channels`.
        context: makes c (B, C, R, W) of which row r has not seen a later row of z, and has `channels`.
        steps: K.
        skip: rows left out before the first prediction. 1 for images, whose patches share a half with the next row's.
        negatives: "batch", every other target of the step; "sequence", those of the prediction's own sequence or
            image; or "sampled", a few of the batch, drawn for each prediction.
        sampled: how many of "sampled".
        loss: called with predictions and targets (1, N, D), and in "sequence" the sequence of each (N,), once a step;
            `CPCLoss` or `SampledCPCLoss` if left out. The model's `loss` wraps it.

    Shape:
        batch: (B, samples), (B, 1, samples) or (B, C, H, H), alone or as the one view.

    Raises:
        TypeError, ValueError: for a setting outside these.
    """

    encoders = ("encoder", "context")

    def __init__(
        self,
        *,
        encoder: nn.Module,
        context: nn.Module,
        steps: int,
        skip: int = 0,
        negatives: str = "batch",
        sampled: int = 10,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice("negatives", negatives, NEGATIVES)
        checks.checked_int("steps", steps, at_least=1)
        checks.checked_int("skip", skip, at_least=0)
        side = getattr(encoder, "side", None)
        if side is not None and skip + steps >= side:
            raise ValueError(f"steps: must be below the grid's {side} rows less skip = {skip}, got {steps}")
        self.encoder, self.context = encoder, context
        self.steps, self.skip, self.negatives = steps, skip, negatives
        width: Any = encoder.channels
        self.predict = nn.ModuleList(nn.Linear(context.channels, width, bias=False) for _ in range(steps))  # type: ignore[arg-type]
        if loss is None:
            loss = SampledCPCLoss(sampled) if negatives == "sampled" else CPCLoss(negatives=negatives)
        self.loss = EachStep(loss)

    @classmethod
    def audio(
        cls,
        *,
        channels: int = 512,
        kernels: Sequence[int] = (10, 8, 4, 4, 4),
        strides: Sequence[int] = (5, 4, 2, 2, 2),
        paddings: Sequence[int] = (2, 2, 2, 2, 1),
        hidden: int = 256,
        steps: int = 12,
        **options: Any,
    ) -> CPC:
        """The audio model; the defaults are the paper's, for 16 kHz. `options` are the constructor's."""
        encoder = AudioEncoder(channels, kernels, strides, paddings)
        return cls(encoder=encoder, context=GRUContext(channels, hidden), steps=steps, **options)

    @classmethod
    def vision(
        cls,
        *,
        image_size: int = 64,
        patch_size: int = 16,
        image_channels: int = 3,
        width: int = 64,
        stages: Sequence[int] = (3, 4, 6),
        stem: str = "small",
        jitter: int = 0,
        context: str = "pixelcnn",
        hidden: int | None = None,
        layers: int = 4,
        steps: int = 5,
        skip: int = 1,
        **options: Any,
    ) -> CPC:
        """The image model. The paper's is 256 px, patches of 64, stages 3, 4, 23, stem "large", jitter 4.

        Args:
            image_size: px.
            patch_size: px; a quarter of the image gives 7×7.
            image_channels: of the images; 1 for grayscale.
            width: channels of the first layer.
            stages: residual blocks of the three stages.
            stem: "small" or "large".
            jitter: of the patches, px.
            context: "pixelcnn", "gru" or "none".
            hidden: channels of the context; as many as z has if left out.
            layers: of the PixelCNN.
            steps: K rows.
            skip: rows left out.
            options: the constructor's.
        """
        encoder = PatchEncoder(
            image_size=image_size, patch_size=patch_size, image_channels=image_channels, width=width, stages=stages,
            stem=stem, jitter=jitter,
        )  # fmt: skip
        checks.check_choice("context", context, ("pixelcnn", "gru", "none"))
        hidden = hidden or encoder.channels
        contexts = {
            "pixelcnn": lambda: PixelCNN(encoder.channels, hidden, layers),
            "gru": lambda: GRUContext(encoder.channels, hidden),
            "none": lambda: NoContext(encoder.channels),
        }
        return cls(encoder=encoder, context=contexts[context](), steps=steps, skip=skip, **options)

    def encode(
        self,
        x: Tensor,  # (B, samples) or (B, 1, samples), or (B, C, H, H)
    ) -> dict[str, Tensor]:
        """Features of a batch.

        Returns:
            `z_t` and `c_t`: (B, D, frames) and (B, hidden, frames) of audio; (B, D, 7, 7) and (B, hidden, 7, 7) of
            images.

        Raises:
            ValueError: for images of another size, or waveforms that are too short.
        """
        return _taps(*self._grids(x))

    def embed(
        self,
        batch: Tensor | Sequence[Tensor],  # (B, samples), (B, 1, samples) or (B, C, H, H), alone or as the one view
    ) -> Embedded:
        """The taps; and of each step predictions and targets (N, D) of all positions, with groups if there are any.

        Raises:
            ValueError: for more than one view, fewer rows than the farthest prediction needs, or no negative.
        """
        x = one_view(batch)
        z, c = self._grids(x)
        images, _, rows, columns = z.shape
        farthest = self.skip + self.steps
        if rows <= farthest:
            raise ValueError(f"x: gives {rows} rows, need more than skip + steps = {farthest}")
        if (1 if self.negatives == "sequence" else images) * (rows - farthest) * columns < 2:
            raise ValueError(f"x: {tuple(x.shape)} leaves the farthest step no negative, need more rows")
        steps = []
        for k, predict in enumerate(self.predict, 1):
            ahead = self.skip + k
            predictions, targets = predict(_positions(c[:, :, : rows - ahead])), _positions(z[:, :, ahead:])
            own = torch.arange(images, device=x.device).repeat_interleave(len(targets) // images)
            steps.append((predictions, targets, *((own,) if self.negatives == "sequence" else ())))
        return Embedded((_taps(z, c),), tuple(steps))

    def _grids(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (B, D, R, W), (B, C, R, W)
        _check(self.encoder, x)
        z = self.encoder(x)
        return z, self.context(z)


def _taps(z: Tensor, c: Tensor) -> dict[str, Tensor]:
    """By name; a grid of one column loses that axis."""
    return {"z_t": z, "c_t": c} if z.shape[3] > 1 else {"z_t": z.squeeze(3), "c_t": c.squeeze(3)}


def _positions(grid: Tensor) -> Tensor:  # (B, D, R, W) -> (B·R·W, D)
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def _check(encoder: nn.Module, x: Tensor) -> None:
    """Refuse inputs that our encoders cannot take; an injected encoder checks its own."""
    if isinstance(encoder, PatchEncoder):
        check_images(x, encoder.image_size, encoder.image_channels)
    elif isinstance(encoder, AudioEncoder):
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] != 1):
            raise ValueError(f"x: must be (B, samples) or (B, 1, samples) waveforms, got {tuple(x.shape)}")
        if encoder.frames(x.shape[-1]) < 1:
            raise ValueError(f"x: {x.shape[-1]} samples give no frame")
        check_floats(x, "waveforms")
