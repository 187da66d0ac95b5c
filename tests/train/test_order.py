"""Shards through a shuffle buffer, and views that grow: functions of the position, so that a run goes on exactly."""

import os

import numpy as np
import pytest
import torch

from fused_nce.train import command
from fused_nce.train.data import loader, shards
from fused_nce.train.data.loader import Order, through_buffer
from fused_nce.train.loop import Trainer
from fused_nce.train.methods.simclr import SimCLRConfig
from tests.train.pictures import samples, write_folder, write_shard
from tests.train.runs import differing, resumed, tensors

RUNS = [7, 1, 30, 12]


@pytest.mark.parametrize("size", [1, 5, 50, 500])
def test_a_buffer_reads_files_from_front_to_back_and_gives_each_once(size):
    stream, left = through_buffer(RUNS, size, torch.Generator().manual_seed(3))
    assert sorted(left.tolist()) == sorted(stream.tolist()) == list(range(50))
    file = np.repeat(range(4), RUNS)[stream]
    assert (np.diff(stream)[file[1:] == file[:-1]] == 1).all()
    assert len(np.flatnonzero(np.diff(file))) == 3  # one file after the other
    entered = torch.empty(50, dtype=torch.int64)
    entered[stream] = torch.arange(50)
    early = torch.arange(50) - entered[left]  # places by which an image leaves before its turn, or later
    assert int(early.min()) >= 1 - size
    if size == 1:
        assert torch.equal(stream, left)
    else:
        assert int(early.max()) > 0
        assert int(early.min()) < -size // 3 or size == 500


def test_every_epoch_has_another_order_and_any_position_is_known():
    size = 10
    order = Order(50, 4, 0, runs=RUNS, buffer=size)
    epochs = [torch.cat([order.indices(12 * e + i) for i in range(12)]) for e in range(2)]
    assert all(len(epoch.unique()) == 48 for epoch in epochs)
    assert not torch.equal(*epochs)
    for position in (17, 3):
        assert torch.equal(Order(50, 4, 0, runs=RUNS, buffer=size).indices(position), order.indices(position))
    parts = [Order(50, 2, 0, rank, 2, runs=RUNS, buffer=size).indices(5) for rank in range(2)]
    assert torch.equal(torch.cat(parts), order.indices(5))


@pytest.mark.parametrize("start", [0, 5, 12])
def test_all_that_is_drawn_was_read_ahead_or_was_in_the_buffer_of_a_run_that_stopped(start):
    order, asked = Order(50, 4, 0, runs=RUNS, buffer=10), []
    for position in range(start, 24):
        asked += order.ahead(position, first=position == start).tolist()
        missing = set(order.indices(position).tolist()) - set(asked)
        assert not missing or (start % 12 and position < 12)
    whole: list[int] = []
    for epoch in range(start // 12, 2):
        order._shuffle(epoch)
        assert order._stream is not None
        whole += order._stream.tolist()[start % 12 * 4 if epoch == start // 12 else 0 :]
    assert asked == whole


def write_shards(folder, count=3, each=20):
    for i in range(count):
        write_shard(folder / f"train-{i:03d}.tar", samples(range(each * i, each * (i + 1))))
    return folder


def settings(data, **options):
    found = SimCLRConfig(data=str(data), **options)
    found.model.image_size, found.optim.batch_size = 32, 4
    return found


def test_held_or_read_the_images_are_the_same_and_the_system_is_asked_for_whole_stretches(tmp_path, monkeypatch):
    write_shards(tmp_path)
    config = settings(tmp_path, shuffle_buffer=15)
    config.augment.geometry = "none"
    config.run.workers = 0
    held = config.open_loader(0, 1)
    assert held.held is not None
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)
    streamed = config.open_loader(0, 1)
    asked = []
    monkeypatch.setattr(
        shards.os, "posix_fadvise", lambda file, start, size, how: asked.append((os.fstat(file).st_ino, start, size))
    )
    drawn = []
    pairs = zip(held.batches(0), streamed.batches(0), strict=False)
    for _ in range(15):
        ours, theirs = next(pairs)
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.indices, theirs.indices)
        drawn += ours.indices.tolist()
    for shard, place, size in map(streamed.source.samples.place, drawn):
        stretches = [(a, b) for inode, a, b in asked if inode == shard.stat().st_ino]
        assert any(a <= place and place + size <= a + b for a, b in stretches)
    assert len(asked) <= 3 + 15  # a stretch of each shard, and the rest by batches


@pytest.mark.nightly
def test_a_resumed_run_goes_on_in_the_middle_of_a_buffer(tmp_path, monkeypatch):
    write_shards(tmp_path)
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)
    words = ["--preset=digits", f"--data={tmp_path}", "--batch-size=4", "--shuffle_buffer=15", "--run.workers=1",
             "--augment.stages=[[1,16]]"]  # fmt: skip
    for name, first in (("a", 20), ("b", 9)):
        Trainer(*command.parse("simclr", [*words, f"--out={tmp_path / name}", f"--max-steps={first}"])[:2]).run()
    resumed(tmp_path / "b", "--max-steps=20", method="simclr").run()
    assert differing(tensors(tmp_path / "b", 20), tensors(tmp_path / "a", 20)) == []


def test_a_buffer_without_shards_is_refused(tmp_path):
    write_folder(tmp_path, 8)
    for data in (tmp_path, "digits"):
        with pytest.raises(ValueError, match=f"shuffle_buffer: must be null for {data}, which is no shards, got 5"):
            settings(data, shuffle_buffer=5).open_loader(0, 1)
    with pytest.raises(ValueError, match="shuffle_buffer: must be null for recordings, which are held, got 5"):
        command.parse("cpc", ["--shuffle_buffer=5", f"--out={tmp_path / 'a'}"])


@pytest.mark.parametrize("geometry", ["crop", "translate"])
def test_views_grow_by_stages_held_or_read(tmp_path, monkeypatch, geometry):
    write_folder(tmp_path, 12)
    config = settings(tmp_path)
    config.augment.geometry, config.augment.stages, config.run.workers = geometry, ((1, 16), (3, 24)), 0
    config.check()

    def sides(source, position):
        views = config.make_views()
        batches, found = source.batches(position), []
        for _ in range(12 - position):
            batch = next(batches)
            found.append(batch.images)
            assert {view.shape[-2:] for view in views(batch.images)} == {batch.images.shape[-2:]}
        return found

    held = config.open_loader(0, 1)
    assert held.held is not None
    ours = sides(held, 0)
    assert [images.shape[-1] for images in ours] == [16] * 3 + [24] * 6 + [32] * 3  # three batches an epoch
    assert torch.equal(sides(held, 5)[0], ours[5])
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)
    streamed = config.open_loader(0, 1)
    for here, there in zip(ours[:9], sides(streamed, 0)[:9], strict=True):
        assert torch.equal(here, there)


def test_stages_that_do_not_rise_or_fit_are_refused(tmp_path):
    def run(*words, method="simclr"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        argv = ["--preset=digits", "--max-steps=1", "--batch-size=4", *words, f"--out={folder}"]
        return Trainer(*command.parse(method, argv)[:2])

    for stages in ("[[3,16],[1,24]]", "[[0,16]]", "[[1,4]]"):
        with pytest.raises(ValueError, match=r"^augment\.stages: must be \(epoch, px\) pairs, rising epochs"):
            run(f"--augment.stages={stages}")
    with pytest.raises(ValueError, match=r"^augment\.stages: 24 px: "):
        run("--augment.stages=[[1,24]]", method="amdim")
    with pytest.raises(ValueError, match=r"translate_px: must be below the image's 8 px, got 9"):
        run("--augment.stages=[[1,8]]", "--augment.geometry=translate", "--augment.translate_px=9")
    trained = run("--augment.stages=[[1,8]]")
    assert trained.config.augment.stages == ((1, 8),)
    trained.run()
