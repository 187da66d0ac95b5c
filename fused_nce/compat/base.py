"""What the adapters of upstream's classes share: hooks that nobody would call, settings, numbers, and the state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import widened


class Adapter(nn.Module):
    """An upstream class whose forward is a kernel's.

    Attributes:
        HOOKS: methods that upstream's forward calls and this one does not: of a subclass, or set on an object, they
            would be ignored in silence, so they are refused.
        SHOWN: settings that `print(module)` shows.
        CARRIED: attributes that upstream's state lacks. They travel in the state's metadata, so that its keys are
            upstream's and each loads the other's strictly; a state without them leaves them as they are.
    """

    HOOKS: ClassVar[tuple[str, ...]] = ()
    SHOWN: ClassVar[tuple[str, ...]] = ()
    CARRIED: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in cls.HOOKS:
            owner = next((x for x in cls.__mro__ if name in vars(x)), None)
            if owner is not None and owner.__module__.partition(".")[0] not in ("fused_nce", cls.UPSTREAM):
                cls.refuse(cls, name)  # fault: subclass-hook-ignored

    UPSTREAM: ClassVar[str] = "fused_nce"  # the package that may bring hooks too

    @staticmethod
    def refuse(holder: Any, name: str) -> None:
        """What a hook of the user's own leads to.

        Raises:
            TypeError: naming it.
        """
        kind = holder if isinstance(holder, type) else type(holder)
        raise TypeError(
            f"{kind.__name__}: got a {name} of its own, which this forward does not call, need upstream's class"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.HOOKS:
            self.refuse(self, name)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.SHOWN)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.CARRIED and hasattr(destination, "_metadata"):
            kept = {name: getattr(self, name) for name in self.CARRIED}
            kept = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in kept.items()}
            destination._metadata[prefix[:-1]].update(kept)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        for name in self.CARRIED:
            if name in local_metadata:
                value = local_metadata[name]
                have = getattr(self, name)
                if not isinstance(value, Tensor):
                    setattr(self, name, value)
                elif value.shape != have.shape:
                    rest[-1].append(f"{prefix}{name}: got shape {tuple(value.shape)}, need {tuple(have.shape)}")
                else:
                    have.data.copy_(value)


def standing_in(theirs: Any, first: type[Adapter]) -> Any:
    """A module of upstream's with the methods of `first` before its own: a shallow copy, of the same parameters.

    Raises:
        TypeError: for a hook of `first` that is set on the object, and would be ignored.
    """
    for name in first.HOOKS:
        if callable(vars(theirs).get(name)):
            first.refuse(theirs, name)
    ours = _bare(first, type(theirs))
    vars(ours).update(vars(theirs), _modules=dict(theirs._modules))
    return ours


@functools.cache
def _standing(first: type, theirs: type) -> Any:
    words = {"__module__": first.__module__, "__reduce_ex__": _reduced}
    return type(theirs.__name__, (first, theirs), words)


def _bare(first: type, theirs: type) -> Any:
    kind = _standing(first, theirs)
    return kind.__new__(kind)


def _reduced(self: Any, protocol: int) -> tuple[Any, ...]:
    """By the classes that made its own; a copy is past its trial (`fused_nce.patch`)."""
    # fault: copy-on-trial
    state = {name: x for name, x in vars(self).items() if not getattr(x, "on_trial", False)}
    return _bare, type(self).__bases__, state


def number(name: str, value: float | Tensor, check: Callable[..., None] = checks.check_number, **bounds: float) -> Any:
    """A setting as it came: a number, or a tensor of one, which may be learned.

    Raises:
        TypeError, ValueError: naming it, the value seen and the value needed.
    """
    value = checks.plain(value)
    check(name, value.item() if isinstance(value, Tensor) and value.numel() == 1 else value, **bounds)
    return value


def scalar(x: float | Tensor, rows: Tensor) -> float | Tensor:
    """A number, or a 0-d tensor where the rows are, of one that may have one element and be elsewhere."""
    return x.reshape(()).to(rows.device) if isinstance(x, Tensor) and x.numel() == 1 else x


def inverse(temperature: float | Tensor, rows: Tensor) -> float | Tensor:
    """1 / temperature, where the rows are."""
    found = scalar(temperature, rows)
    return widened(found).reciprocal() if isinstance(found, Tensor) else 1 / found


def tensor(name: str, x: Any) -> Tensor:
    """x.

    Raises:
        TypeError: where it is none.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, need a tensor")
    return x


def class_ids(name: str, *labels: Tensor) -> Any:
    """Labels as int64, equal where they are: one tensor, or a tuple of as many as were given.

    Floats and unsigned numbers count by their values; a NaN is a class of its own.

    Raises:
        TypeError: for complex ones, or no tensor.
    """
    for x in labels:
        if tensor(name, x).is_complex():
            raise TypeError(f"{name}: got {x.dtype}, need numbers")
    if any(x.is_floating_point() for x in labels):
        every = torch.cat([x.reshape(-1).double() for x in labels]).unique(return_inverse=True)[1]
        found = list(every.split([x.numel() for x in labels]))
    else:
        found = [x.to(torch.int64) for x in labels]
    return found[0] if len(found) == 1 else tuple(found)
