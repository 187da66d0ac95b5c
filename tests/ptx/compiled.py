"""Triton's kernels compiled as for a card, and run by the interpreter on CPU tensors."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.static import Card
from fused_nce.backends import triton
from fused_nce.backends.triton import configs
from fused_nce.core.spec import Spec
from tests.ptx.machine import launch
from tests.ptx.parse import Kernel, Module

Run = Callable[[Any, tuple[int, ...], dict[str, Any]], None]  # of a compiled kernel, its grid and its arguments
KERNELS: dict[str, Kernel] = {}  # by the text


def kernel_of(compiled: Any) -> Kernel:
    """Taken apart once."""
    text = compiled.asm["ptx"]
    if text not in KERNELS:
        module = Module(text)
        (name,) = module.heads
        KERNELS[text] = module[name]
    return KERNELS[text]


def execute(compiled: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """One launch. Parameters that are not compiled in come in their order, then two pointers of Triton's own."""
    code = kernel_of(compiled)
    packed, ranges = bytearray(code.parameter_bytes), []
    slots = iter(code.parameters.values())
    for name, type in compiled.src.signature.items():
        if type == "constexpr":
            continue
        value, slot = arguments[name], next(slots)
        if type.startswith("*"):
            # Within the tensor's storage, whose views may overlap; a tensor of no elements has no address.
            storage = value.untyped_storage()
            ranges.append((storage.data_ptr(), storage.nbytes()))
            data = value.data_ptr().to_bytes(8, "little")
        elif type == "fp32":
            data = struct.pack("<f", float(value))
        else:
            data = int(value).to_bytes(slot.size, "little", signed=True)
        packed[slot.offset : slot.offset + slot.size] = data
    x, y, z = (*grid, 1, 1)[:3]
    launch(code, (x, y, z), 32 * compiled.metadata.num_warps, bytes(packed), compiled.metadata.shared, ranges)


def pose(patch: pytest.MonkeyPatch, architecture: str, run: Run | None = execute) -> set[Any]:
    """Make every launch a compilation and, but for None, a run; the set that the compiled kernels will be in."""
    compiled: set[Any] = set()

    def launching(kernel: Any, grid: tuple[int, ...]) -> Any:
        def start(*arguments: Any, **options: Any) -> None:
            found = kernel.run(*arguments, grid=grid, warmup=True, **options)
            compiled.add(found)
            if run is not None:
                named = dict(zip((p.name for p in kernel.params), arguments, strict=False))
                run(found, grid, named | options)

        return start

    patch.setattr(driver, "_active", Card(architecture))
    patch.setattr(JITFunction, "__getitem__", launching)
    patch.setattr(configs, "architecture_of", lambda device: architecture)
    patch.setattr(triton, "why_not", why_not)
    return compiled


def why_not(spec: Spec, q: Tensor, k: Tensor) -> str | None:
    """The backend's own reasons, but for those that a CPU has."""
    return next((f"{x.dtype}" for x in (q, k) if x.dtype not in configs.DTYPES), None)
