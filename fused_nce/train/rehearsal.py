"""What cannot be trained is found out before the first update: one forward pass, and one save to memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import save
from torch import Tensor

from fused_nce.train import checkpoint
from fused_nce.train.files import one_line
from fused_nce.train.method import Method
from fused_nce.train.step import TrainStep


@contextmanager
def trainable(config: Method, shape: Sequence[int] | None = None) -> Iterator[None]:
    """Around what builds or runs a model: what others' code raises becomes one error that names the settings.

    Raises:
        ValueError: naming the encoder, the images and the batch.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).partition(":")[0].replace(".", "").isidentifier():
            raise  # a refusal of ours: it names the setting
        name = getattr(config.model, "backbone", config.method)
        sides = " x ".join(map(str, shape or config.sample().shape[1:]))
        raise ValueError(
            f"model: {name} cannot be trained on batches of {config.optim.batch_size} inputs of {sides}: "
            f"{type(error).__name__}: {one_line(str(error))}"
        ) from error


Batched = Callable[[Tensor, Tensor, Tensor], tuple[tuple[Tensor, ...], Tensor]]


def rehearse(step: TrainStep, config: Method, batched: Batched, labels: Tensor) -> None:
    """A forward pass in training mode for each size of input that the run will have, of which nothing is left, and a
    save of the model to memory.

    The caller puts the random generators back.

    Args:
        step: of the model.
        config: of the run.
        batched: what the step is given of images, labels and indices.
        labels: of at least a batch of images.

    Raises:
        ValueError: naming the encoder, the images and the batch, or the stage whose images it does not take.
    """
    count, own = config.optim.batch_size, config.sample().shape[1:]
    for side in (None, *(side for _, side in getattr(config.augment, "stages", ()))):
        shape = own if side is None else (3, side, side)
        noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))
        images = (noise * 64 + 128).clamp(0, 255).to(torch.uint8) if len(shape) == 3 else noise
        if side is not None:  # the loader gives views of their own size
            images = images.unsqueeze(1).expand(-1, config.view_count, *shape)
        try:
            with trainable(config, shape):
                _try(step, *batched(images, labels[:count], torch.arange(count)))
        except ValueError as error:
            if side is not None:
                raise ValueError(f"augment.stages: {side} px: {error}") from error
            raise


def _try(step: TrainStep, batch: tuple[Tensor, ...], labels: Tensor) -> None:
    buffers = [(buffer, buffer.clone()) for buffer in step.buffers()]
    with torch.no_grad():
        loss = step(batch, labels).loss
        if loss.dim() or not loss.is_floating_point():
            raise TypeError(f"the loss must be one number, got {loss.dtype} {tuple(loss.shape)}")
        save(checkpoint.plain(step.model.state_dict()))
        step.model.after_step(skipped=True)
        for buffer, before in buffers:
            buffer.copy_(before)
