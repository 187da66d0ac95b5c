"""The GPU kernels as the compiler sees them: no GPU is needed."""

from __future__ import annotations

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from bench import sass, static_cuda
from fused_nce import _extension, _nvcc

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
    assert spilled[:6] == ("loss shift bfloat16 together", "sm_90", 64, 528, 32, 68)
    assert clean[:6] == ("finish shift", "sm_90", 30, 0, 0, 0)
    assert (spilled.clean, clean.clean) == (False, True)
    with pytest.raises(ValueError, match="need a name, a stack frame"):
        static_cuda.parse(PTXAS.replace("stack frame", "frame"))


SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/              @P0 BRA `(.L_x_2) ;
        /*0030*/                   MUFU.EX2 R5, R4 ;
        /*0040*/                   FADD R6, R6, R5 ;
        /*0048*/                   FMNMX R9, R9, R4, !PT ;
.L_x_1:
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   FSETP.GE P2, PT, R4, R7, PT ;
        /*0080*/                   FSEL R4, R4, -INF , P2 ;
        /*0090*/                   MUFU.EX2 R5, R4 ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
.text.other:
        /*0000*/                   EXIT ;
"""


def test_the_cheapest_turn_of_a_loop_is_counted():
    """The way with masks has an instruction more; a loop without exponentials is none over scores."""
    found = sass.functions(SASS)
    assert sass.turns(found["kernel"], least=1) == [sass.Turn(6, 1, 1)]
    assert sass.turns(found["kernel"], least=2) == []
    assert sass.turns(found["other"], least=1) == []


def test_more_instructions_a_score_are_a_regression():
    release = tuple(json.loads(static_cuda.TABLE.read_text(encoding="utf-8"))["nvcc"])
    nvcc = _nvcc.Nvcc("nvcc", Path(), release)
    kernel = static_cuda.Kernel("fold shift", "sm_90", 40, 0, 0, 0, **static_cuda.committed()["sm_90"]["fold shift"])
    assert static_cuda.regressions(nvcc, [kernel]) == []
    assert static_cuda.regressions(nvcc._replace(release=(1, 0)), [kernel._replace(issued=99.0)]) == []
    for name in static_cuda.COUNTS:
        (line,) = static_cuda.regressions(nvcc, [kernel._replace(**{name: getattr(kernel, name) + 0.1})])
        assert f" {name} a score, was " in line
    assert len(static_cuda.regressions(nvcc, [kernel._replace(name="fold unknown")])) == len(static_cuda.COUNTS)


def test_each_loop_of_a_loss_waits_for_its_own_pipe():
    """Two of eight scores a turn: one of 81 instructions, the other of 49, 40 of them in the ALU pipe."""
    code = ""
    for label, body in enumerate((72 * ["FADD"], 40 * ["FMNMX"])):
        lines = "".join(f"        /*00*/  {name} R1, R2 ;\n" for name in [*body, *8 * ["MUFU"]])
        code += f".L_x_{label}:\n{lines}        /*00*/  @P0 BRA `(.L_x_{label}) ;\n"
    found = static_cuda.counted(static_cuda.Kernel("loss shift float16", "sm_90", 0, 0, 0, 0), code)
    assert found[6:] == (130 / 8, 2.0, 5.0, (81 + 80) / 8)


# The most that a score may cost in all the row kernels that it passes, forward and backward, on every architecture.
MOST_ISSUED = {
    ("loss clip bfloat16",): 80,
    ("loss shift bfloat16",): 35,
    ("fold shift", "fold_columns shift", "weigh shift columns bfloat16"): 90,
}


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


def judge(kernels):
    """None spills or issues more than before, and a score costs no more than it may."""
    assert NVCC is not None
    assert [kernel for kernel in kernels if not kernel.clean] == []
    if static_cuda.disassembler(NVCC) is None:
        pytest.skip("spills are none; no nvdisasm on this machine to count instructions with")
    assert static_cuda.regressions(NVCC, kernels) == []
    issued = {kernel.name: kernel.issued for kernel in kernels}
    for passed, most in MOST_ISSUED.items():
        assert sum(issued[name] or 0.0 for name in passed) <= most, passed


@needs_nvcc
@pytest.mark.nightly  # 28 s an architecture; the loops above on sm_90: `tests/ptx/test_rows.py`
@pytest.mark.parametrize("architecture", static_cuda.ARCHITECTURES)
def test_no_kernel_spills_or_issues_more_than_before(architecture):
    assert NVCC is not None
    if architecture in ("sm_100", "sm_120") and NVCC.release < (12, 8):
        pytest.skip(f"nvcc {NVCC.release} does not know {architecture}")
    kernels = static_cuda.compile_for(NVCC, static_cuda.SOURCES / "rows.cu", architecture)
    names = {kernel.name for kernel in kernels}
    transforms = ("clip", "clip shift", "shift")
    types = static_cuda.TYPES.values()
    assert {f"{kind} {e}" for t in transforms for kind in (f"loss {t}", f"weigh {t}") for e in types} < names
    assert {f"loss {t} {e} together" for t in transforms for e in types} < names
    assert {f"weigh {t} {x} {e}" for t in transforms for e in types for x in ("columns", "extras", "marks")} | {
        f"multiply {e}" for e in types
    } < names
    assert {f"{kind} {t}" for kind in ("fold", "fold_columns") for t in transforms} < names
    kinds = [f"fold {t}" for t in transforms] + ["fold_optional", "fold_optional clip"]
    assert {f"{kind} {x}" for kind in kinds for x in ("extras", "marks")} | {"mark", "finish_optional"} < names
    assert {"finish", "finish shift", "finish_columns", "finish_columns shift", "summary", "last_summary"} < names
    assert len(names) == len(kernels)
    judge(kernels)
