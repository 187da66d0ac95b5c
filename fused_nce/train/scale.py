"""More negatives than one forward pass of one process has, encoders that keep less, and what accelerate is told."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, KwargsHandler
from torch import nn

from fused_nce import GradientCache
from fused_nce.core.group import Processes
from fused_nce.core.replay import checkpointed
from fused_nce.models.base import Model
from fused_nce.train.method import Method
from fused_nce.train.step import TrainStep


def handlers(config: Method) -> list[KwargsHandler]:
    """For `Accelerator`: DDP waits for every parameter unless told otherwise, a collective for `timeout_minutes`."""
    limit = timedelta(minutes=config.run.timeout_minutes, microseconds=1)  # to accelerate, 10 min sharp are no wish
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.leaves_some_unused())
    return [unused, InitProcessGroupKwargs(timeout=limit)]


def prepare(module: TrainStep, config: Method, world: int) -> TrainStep | GradientCache:
    """A step whose model takes negatives from everywhere, is synchronised or checkpointed; cached where asked for.

    Raises:
        ValueError: for a setting that this model or machine has no use for.
    """
    scale, model = config.scale, module.model
    if scale.everywhere and world > 1:
        loss: Any
        for loss in model.modules():
            if getattr(loss, "gathers", False):
                loss.group = Processes(ring=scale.ring)
    if scale.sync_norm and world > 1:
        if not torch.cuda.is_available():
            raise ValueError("scale.sync_norm: must be false without a GPU, got true")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if scale.checkpoint_activations:
        found = all_blocks(model)
        if not found:
            raise ValueError(f"scale.checkpoint_activations: must be false for {config.title}'s encoder, got true")
        for block in found:
            checkpointed(block)
    if scale.negatives is None:
        return module
    return GradientCache(module.begin, module.whole, part=config.optim.batch_size)


def all_blocks(model: Model, *, own: bool = True) -> list[nn.Module]:
    """Those of all encoders of a model: see `blocks`."""
    return [block for name in model.encoders for block in blocks(model.get_submodule(name), own=own)]


def blocks(encoder: nn.Module, *, own: bool = True) -> Iterator[nn.Module]:
    """The outermost composed modules in an encoder's sequences, and among its own parts: residual blocks, mostly.

    Args:
        encoder: to look into.
        own: its own parts too, which it may enter by another method than `forward`, as AMDIM's heads.
    """
    for child in encoder.children():
        if isinstance(child, nn.Sequential):
            yield from blocks(child)
        elif own and next(child.children(), None) is not None:
            yield child
