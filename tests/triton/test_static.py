"""The shipped tiles, compiled ahead of time for architectures that are not here, and the rules that judge them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import sass, static
from fused_nce.backends.triton import configs, plan
from tests.marks import nightly_but

ROOT = Path(__file__).resolve().parent.parent.parent
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@TRITON
@pytest.mark.parametrize("architecture", nightly_but(["sm_90"], configs.ARCHITECTURES))
def test_the_kernels_of_a_step(architecture, capsys):
    """bfloat16 at D = 128 and 512: the narrow heads this backend is for, and the largest sums that one tile holds."""
    assert static.main(["--architecture", architecture, "--width", "128"]) == 0, capsys.readouterr().err
    assert static.main(["--architecture", architecture, "--width", "512"]) == 0, capsys.readouterr().err


def launched(*arguments: str) -> int:
    """How many kernels `launched.py` compiled."""
    command = [sys.executable, "-m", "tests.triton.launched", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[0])


@TRITON
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", static.DTYPES, ids=str)
@pytest.mark.parametrize("architecture", configs.ARCHITECTURES)
def test_what_every_loss_launches(architecture, dtype):
    if (architecture, dtype) not in configs.TABLE:
        pytest.skip(f"{architecture} has no tiles for {dtype}")
    assert launched(architecture, str(dtype).removeprefix("torch.")) > 50


@TRITON
@pytest.mark.nightly
def test_every_kernel(capsys):
    assert static.main(["--all"]) == 0, capsys.readouterr().err


@TRITON
def test_a_row_of_another_source_or_tile_is_stale(monkeypatch):
    """And is compiled anew by `--stale`; a comment, or a line more above it, is no other source."""
    import triton

    plan = static.planned(False, "sm_90", 128)
    rows = static.committed(triton.__version__)
    if not rows:
        pytest.skip(f"Triton {triton.__version__} did not write the table")
    assert static.stale(plan) == []
    for change in ({"source": "0" * 8}, {"tile": (64, 64, 64, 64, 4, 3, None, None)}):
        other = [
            dataclasses.replace(one, **change) if one.key == (plan[0][0], "sm_90", "bf16", 128) else one for one in rows
        ]
        monkeypatch.setattr(static, "committed", lambda version, other=other: other)
        assert static.stale(plan) == plan[:1]
    text = '#loc = loc("a.py":3:0)\n  %0 = tt.load %x : !tt.ptr<f32> loc(#loc1)\nfunc(%x: i32 loc("x"(#loc))) {\n'
    assert static.digest(text) == static.digest(text.replace("3:0", "9:0").replace("loc1", "loc7"))
    assert static.digest(text) != static.digest(text.replace("f32", "f16"))


@TRITON
def test_a_tile_too_large_is_told(monkeypatch):
    """The check itself: 128 x 128 scores and as many sums do not fit the registers."""
    tiles = (configs.Tile(128, 128, 128, 128, 8, 2),) * 5
    monkeypatch.setitem(configs.TABLE, ("sm_90", torch.bfloat16), tiles)
    (fault, *_) = static.judge([static.build(static.DEFAULT[0], "sm_90", torch.bfloat16, 128)])
    assert "spills" in fault


@TRITON
def test_sizes_never_recompile():
    from fused_nce.backends.triton import gather, kernels, memory

    for kernel in (
        kernels.fold_kernel,
        kernels.weights_kernel,
        gather.merge_kernel,
        gather.positives_kernel,
        gather.finish_kernel,
    ):
        sizes = {p.name for p in kernel.params if p.do_not_specialize}
        assert sizes == set(memory.SIZES) & set(kernel.arg_names)
        compiled_in = {p.name for p in kernel.params if p.is_constexpr}
        assert not compiled_in & {"n", "m", "n_x", "n_y"}


@pytest.mark.parametrize("key", configs.TABLE, ids=str)
def test_a_split_is_whole_tiles(key):
    for tile in configs.TABLE[key]:
        assert plan.STEP % tile.y == 0
        for size in (tile.x, tile.y, tile.chunk, tile.slice):
            assert size >= 16
            assert size & (size - 1) == 0


def test_regressions_are_told():
    tile = (128, 64, 64, 64, 8, 3, None, None)
    old: Any = static.Build(
        "rows", "sm_90", "bf16", 64, tile, 100, 1000, 0, 0, 8, 3.0, "1f", 20.0, 3.0, 5.0, 0.1, {"64x64x16": 8}
    )
    assert old.resident == 2  # of 8 warps with 13312 registers each two times eight
    assert not list(dataclasses.replace(old, registers=108).regressions(old))
    worse: dict[str, Any] = {"registers": 109, "shared_bytes": 1001, "mufu_per_score": 3.1, "matrix_instructions": 7}
    worse |= {"issued_per_score": 20.1, "special_per_score": 3.1, "alu_per_score": 5.1}
    worse |= {"matrix_clocks_per_score": 0.2, "source": "2f", "tile": tile[:-1]}
    for name, value in worse.items():
        assert any(name in line for line in dataclasses.replace(old, **{name: value}).regressions(old)), name
    crowded = dataclasses.replace(old, registers=128)
    assert any(
        "resident: 2 became 1" in line for line in dataclasses.replace(crowded, registers=136).regressions(crowded)
    )
    bad = {
        "stack_bytes": 8,
        "spill_instructions": 1,
        "shared_bytes": 1 << 20,
        "matrix_instructions": 0,
        "serialised": 1,
    }
    for name, value in bad.items():
        assert list(dataclasses.replace(old, **{name: value}).faults()), name


HGMMA = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   HGMMA.64x256x8.F32.TF32 R24, R88, gdesc[UR4], R24 ;
        /*0030*/                   EXIT ;
"""


def test_matrix_instructions_are_counted_by_their_shape():
    """128 results a row are a matter of the tensor cores, 16 of the operands' way from shared memory."""
    assert sass.shapes(HGMMA) == {"64x128x16": 1, "64x16x16": 1, "64x256x8r": 1}
    assert [sass.matrix_clocks(line.partition("HGMMA")[2]) for line in HGMMA.splitlines()[1:4]] == [64, 20, 128]


LOOPS = """
.L_x_0:
        /*0000*/                   LDG.E R4, desc[UR6][R2.64] ;
.L_x_1:
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0020*/                   IADD3 R8, R8, 0x1, RZ ;
        /*0030*/              @P0 BRA `(.L_x_1) ;
        /*0040*/                   MUFU.EX2 R5, R4 ;
        /*0050*/                   VIADD R9, R9, 0x40 ;
        /*0060*/                   F2FP.BF16.F32.PACK_AB R6, R5, R5 ;
        /*0070*/              @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_a_loop_within_a_turn_counts_as_often_as_it_turns():
    assert sass.turns(LOOPS, 1) == [sass.Turn(8, 1, 2, 20.0)]
    assert sass.turns(LOOPS, 1, inner=4) == [sass.Turn(17, 1, 5, 80.0)]


def test_the_pipe_that_is_full_first_counts():
    assert [sass.Turn(24, *more).slots for more in ((3, 12), (4, 12), (3, 13))] == [24, 32, 26]


def test_an_instruction_of_an_unknown_pipe_is_told():
    """In a loop over scores; elsewhere nobody counts it."""
    assert sass.turns(LOOPS.replace("EXIT", "FROB"), 1) == sass.turns(LOOPS, 1)
    with pytest.raises(ValueError, match=r"got \['FROB'\], need instructions whose pipe"):
        sass.turns(LOOPS.replace("VIADD", "FROB"), 1)
    both = [x for x in re.split(r"\W+", sass.ALU) if re.fullmatch(f"{sass.FMA}|{sass.REST}", x)]
    assert both == []


@TRITON
def test_serialised_matrix_instructions_are_seen():
    """An accumulator that is read between two of them, which ptxas then makes wait."""
    body = """
    .version 8.4
    .target sm_90a
    .address_size 64
    .visible .entry kernel(.param .u64 out, .param .u64 desc) {
      .reg .b64 %d<3>; .reg .f32 %f<5>;
      ld.param.u64 %d0, [desc]; ld.param.u64 %d1, [out];
      mov.f32 %f0, 0f00000000; mov.f32 %f1, 0f00000000; mov.f32 %f2, 0f00000000; mov.f32 %f3, 0f00000000;
      wgmma.fence.sync.aligned;
      wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d0, %d0, 1, 1, 1, 0, 0;
      READ
      wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d0, %d0, 1, 1, 1, 0, 0;
      wgmma.commit_group.sync.aligned;
      wgmma.wait_group.sync.aligned 0;
      st.global.f32 [%d1], %f0; st.global.f32 [%d1+4], %f1; st.global.f32 [%d1+8], %f2; st.global.f32 [%d1+12], %f3;
      ret;
    }
    """
    assert static.serialised(body.replace("READ", "")) == 0
    assert static.serialised(body.replace("READ", "add.f32 %f0, %f0, %f1;")) > 0


AMD = """
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mov_b32_e32 v0, v1
	v_exp_f32_e32 v1, v1                ; v_exp_f32
	s_cbranch_vccnz .LBB0_3
; %bb.2:
	v_cndmask_b32_e32 v1, v2, v1, vcc
.LBB0_3:
	s_cmp_lt_i32 s0, s1
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_the_cheapest_turn_in_amds_assembly():
    assert sass.turns(AMD, 1, by=sass.AMD) == [sass.Turn(5, 1)]
    assert sass.turns(AMD, 2, by=sass.AMD) == []
    code = static.Code(0, 0, 0, AMD, 1)
    assert static.turn_of(code, configs.Tile(16, 16, 16, 16, 4, 1), 16, 64, sass.AMD) == (5, 1, 0, 0)
    twice = code._replace(text=AMD + AMD.replace("LBB0", "LBB1").replace("v_mov_b32_e32 v0, v1", "s_nop 0\n\ts_nop 0"))
    assert static.turn_of(twice, configs.Tile(16, 16, 16, 16, 4, 1), 16, 64, sass.AMD).issued == 6.0
