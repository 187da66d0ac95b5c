"""The shipped tiles, compiled ahead of time for architectures that are not here, and the rules that judge them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import static
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
    old: Any = static.Build("rows", "sm_90", "bf16", 64, (1, 2), 100, 1000, 0, 0, 8, 3.0)
    assert not list(dataclasses.replace(old, registers=108).regressions(old))
    for change in ({"registers": 109}, {"shared_bytes": 1001}, {"mufu_per_score": 3.1}, {"matrix_instructions": 7}):
        assert list(dataclasses.replace(old, **change).regressions(old)), change
    for change in (
        {"stack_bytes": 8},
        {"spill_instructions": 1},
        {"shared_bytes": 1 << 20},
        {"matrix_instructions": 0},
    ):
        assert list(dataclasses.replace(old, **change).faults()), change
