"""The GPU kernels as the compiler sees them: no GPU is needed."""

from __future__ import annotations

import subprocess
import sysconfig

import pytest
import torch
from torch.utils import cpp_extension

from bench import static_cuda
from fused_nce import _extension, _nvcc
from tests.marks import nightly_but

NVCC = _nvcc.find()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4cuda11loss_kernelILb0ELb1E13__nv_bfloat16Li8EEEvNS0_4TaskE' for 'sm_90'
ptxas info    : Function properties for _ZN4cuda11loss_kernelILb0ELb1E13__nv_bfloat16Li8EEEvNS0_4TaskE
    32 bytes stack frame, 32 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 32 bytes cumulative stack size, 528 bytes smem
ptxas info    : Compiling entry function '_ZN4cuda13finish_kernelILb1EEEvlNS0_5RulesE' for 'sm_90'
ptxas info    : Function properties for _ZN4cuda13finish_kernelILb1EEEvlNS0_5RulesE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers
"""


def test_spills_are_seen():
    spilled, clean = static_cuda.parse(PTXAS)
    assert spilled == ("loss shift bfloat16 together", "sm_90", 64, 528, 32, 68)
    assert clean == ("finish shift", "sm_90", 30, 0, 0, 0)
    assert (spilled.clean, clean.clean) == (False, True)
    with pytest.raises(ValueError, match="need a name, a stack frame"):
        static_cuda.parse(PTXAS.replace("stack frame", "frame"))


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
@pytest.mark.skipif(_extension.find_compiler() is None, reason="no C++ compiler on this machine")
def test_the_machine_of_a_gpu_compiles():
    """What calls cuBLAS: rows.cu is below, the rest of csrc/cuda plays a GPU in `test_cuda_on_host.py`."""
    assert NVCC is not None
    headers = [*cpp_extension.include_paths(), str(NVCC.home / "include"), sysconfig.get_path("include")]
    command = [*str(_extension.find_compiler()).split(), "-fsyntax-only", "-std=c++20", "-DFUSED_NCE_CUDA"]
    command += [f"-isystem{folder}" for folder in headers]
    command += [f"-idirafter{folder}" for folder in _nvcc.wheel_includes(NVCC)]
    source = static_cuda.SOURCES / "device.cpp"
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_nvcc
@pytest.mark.parametrize("architecture", nightly_but(["sm_90"], static_cuda.ARCHITECTURES))
def test_no_kernel_spills(architecture):
    assert NVCC is not None
    if architecture == "sm_100" and NVCC.release < (12, 8):
        pytest.skip(f"nvcc {NVCC.release} does not know {architecture}")
    kernels = static_cuda.compile_for(NVCC, static_cuda.SOURCES / "rows.cu", architecture)
    names = {kernel.name for kernel in kernels}
    transforms = ("clip", "clip shift", "shift")
    types = static_cuda.TYPES.values()
    assert {f"{kind} {e}" for t in transforms for kind in (f"loss {t}", f"weigh {t}") for e in types} < names
    assert {f"loss {t} {e} together" for t in transforms for e in types} < names
    assert {f"weigh {t} extras {e}" for t in transforms for e in types} | {f"multiply {e}" for e in types} < names
    assert {f"{kind} {t}" for kind in ("fold", "fold_columns") for t in transforms} < names
    assert {f"fold {t} bias or labels" for t in transforms} | {
        "fold_optional",
        "fold_optional clip",
        "finish_optional",
    } < names
    assert {"finish", "finish shift", "finish_columns", "finish_columns shift", "summary", "last_summary"} < names
    assert len(names) == len(kernels)
    assert [kernel for kernel in kernels if not kernel.clean] == []
