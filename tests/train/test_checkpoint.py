"""Checkpoints: whole or not at all, never a pickle, the one before where the newest is damaged."""

import itertools
import json
import logging
import multiprocessing
import os
import pickle
import resource
import time
from typing import Any

import pytest
import torch

from fused_nce.train import config
from fused_nce.train.methods.amdim import AMDIMConfig, ModelConfig
from fused_nce.train.saving import checkpoint

TINY = ModelConfig(ndf=4, n_rkhs=16, n_depth=1)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints at steps 1, 2 and 3, of which two are kept; the weights tell the step."""
    settings = AMDIMConfig(model=TINY)
    config.save(settings, tmp_path)
    model: Any = settings.build()
    for step in (1, 2, 3):
        torch.nn.init.constant_(model.encoder.head5.shortcut.bias, step)
        checkpoint.save(tmp_path, step, {"model": model.state_dict()}, {"step": step}, keep=2)
    return tmp_path


def step_of(run):
    model: Any = checkpoint.load_model(run)[0]
    return int(model.encoder.head5.shortcut.bias[0])


def test_round_trip_and_what_is_kept(run):
    model, settings = checkpoint.load_model(run)
    assert settings == AMDIMConfig(model=TINY)
    assert not model.training
    assert step_of(run) == 3
    assert [p.name for p in checkpoint.steps(run)] == ["step_00000002", "step_00000003"]
    assert (run / "checkpoints" / "LATEST").read_text().strip() == "step_00000003"
    assert not list((run / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("count", [40, pytest.param(500, marks=pytest.mark.nightly)])
def test_every_flipped_bit_is_seen_and_the_one_before_is_used(run, caplog, count):
    newest = checkpoint.steps(run)[-1]
    draw = torch.Generator().manual_seed(count)
    for name in ("model.safetensors", "state.json"):
        whole = (newest / name).read_bytes()
        for place in torch.randint(len(whole), (count,), generator=draw).tolist():
            damaged = bytearray(whole)
            damaged[place] ^= 1 << (place % 8)
            (newest / name).write_bytes(damaged)
            assert "SHA-256" in (checkpoint.damage(newest) or "")
        with caplog.at_level(logging.WARNING, logger="fused_nce"):
            assert step_of(run) == 2
        assert "step_00000003 is damaged" in caplog.text
        (newest / name).write_bytes(whole)
    assert step_of(run) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_truncated_empty_or_missing_files_are_seen(run, name):
    path = checkpoint.steps(run)[-1] / name
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"[]", b"\xff" * 100):
        path.write_bytes(content)
        assert step_of(run) == 2
    path.unlink()
    assert step_of(run) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
def test_every_one_of_200_truncations_is_seen(run, name):
    newest = checkpoint.steps(run)[-1]
    whole = (newest / name).read_bytes()
    for length in torch.randint(len(whole), (200,), generator=torch.Generator().manual_seed(1)).tolist():
        (newest / name).write_bytes(whole[:length])
        assert checkpoint.damage(newest)
        assert checkpoint.newest(run) == checkpoint.steps(run)[-2]


def test_a_manifest_cannot_name_files_outside(run):
    path = checkpoint.steps(run)[-1]
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["../../config.yaml"] = manifest["files"]["state.json"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "outside" in (checkpoint.damage(path) or "")


def test_all_damaged_is_an_error(run):
    for path in checkpoint.steps(run):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no whole checkpoint, 2 damaged; it must"):
        checkpoint.load_model(run)


def test_no_run_and_no_checkpoint_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"run: .* holds no config\.yaml"):
        checkpoint.load_model(tmp_path)
    config.save(AMDIMConfig(), tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint"):
        checkpoint.load_model(tmp_path)


def test_a_pickle_is_not_run(run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "boom"),))

    newest = checkpoint.steps(run)[-1]
    (newest / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    files = {p.name: checkpoint.fingerprint(p) for p in newest.iterdir() if p.name != "MANIFEST.json"}
    (newest / "MANIFEST.json").write_text(json.dumps({"step": 3, "files": files}))
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors cannot be read"):
        checkpoint.load_model(run)
    assert not (tmp_path / "boom").exists()


def test_weights_of_another_model_are_named(run):
    config.save(AMDIMConfig(model=ModelConfig(ndf=4, n_rkhs=20, n_depth=1)), run)
    with pytest.raises(checkpoint.CheckpointError, match="the model needs"):
        checkpoint.load_model(run)


def test_a_full_disk_leaves_the_earlier_ones(run):
    before = [p.name for p in checkpoint.steps(run)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # SIGXFSZ is ignored by Python: writing fails
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|I/O error|os error 27"):
            checkpoint.save(run, 4, {"model": {"x": torch.zeros(100_000)}}, {}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in checkpoint.steps(run)] == before
    assert not list((run / "checkpoints").glob(".tmp*"))
    assert step_of(run) == 3


def test_what_killed_saves_left_goes_at_the_start_and_before_a_save(run):
    root = run / "checkpoints"
    for begin in (
        lambda: checkpoint.Writer(run, 2, first=True),
        lambda: checkpoint.save(run, 4, {"model": {"x": torch.zeros(2)}}, {}, keep=2),
    ):
        (root / ".tmp-1").mkdir()
        (root / ".tmp-1/model.safetensors").touch()
        (root / ".tmp-2-ab-LATEST").touch()
        checkpoint.Writer(run, 2, first=False)  # the first process may be writing
        assert len(list(root.glob(".tmp-*"))) == 2
        begin()
        assert not list(root.glob(".tmp-*"))


def on_gpu(monkeypatch, generators, current):
    """As if this process used one of so many GPUs."""
    for name, found in (
        ("is_initialized", lambda: True),
        ("get_rng_state", lambda device="cuda": generators[current]),
        ("set_rng_state", lambda state, device="cuda": generators.__setitem__(current, state)),
    ):
        monkeypatch.setattr(torch.cuda, name, found)


def test_a_process_has_the_generator_of_its_own_gpu_back_whatever_others_it_sees(monkeypatch, caplog):
    a, b, other = (torch.full((16,), i, dtype=torch.uint8) for i in (1, 2, 3))
    on_gpu(monkeypatch, [a, b], 1)
    saved = checkpoint.capture_rng()
    older = saved | {"cuda": [checkpoint._hex(a), checkpoint._hex(b)]}  # lists all that the process saw
    for state, place, wanted in ((saved, 1, b), (older, 1, b), (older, 0, a)):
        alone = [other]
        on_gpu(monkeypatch, alone, 0)
        checkpoint.restore_rng(state, place)
        assert torch.equal(alone[0], wanted)
    assert not caplog.messages
    for state, said in ((older, "GPU 2, of 2"), (saved | {"cuda": []}, "GPU 2, of 0")):
        checkpoint.restore_rng(state, 2)
        assert f"the checkpoint has no random state of {said}: what is drawn on it" in caplog.text
    assert torch.equal(alone[0], a)


def write_for_ever(folder, told):
    torch.set_num_threads(1)
    for step in itertools.count(1):
        checkpoint.save(folder, step, {"model": {"x": torch.arange(200_000.0)}}, {"step": step}, keep=2)
        told.send(step)


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.nightly)])
def test_killed_while_saving_the_last_good_one_loads(tmp_path, kills):
    last, fork = 0, multiprocessing.get_context("fork")  # an import of torch would cost each two seconds
    for kill in range(kills):
        heard, told = fork.Pipe(duplex=False)
        writer = fork.Process(target=write_for_ever, args=(tmp_path, told))
        writer.start()
        for _ in range(3 + kill % 8):
            last = heard.recv()
        time.sleep(0.007 * (kill % 8))
        writer.kill()
        writer.join()
        found = checkpoint.newest(tmp_path)
        assert int(found.name[5:]) >= last
        assert torch.equal(checkpoint.load_tensors(found, "model")["x"], torch.arange(200_000.0))


def test_moments_come_back_in_the_memory_format_of_their_parameter():
    """A fused step walks both by address: another format would update the wrong weights."""
    layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    packed = {k: v.clone().contiguous() for k, v in checkpoint.pack_optimizer(optimizer).items()}
    other = torch.optim.Adam(layer.parameters(), fused=True)
    checkpoint.unpack_optimizer(other, packed)
    for name in ("exp_avg", "exp_avg_sq"):
        ours, theirs = other.state[layer.weight][name], optimizer.state[layer.weight][name]
        assert ours.stride() == layer.weight.stride()
        assert torch.equal(ours, theirs)
    with pytest.raises(checkpoint.CheckpointError, match="belongs to none of the 2 parameters"):
        checkpoint.unpack_optimizer(other, {"9.exp_avg": torch.zeros(1)})
