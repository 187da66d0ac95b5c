"""A loss and its parts in a tuple: for unpacking, not for arithmetic, which would join such tuples or repeat one."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T", bound=type)
OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg")


def no_number(kind: T) -> T:
    """The class, whose objects refuse to be reckoned with (`TypeError`), and say where a tensor's attributes are."""

    def refuse(self: Any, *others: Any) -> Any:
        raise TypeError(f"{kind.__name__}: got arithmetic on it, need it on its .loss: it is a tuple of parts")

    def missing(self: Any, name: str) -> Any:
        need = f", need .loss.{name}" if hasattr(Tensor, name) else ""
        raise AttributeError(f"{kind.__name__}: has no {name}{need}", name=name, obj=self)

    for name in OPERATORS:
        setattr(kind, f"__{name}__", refuse)
    setattr(kind, "__getattr__", missing)  # noqa: B010  (mypy would take any attribute for one that is there)
    return kind
