"""What the scaling model counts."""

from __future__ import annotations

import json

import pytest
import torch

from bench import data, decode, scaling
from fused_nce.train import rate

A_SCORE_S = 20e-12


def at(world, batch, way, cached=False):
    return scaling.step(world, batch, way, cached=cached, a_score_s=A_SCORE_S)


def test_the_wire_carries_each_key_and_its_gradient():
    """74 locations of 2,560 bf16 numbers, two views, there and back; a ring takes each pair's keys twice."""
    assert at(8, 32, "gather").wire_bytes == 2 * 7 * 32 * 2 * 74 * 2560 * 2
    assert at(8, 32, "ring").wire_bytes == 7 * 32 * 198 * 2560 * (2 + 2 + 4)
    assert at(1, 32, "gather").wire_bytes == at(1, 32, "ring").wire_bytes == 0


def test_memory_of_a_ring_does_not_grow_and_a_cached_step_keeps_one_part():
    assert at(8, 32, "ring").memory_bytes == at(512, 32, "ring").memory_bytes
    assert at(8, 32, "gather").memory_bytes < at(512, 32, "gather").memory_bytes
    assert at(8, 512, "ring", cached=True).activations_bytes == at(8, scaling.PART, "ring").activations_bytes
    assert at(8, 512, "ring", cached=True).encoder_s == pytest.approx(4 / 3 * at(8, 512, "ring").encoder_s)
    assert at(8, 32, "ring").maps_bytes == 2 * (75 * 2560) * 32 * 2 * 2  # views; numbers an image; bf16; and a gradient


def test_the_largest_batch_is_the_last_that_fits():
    for way in scaling.WAYS:
        batch = scaling.largest(64, way, cached=False)
        assert at(64, batch, way).memory_bytes <= scaling.MEMORY_BYTES < at(64, batch + 1, way).memory_bytes


def test_a_record_brings_the_measured_time():
    row = {"label": scaling.GLOBAL.label, "rivals": {"ours": {"device_ms_median": 2.0}}}
    found = scaling.score_s({"clock": "device", "cases": [row]})
    assert found == pytest.approx(2e-3 / scaling.GLOBAL.scores)
    with pytest.raises(ValueError, match="record: has no case"):
        scaling.score_s({"clock": "device", "cases": []})


def test_the_data_path_is_measured_on_images_like_imagenets(tmp_path):
    data.synthesise(tmp_path / "jpegs", 8)
    found = rate.measure(str(tmp_path / "jpegs"), batch=4, batches=1)
    assert found["images"] == 4
    assert 0 < found["read_images_per_s"] < 1e5
    sizes = [path.stat().st_size for path in (tmp_path / "jpegs").rglob("*.jpg")]
    assert len(sizes) == 8
    assert 50e3 < min(sizes) <= max(sizes) < 200e3


@pytest.mark.nightly
def test_the_data_path_is_measured_in_a_process_of_its_own(capsys):
    assert data.main(["--images=4", "--batch=4", "--batches=1"])["images"] == 4
    assert "ImageNet's 1,281,167 images are" in capsys.readouterr().out


def test_every_way_to_decode_is_measured_and_tabled(tmp_path):
    data.synthesise(tmp_path / "jpegs", 2)
    content = next((tmp_path / "jpegs").rglob("*.jpg")).read_bytes()
    ways = rate.ways(64)
    for name, way in ways.items():
        image = way(content)
        assert (tuple(image.shape), image.dtype) == ((3, 64, 64), torch.uint8), name
    found = rate.decode(str(tmp_path / "jpegs"), 64, rounds=1)
    assert found["images_per_s"].keys() == ways.keys()
    assert all(0 < rate_ < 1e5 for rate_ in found["images_per_s"].values())
    record = {"sides": [found], "host": {"cpu_model": "A CPU"}, "code": {"commit": "abcdef0123"}, "date_utc": "2026"}
    (tmp_path / "decode-a.json").write_text(json.dumps(record))
    assert "| fused_nce's reader |" in decode.block(tmp_path)
    assert "A CPU; torch " in decode.block(tmp_path)
    assert decode.block(tmp_path / "jpegs").startswith("No record is committed yet")
    with pytest.raises(ValueError, match=r"folder: must hold \.jpg files, got "):
        rate.decode(str(tmp_path / "none"), 64, rounds=1)


@pytest.mark.nightly
def test_decoding_is_measured_in_processes_of_its_own(capsys):
    assert [s["side"] for s in decode.main(["--images=1", "--rounds=1", "--sides", "32", "64"])["sides"]] == [32, 64]
    assert "64 px, images/s" in capsys.readouterr().out
