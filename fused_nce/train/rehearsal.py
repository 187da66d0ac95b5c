"""What cannot be trained is found out before the first update: one forward pass, and one save to memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import save
from torch import Tensor

from fused_nce.train import checkpoint
from fused_nce.train.files import one_line
from fused_nce.train.method import Method
from fused_nce.train.step import TrainStep


@contextmanager
def trainable(config: Method) -> Iterator[None]:
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
        shape = " x ".join(map(str, config.sample().shape[1:]))
        raise ValueError(
            f"model: {name} cannot be trained on batches of {config.optim.batch_size} inputs of {shape}: "
            f"{type(error).__name__}: {one_line(str(error))}"
        ) from error


def rehearse(step: TrainStep, config: Method, batch: tuple[Tensor, ...], labels: Tensor) -> None:
    """A forward pass in training mode, of which nothing is left, and a save of the model to memory.

    The caller puts the random generators back.

    Raises:
        ValueError: naming the encoder, the images and the batch.
    """
    buffers = [(buffer, buffer.clone()) for buffer in step.buffers()]
    with trainable(config), torch.no_grad():
        loss = step(batch, labels).loss
        if loss.dim() or not loss.is_floating_point():
            raise TypeError(f"the loss must be one number, got {loss.dtype} {tuple(loss.shape)}")
        save(checkpoint.plain(step.model.state_dict()))
        step.model.after_step(skipped=True)
        for buffer, before in buffers:
            buffer.copy_(before)
