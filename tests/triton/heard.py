"""A kernel that tells what it was launched with, and may then write something wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Launch = dict[str, Any]  # arguments by name, what is compiled in too


class Heard:
    """In the place of a module's kernel while a test runs; `launches` are its own, in their order."""

    def __init__(
        self, patch: pytest.MonkeyPatch, module: Any, name: str, after: Callable[[Launch], Any] = lambda launch: None
    ) -> None:
        self.kernel, self.after, self.launches = getattr(module, name), after, list[Launch]()
        patch.setattr(module, name, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.kernel[grid](*arguments, **options)
            self.launches.append(dict(zip(self.kernel.arg_names, arguments, strict=False)) | options)
            self.after(self.launches[-1])

        return launch


def take_down(patch: pytest.MonkeyPatch) -> list[tuple[str, Launch]]:
    """Launches by name, with what is compiled in, as for an sm_90: of CPU tensors, and none is run."""
    from triton.runtime.jit import JITFunction

    from fused_nce.backends import triton
    from fused_nce.backends.triton import configs

    taken: list[tuple[str, Launch]] = []

    def launching(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: taken.append((kernel.__name__, options))

    patch.setattr(triton, "why_not", lambda *call: None)
    patch.setattr(configs, "architecture_of", lambda device: "sm_90")
    patch.setattr(JITFunction, "__getitem__", launching)
    return taken
