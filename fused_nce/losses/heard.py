"""A bad argument of one process is an error of all: they would wait for it otherwise."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from fused_nce.core import checks
from fused_nce.core.group import Group, peers

P = ParamSpec("P")
R = TypeVar("R")


def heard(loss: Callable[P, R]) -> Callable[P, R]:
    """A loss whose bad argument all processes of its `group` raise, not only the one that it was given to.

    It is handed NumPy's numbers as Python's.
    """

    @functools.wraps(loss)
    def call(*args: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return loss(*args, **options)
        for x in (*args, *options.values()):  # no function for each, which a call would wait for
            if type(x).__module__ == "numpy" and checks.plain(x) is not x:
                plain: Any = {name: checks.plain(x) for name, x in options.items()}
                return cast(Any, call)(*map(checks.plain, args), **plain)
        group = cast(Group, options.get("group"))
        if group is None:
            return loss(*args, **options)
        from fused_nce.core.distributed import processes

        before = processes.exchanges()
        try:
            return loss(*args, **options)
        except (TypeError, ValueError) as error:
            if processes.exchanges() == before:  # the others are on their way to the exchange, or wait in it
                with contextlib.suppress(TypeError, ValueError):  # of `group` itself, which nobody else can hear of
                    if (found := peers(group)) is not None:
                        processes.tell(found, error)
            raise

    return call
