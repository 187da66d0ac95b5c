"""The ways in which a caller's tensor may lie in memory, each holding the same values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _transposed(x: Tensor) -> Tensor:
    """Column-major: as features come from `(D, N)`."""
    return x.T.contiguous().T


def _sliced(x: Tensor) -> Tensor:
    """A window of a wider buffer; its surroundings are NaN, so that reading past the window shows."""
    wide = x.new_full((x.shape[0] + 2, x.shape[1] + 3), float("nan"))
    wide[1:-1, 2:-1] = x
    return wide[1:-1, 2:-1]


def _stepped(x: Tensor) -> Tensor:
    """Every second row and every third column of a buffer of NaN."""
    wide = x.new_full((2 * x.shape[0], 3 * x.shape[1]), float("nan"))
    wide[::2, ::3] = x
    return wide[::2, ::3]


def _stepped_rows(x: Tensor) -> Tensor:
    """Rows apart, elements adjacent: the stride that a kernel may use without a copy."""
    wide = x.new_full((3 * x.shape[0], x.shape[1]), float("nan"))
    wide[::3] = x
    return wide[::3]


def _expanded(x: Tensor) -> Tensor:
    """Stride 0 along the rows: only for equal rows, otherwise as it is."""
    return x[:1].expand_as(x) if bool((x == x[:1]).all()) else x


def _channels_last(x: Tensor) -> Tensor:
    """As a (1, D, rows, 1) map in channels-last memory, flattened."""
    image = x.T[None, :, :, None].contiguous(memory_format=torch.channels_last)
    return image.flatten(2)[0].T


def _misaligned(x: Tensor) -> Tensor:
    """One element past an aligned address."""
    flat = x.new_full((x.numel() + 1,), float("nan"))
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": _transposed,
    "sliced": _sliced,
    "stepped": _stepped,
    "stepped_rows": _stepped_rows,
    "expanded": _expanded,
    "channels_last": _channels_last,
    "misaligned": _misaligned,
}
