"""`csrc/cuda/rows.cu` as nvcc compiled it, in the place of the package's emulation of a GPU.

`runtime.cpp` says how a launch comes here. Its pointers are the process' own, and nobody tells where its tensors
end, so a wild access is not reported as one.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fused_nce import _extension, _nvcc
from tests.ptx.convert import to_bf16, to_f16, wide
from tests.ptx.machine import launch
from tests.ptx.memory import FIRST, PROCESS, Array
from tests.ptx.parse import Fault, Module

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc" / "cuda"
MODULE: Any = _extension.status()[0]


class Gemm(ctypes.Structure):
    """`Gemm` of csrc/cuda/machine.h: out = alpha · left · right [+ out]."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "depth")),
        *(("left", ctypes.c_void_p), ("left_stride", ctypes.c_int64), ("left_transposed", ctypes.c_bool)),
        *(("right", ctypes.c_void_p), ("right_stride", ctypes.c_int64), ("right_transposed", ctypes.c_bool)),
        *(("element", ctypes.c_int), ("alpha", ctypes.c_float), ("add", ctypes.c_bool)),
        *(("out", ctypes.c_void_p), ("out_stride", ctypes.c_int64), ("out_element", ctypes.c_int)),
    )


ELEMENTS = ("f32", "bf16", "f16")  # in the order of `Element`
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, *4 * (ctypes.c_uint,), ctypes.POINTER(ctypes.c_void_p))
SHARED_BYTES = 48 << 10  # that every kernel may have
PRODUCT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Gemm))


def stored(data: int, rows: int, columns: int, stride: int, element: int) -> Array:
    """A matrix in this process' memory, as the words that are there."""
    words = PROCESS[2 if element else 4][(data - FIRST) // (2 if element else 4) :]
    size = words.itemsize
    return np.lib.stride_tricks.as_strided(words, (rows, columns), (stride * size, size))


def multiply(g: Gemm) -> None:
    """In float64, rounded to float32 and then to what it is stored as."""

    def operand(data: int, stride: int, transposed: bool, rows: int, columns: int) -> Array:
        shape = (columns, rows) if transposed else (rows, columns)
        words = np.ascontiguousarray(stored(data, *shape, stride, g.element))
        values = wide(words, ELEMENTS[g.element]) if g.element else words.view(np.float32)
        return (values.T if transposed else values).astype(np.float64)

    left = operand(g.left, g.left_stride, g.left_transposed, g.m, g.depth)
    right = operand(g.right, g.right_stride, g.right_transposed, g.depth, g.n)
    value, out = (g.alpha * (left @ right)).astype(np.float32), stored(g.out, g.m, g.n, g.out_stride, g.out_element)
    if g.add:
        before = np.ascontiguousarray(out)
        value = value + (wide(before, ELEMENTS[g.out_element]) if g.out_element else before.view(np.float32))
    out[:] = (np.ascontiguousarray(value).view(np.uint32), to_bf16(value), to_f16(value))[g.out_element]


class Rows:
    """The library and its machine code."""

    def __init__(self, folder: Path, architecture: int = 90) -> None:
        nvcc = _nvcc.find()
        assert nvcc is not None
        library = folder / "rows.so"
        target = f"arch=compute_{architecture},code=compute_{architecture}"
        command = [nvcc.path, *_nvcc.FLAGS, "-std=c++17", "-gencode", target, "--shared", "-cudart", "none"]
        command += ["-Xcompiler", "-fPIC", "-Xlinker", "-Bsymbolic", "--keep", "--keep-dir", str(folder)]
        command += [f"-I{SOURCES}", str(SOURCES / "rows.cu"), str(HERE / "runtime.cpp"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self.ptx = folder / "rows.ptx"
        self.text = self.ptx.read_text(encoding="utf-8")
        self.code = Module(self.text)
        self.library = ctypes.CDLL(str(library))
        self.fault = (ctypes.c_char * 512).in_dll(self.library, "fused_nce_fault")
        assert ctypes.c_size_t.in_dll(self.library, "fused_nce_gemm_bytes").value == ctypes.sizeof(Gemm)
        self.most = ctypes.c_int.in_dll(self.library, "fused_nce_shared_bytes")
        self.callbacks = (LAUNCH(self._launch), PRODUCT(self._product))  # kept: C++ holds their addresses
        self.library.fused_nce_run_by(*self.callbacks)
        self.launched: list[str] = []  # kernels, by their names in `bench.static_cuda`
        self.allowed: dict[str, set[int]] = defaultdict(set)  # bytes of shared memory in all, by entry

    def _guarded(self, f: Callable[[], None]) -> int:
        try:
            with np.errstate(all="ignore"):
                f()
        except Exception as error:  # the driver in C++ carries it on
            self.fault.value = f"{type(error).__name__}: {error}".encode()[:500]
            return 1
        return 0

    def _product(self, gemm: Any) -> int:
        return self._guarded(lambda: multiply(gemm.contents))

    def _launch(self, name: bytes, ctas: int, threads: int, dynamic: int, allowed: int, arguments: Any) -> int:
        def run() -> None:
            kernel = self.code[name.decode()]
            if kernel.shared_bytes + dynamic > max(SHARED_BYTES, kernel.shared_bytes + allowed):
                raise Fault(
                    f"{kernel.name}: {kernel.shared_bytes} + {dynamic} bytes of shared memory, allowed: {allowed}"
                )
            self.allowed[kernel.name].add(kernel.shared_bytes + allowed)
            packed = bytearray(kernel.parameter_bytes)
            for slot, argument in zip(kernel.parameters.values(), arguments, strict=False):
                packed[slot.offset : slot.offset + slot.size] = ctypes.string_at(argument, slot.size)
            self.launched.append(re.search(r"\d+([a-z_]+)_kernel", kernel.name)[1])  # type: ignore[index]
            launch(kernel, (ctas, 1, 1), threads, bytes(packed), dynamic)

        return self._guarded(run)

    @contextmanager
    def in_place(self) -> Iterator[list[str]]:
        """While it lasts, the `cuda` backend's kernels on a CPU are these; the names of those launched."""
        self.launched.clear()
        self.allowed.clear()
        MODULE.cuda_emulate_by(ctypes.cast(self.library.fused_nce_machine, ctypes.c_void_p).value)
        try:
            yield self.launched
        finally:
            MODULE.cuda_emulate_by(0)


__all__ = ["Fault", "Rows"]
