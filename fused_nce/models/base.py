"""The interface of every model, for our training loop or yours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn


class Losses(Protocol):
    """What a loss returns: the number to minimise, its two parts, and detached statistics for logging."""

    loss: Tensor
    nce: Tensor
    penalty: Tensor
    stats: dict[str, Tensor]


class Embedded(NamedTuple):
    """What a model has computed of a batch before the loss.

    Attributes:
        taps: of each encoded view, by the encoder that is trained.
        inputs: the arguments of the loss.
    """

    taps: tuple[dict[str, Tensor], ...]
    inputs: tuple[Any, ...]


T = TypeVar("T")
MAX_PENDING = 1024  # passes of one update; more than anyone accumulates


class Pending(Generic[T]):
    """A queue of what the passes since the last update hand to `after_step`."""

    def __init__(self) -> None:
        self._items: list[T] = []

    def add(self, item: T) -> None:
        """Append the item of one pass.

        Raises:
            RuntimeError: if nothing was taken for too long: `after_step` is not called.
        """
        if len(self._items) >= MAX_PENDING:
            raise RuntimeError(f"after_step: not called for {MAX_PENDING} passes; call it after each optimizer.step()")
        self._items.append(item)

    def take(self) -> list[T]:
        """Return all items and forget them."""
        items, self._items = self._items, []
        return items


class Model(nn.Module):
    """A batch in, losses out.

    ```
    for batch in loader:
        optimizer.zero_grad()
        model(batch).loss.backward()
        optimizer.step()
        model.after_step()  # a momentum encoder, a queue, a bank; nothing where there is none
    ```

    Whatever a model keeps beside its weights is written in `after_step` alone: an update that is left out because its
    gradient is not finite leaves no trace, and several passes may share one update.

    Attributes:
        loss: any callable module of `Embedded.inputs`.
        memories: names of sub-modules whose buffers only `after_step` writes.
        encoders: names of the sub-modules that outlive the training: what an export keeps.
        head_taps: the taps of `encode` that need more than these.
    """

    loss: nn.Module
    memories: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("encoder",)
    head_taps: tuple[str, ...] = ()

    def encode(
        self,
        x: Tensor,  # (B, ...) inputs
    ) -> dict[str, Tensor]:
        """The taps of a batch, by the trained encoder."""
        raise NotImplementedError

    def embed(self, batch: Any) -> Embedded:
        """Everything up to the loss."""
        raise NotImplementedError

    def begin(self, batch: Any) -> Any:
        """The first part of `embed`, which may run on a few images at a time; nested tensors, a row an image.

        Raises:
            NotImplementedError: there is none.
        """
        raise NotImplementedError(f"{type(self).__name__}: has no begin(), need a model whose negatives are its batch")

    def finish(self, begun: Any, extras: Sequence[Tensor] = ()) -> Embedded:
        """The rest of `embed`: takes what `begin` returned for the whole batch, and the batch's extras.

        Taps may be missing.
        """
        raise NotImplementedError

    def forward(self, batch: Any) -> Losses:
        """The losses of a batch."""
        losses: Losses = self.loss(*self.embed(batch).inputs)
        return losses

    def generate(self, count: int) -> Tensor | None:
        """New images, (count, 3, H, H) in [−1, 1]; None of a model that makes none."""
        return None

    def loss_shape(self) -> tuple[list[tuple[int, int]], int] | None:
        """(rows, columns) of an image in each term of AMDIM's loss, and their width D; None for another loss."""
        return None

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimizer: all but a momentum encoder's."""
        return [p for p in self.parameters() if p.requires_grad]

    def after_step(self, *, skipped: bool = False) -> None:
        """Call it after each update of the weights.

        Args:
            skipped: the update was left out; forget what the passes since the last call recorded.
        """


def check_images(x: Tensor, side: int | None = None, channels: int = 3) -> None:
    """(B, channels, side, side) images, (B, channels, H, W) where no side is given.

    Raises:
        TypeError: for bytes, or other integers.
        ValueError: for another shape.
    """
    if x.dim() != 4 or x.shape[1] != channels or (side is not None and x.shape[2:] != (side, side)):
        sides = "H, W" if side is None else f"{side}, {side}"
        raise ValueError(f"x: must be (B, {channels}, {sides}) images, got {tuple(x.shape)}")
    check_floats(x, "images, less the mean and divided by the deviation of their channels")


def check_floats(x: Tensor, what: str) -> None:
    """Numbers that a layer takes.

    Raises:
        TypeError: for integers.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: must be float {what}, got {x.dtype}")


def one_view(batch: Tensor | Sequence[Tensor]) -> Tensor:
    """The images of a batch: itself, or the one view that it holds."""
    if isinstance(batch, Tensor):
        return batch
    if len(batch) != 1:
        raise ValueError(f"batch: must hold 1 view, got {len(batch)}")
    return batch[0]


def split_views(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two views of a batch, checked: same shape, at least two images."""
    view1, view2 = views_of(batch)
    if len(view1) < 2:
        raise ValueError(f"batch: must hold at least 2 images, got {len(view1)}: one image has no negatives")
    return view1, view2


def views_of(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The two views of a batch or a part of one, checked: same shape."""
    if isinstance(batch, Tensor):
        if batch.dim() != 5 or batch.shape[1] != 2:
            raise ValueError(f"batch: a tensor must be (B, 2, 3, H, W), got {tuple(batch.shape)}")
        view1, view2 = torch.unbind(batch, 1)
    elif len(batch) == 2:
        view1, view2 = batch
    else:
        raise ValueError(f"batch: must hold 2 views, got {len(batch)}")
    if view1.shape != view2.shape:
        raise ValueError(f"batch: the views must have one shape, got {tuple(view1.shape)} and {tuple(view2.shape)}")
    return view1, view2
