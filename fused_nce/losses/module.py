"""What the losses' modules share: settings that stay from call to call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from fused_nce.core import checks


def check_options(module: type[nn.Module], loss: Callable[..., Any], options: Iterable[str]) -> None:
    """Keywords of a module's constructor among those that its loss takes and no call brings.

    Raises:
        TypeError: naming the module, the keyword and the one that is needed.
    """
    calls, own = inspect.signature(module.forward).parameters, inspect.signature(module).parameters
    for name in options:
        if name in calls:
            raise TypeError(f"{module.__name__}: got {name}, which comes with each call, need it there")
    known = {*inspect.signature(loss).parameters, *own} - {*calls, "options"}
    checks.check_names(module.__name__, options, sorted(known))


class Copied(nn.Module):
    """A module whose copies, a teacher's say, work in the process group that it works in: a group has no copy."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo |= {id(x): x for x in tree_leaves(vars(self)) if isinstance(x, dist.ProcessGroup)}
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


class LossModule(Copied):
    """A loss's function with its keyword settings kept, each an attribute that may be changed between calls."""

    gathers = False  # whether its negatives are its batch, which `group` extends to all processes

    if TYPE_CHECKING:  # of any type, where `nn.Module` knows tensors and modules alone

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._kept = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def kept(self) -> dict[str, Any]:
        """As the function takes them by keyword."""
        return {name: getattr(self, name) for name in self._kept}

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them; where it runs is none of the loss."""
        return ", ".join(f"{name}={x!r}" for name, x in self.kept().items() if name not in ("group", "backend"))
