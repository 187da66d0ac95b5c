"""The GPU kernels as the compiler sees them: no GPU is needed."""

from __future__ import annotations

import pytest

from bench import static_cuda
from fused_nce import _nvcc

NVCC = _nvcc.find()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4cuda11loss_kernelILb0ELb1E13__nv_bfloat16EEvNS0_5StripE' for 'sm_90'
ptxas info    : Function properties for _ZN4cuda11loss_kernelILb0ELb1E13__nv_bfloat16EEvNS0_5StripE
    32 bytes stack frame, 32 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 32 bytes cumulative stack size, 528 bytes smem
ptxas info    : Compiling entry function '_ZN4cuda13finish_kernelILb1EEEvlNS0_5RulesE' for 'sm_90'
ptxas info    : Function properties for _ZN4cuda13finish_kernelILb1EEEvlNS0_5RulesE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers
"""


def test_spills_are_seen():
    spilled, clean = static_cuda.parse(PTXAS)
    assert spilled == ("loss shift bfloat16", "sm_90", 64, 528, 32, 68)
    assert clean == ("finish shift", "sm_90", 30, 0, 0, 0)
    assert (spilled.clean, clean.clean) == (False, True)
    with pytest.raises(ValueError, match="need a name, a stack frame"):
        static_cuda.parse(PTXAS.replace("stack frame", "frame"))


@needs_nvcc
@pytest.mark.parametrize("architecture", static_cuda.ARCHITECTURES)
def test_no_kernel_spills(architecture):
    assert NVCC is not None
    if architecture == "sm_100" and NVCC.release < (12, 8):
        pytest.skip(f"nvcc {NVCC.release} does not know {architecture}")
    kernels = static_cuda.compile_for(NVCC, static_cuda.SOURCES / "rows.cu", architecture)
    names = {kernel.name for kernel in kernels}
    transforms = ("clip", "clip shift", "shift")
    types = static_cuda.TYPES.values()
    assert {f"{kind} {e}" for t in transforms for kind in (f"loss {t}", f"weigh {t}") for e in types} < names
    assert {f"weigh {t} more {e}" for t in transforms for e in types} | {f"multiply {e}" for e in types} < names
    assert {f"{kind} {t}" for kind in ("fold", "fold_columns") for t in transforms} < names
    assert {f"fold {t} more" for t in transforms} | {"fold_further", "fold_further clip", "finish_further"} < names
    assert {"finish", "finish shift", "finish_columns", "finish_columns shift", "summary", "last_summary"} < names
    assert len(names) == len(kernels)
    assert [kernel for kernel in kernels if not kernel.clean] == []
