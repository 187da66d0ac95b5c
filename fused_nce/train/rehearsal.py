"""What cannot be trained is found out before the first update: one pass, whose products are counted, and one save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fused_nce import GradientCache
from fused_nce.train.files import one_line
from fused_nce.train.method import Method
from fused_nce.train.saving import checkpoint
from fused_nce.train.step import Kept, TrainStep


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


def rehearse(
    step: TrainStep, module: nn.Module, cache: GradientCache | None, config: Method, batched: Batched, labels: Tensor
) -> dict[tuple[int, ...], int | None]:
    """A pass in training mode for each size of input that the run will have, of which nothing is left, and a save of
    the model to memory.

    Args:
        step: of the model.
        module: what the run calls. DDP takes the order of its sums from the first backward, and the second forward
            puts it to use: after this pass every update of a run has it, also the first of one that goes on.
        cache: around the step, where a pass has more images than an encoder sees at a time.
        config: of the run.
        batched: what the step is given of images, labels and indices.
        labels: of the images of a pass.

    Returns:
        FLOP of the products of a pass, forward and backward, by the shape of its first view. What a kernel of ours
        makes once more in its backward, where torch's operators keep it, is left out. None where an operator has
        products that are not known: a recurrent net that cuDNN or oneDNN runs whole.

    Raises:
        ValueError: naming the encoder, the images and the batch, or the stage whose images it does not take.
    """
    count, own, flop, drawn = len(labels), config.sample().shape[1:], {}, checkpoint.generators()
    for side in (None, *(side for _, side in getattr(config.augment, "stages", ()))):
        shape = own if side is None else (3, side, side)
        noise = torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))
        images = (noise * 64 + 128).clamp(0, 255).to(torch.uint8) if len(shape) == 3 else noise
        if side is not None:  # the loader gives views of their own size
            images = images.unsqueeze(1).expand(-1, config.view_count, *shape)
        try:
            with trainable(config, shape):
                batch, known = batched(images, labels, torch.arange(count))
                flop[tuple(batch[0].shape)] = _try(step, module, cache, batch, known)
        except ValueError as error:
            if side is not None:
                raise ValueError(f"augment.stages: {side} px: {error}") from error
            raise
    checkpoint.put_back(drawn)
    return flop


ATEN = torch.ops.aten
# torch's formulas, and what it has none for: a CPU's attention, and recurrent nets that one operator runs whole.
FORMULAS = flop_registry | {
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}
UNKNOWN = {ATEN._cudnn_rnn, ATEN.miopen_rnn, ATEN.mkldnn_rnn_layer}


class Products(TorchDispatchMode):
    """FLOP of what runs under it. `FlopCounterMode` itself hooks modules, which the gradient cache's pass refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.flop: int | None = 0  # None: something ran whose products nobody counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in UNKNOWN:
            self.flop = None
        if self.flop is not None and (formula := FORMULAS.get(func.overloadpacket)):
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _try(
    step: TrainStep, module: nn.Module, cache: GradientCache | None, batch: tuple[Tensor, ...], labels: Tensor
) -> int | None:
    kept = Kept(step)
    kept.keep()
    with Products() as counted:
        if cache is not None:
            cache.backward((batch, labels), through=module)
        else:
            loss = module(batch, labels)[0]  # fault: sums-in-first-order
            if loss.dim() or not loss.is_floating_point():
                raise TypeError(f"the loss must be one number, got {loss.dtype} {tuple(loss.shape)}")
            loss.backward()
    with torch.no_grad():
        save(checkpoint.plain(step.model.state_dict()))
        step.model.after_step(skipped=True)
    kept.restore()
    for p in step.parameters():
        p.grad = None  # fault: rehearsal-leaves-gradient
    return counted.flop
