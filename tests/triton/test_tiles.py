"""Tiles of one's own: a file that is asked for by name, and what makes it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from fused_nce.backends.triton import configs, tune
from fused_nce.backends.triton.configs import Tile
from tests.triton.heard import take_down

KEY = ("sm_90", torch.bfloat16, configs.column_of(128))
SHIPPED = configs.TABLE["sm_90", torch.bfloat16][KEY[2]]
OTHER = Tile(64, 128, 128, 128, 4, 3)


def test_a_file_is_asked_for_by_name(tmp_path, monkeypatch):
    path = str(tmp_path / "tiles.json")
    configs.write({KEY: OTHER}, path)
    assert configs.tile("sm_90", torch.bfloat16, 128) == SHIPPED
    monkeypatch.setenv("FUSED_NCE_TILES", path)
    assert configs.tile("sm_90", torch.bfloat16, 128) == OTHER
    assert configs.tile("sm_90", torch.bfloat16, 100) == OTHER  # the same column
    assert configs.tile("sm_90", torch.float16, 128) == configs.TABLE["sm_90", torch.float16][KEY[2]]


ENTRY = {"architecture": "sm_90", "dtype": "bfloat16", "column": 1, "tile": list(OTHER)}
WRONG = {
    "architecture": "sm_75", "dtype": "int8", "column": 9, "tile": [64, 48, 128, 128, 4, 3, None],
}  # fmt: skip


def test_a_number_is_an_architecture_of_cudas(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": [ENTRY | {"architecture": 90}]}))
    assert configs.read(str(path)) == {KEY: OTHER}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_entry_is_named(name, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tiles": [ENTRY | {name: WRONG[name]}]}))
    with pytest.raises(ValueError, match=r"^FUSED_NCE_TILES: got .*, need "):
        configs.read(str(path))


@pytest.mark.parametrize("key", [key for key in configs.TABLE if key[0]], ids=str)
def test_candidates_fit_the_kernels(key):
    for width, shipped in zip((*configs.WIDTHS, 1024), configs.TABLE[key], strict=True):
        found = tune.candidates(shipped, width)
        assert found[0] == shipped
        assert len(set(found)) == len(found) > 20
        assert all(map(configs.fits, found))
        assert {(tile.registers, tile.both) for tile in found} == {(shipped.registers, shipped.both)}


def test_the_fastest_wins_if_it_is_worth_it():
    tiles = tune.candidates(SHIPPED, 128)
    times = dict.fromkeys(tiles, 2.0) | {SHIPPED: 1.0, tiles[3]: 0.98, tiles[4]: float("inf")}
    assert tune.fastest(tiles, times.__getitem__) == SHIPPED
    times[tiles[5]] = 0.9
    assert tune.fastest(tiles, times.__getitem__) == tiles[5]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("dtype", configs.DTYPES, ids=str)
def test_a_step_launches_every_kernel_with_the_tile_in_question(dtype, width, tmp_path, monkeypatch):
    """Statistics that sum dq, and the weights of dk and of one tensor in both roles: what is launched, and not run."""
    tile, launches = Tile(64, 64, 64, width, 8, 2), take_down(monkeypatch)
    configs.write({("sm_90", dtype, configs.column_of(width)): tile}, path := str(tmp_path / "tiles.json"))
    monkeypatch.setenv("FUSED_NCE_TILES", path)
    tune.Step(300, 400, width, dtype).on("cpu", "sm_90")()
    sizes = {"X": tile.x, "CHUNK": tile.chunk, "SLICE": tile.slice, **tile.options}
    taken = set()
    for name, options in launches:
        roles = tuple(role for role in ("GRADIENT", "AS_ROW", "AS_COLUMN") if options.get(role))
        if sizes.items() <= options.items() and options["Y"] in (tile.y, tile.y // max(1, len(roles))):
            taken.add((name, *roles))
    wanted = {("fold_kernel", "GRADIENT"), ("weights_kernel", "AS_COLUMN"), ("weights_kernel", "AS_ROW", "AS_COLUMN")}
    assert wanted <= taken


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_takes_a_gpu(tmp_path, capsys):
    assert tune.main(["--width", "128", "--out", str(tmp_path / "tiles.json")]) == 1
    assert "need one" in capsys.readouterr().err
