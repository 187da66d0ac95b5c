"""Data: digits, folders, shards; splits, labels, damage, refusals; and the order of batches."""

import json
import logging
from pathlib import Path

import pytest
import torch

import fused_nce
from fused_nce.train.data import loader
from fused_nce.train.data.image_source import ImageSource, open_samples
from fused_nce.train.data.images import load_split
from fused_nce.train.methods.amdim import AMDIMConfig
from fused_nce.train.seeded import seeded
from fused_nce.train.settings import AugmentConfig, OptimConfig, RunConfig
from tests.refusals import unlike
from tests.train.pictures import picture, samples, write_folder, write_shard


def test_digits_splits_are_disjoint_complete_and_fixed():
    splits = {name: load_split("digits", name, 32) for name in ("train", "probe", "test")}
    assert [len(s.labels) for s in splits.values()] == [896, 445, 456]
    rows = torch.cat([s.images[:, 0].flatten(1) for s in splits.values()])
    assert len(rows) == 1797
    assert len(rows.unique(dim=0)) == 1797  # no image in two splits
    for s in splits.values():
        assert s.images.dtype == torch.uint8
        assert s.images.shape[1:] == (3, 32, 32)
        assert int(s.labels.bincount().min()) >= 40
        assert s.classes == [str(i) for i in range(10)]
    assert torch.equal(load_split("digits", "test", 32).images, splits["test"].images)


def test_folder(tmp_path):
    write_folder(tmp_path, 6, split="train")
    write_folder(tmp_path, 4, split="test", size=(64, 40))
    train, probe, test = (load_split(str(tmp_path), name, 32) for name in ("train", "probe", "test"))
    assert train.classes == ["ant", "bee"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.images[:, 0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(train.images, probe.images)
    assert test.images.shape == (4, 3, 32, 32)


def test_folder_without_labels(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    assert load_split(str(tmp_path), "train", 32).labels.tolist() == [-1] * 3


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shards(tmp_path, suffix):
    write_shard(tmp_path / f"train-000000.{suffix}", samples(range(4)))
    write_shard(tmp_path / f"train-000001.{suffix}", samples(range(4, 6)))
    write_shard(tmp_path / f"test-000000.{suffix}", samples(range(6, 9)))
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c"]))
    for name in (str(tmp_path), str(tmp_path / f"train-*.{suffix}")):
        train, test = load_split(name, "train", 32), load_split(name, "test", 32)
        assert train.images[:, 0, 0, 0].tolist() == list(range(6))
        assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert test.images[:, 0, 0, 0].tolist() == [6, 7, 8]
        assert train.classes == ["a", "b", "c"]


def test_a_shard_member_without_label_has_none(tmp_path):
    write_shard(tmp_path / "train-0.tar", [("a.png", picture(1)), ("b.png", picture(2)), ("b.cls", b"1")])
    assert load_split(str(tmp_path), "train", 32).labels.tolist() == [-1, 1]


def test_one_damaged_image_in_a_hundred_is_replaced_counted_and_logged(tmp_path, caplog):
    write_folder(tmp_path, 100, classes=("one",))
    broken = tmp_path / "one" / "0041.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with caplog.at_level(logging.WARNING, logger="fused_nce"):
        split = load_split(str(tmp_path), "train", 32)
    assert split.images.shape[0] == 100
    assert split.damaged == 1
    assert split.images[41, 0, 0, 0] == 42  # the next one
    assert "0041.png" in caplog.text


def test_more_than_one_per_cent_of_damaged_images_is_an_error(tmp_path):
    write_folder(tmp_path, 100, classes=("one",))
    for name in ("0041.png", "0042.png"):
        (tmp_path / "one" / name).write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"data: 2 of 100 images are damaged, above 1 %.*0042\.png"):
        load_split(str(tmp_path), "train", 32)


def test_shards_in_a_sub_folder_are_named(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder, name in (("a", "train-0.tar.gz"), ("a", "train-1.tar.gz"), ("b", "train-0.tar"), ("b", "x.csv.gz")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).touch()
    for kind in ("images", "recordings"):
        with pytest.raises(ValueError, match=rf"no {kind[:-1]} below ") as refused:
            open_samples(str(tmp_path), "train", kind)
        assert str(refused.value).endswith(f"; shards lie in {tmp_path}/a: --data {tmp_path}/a")
        for counted in ("2 .tar.gz", "1 .tar", "1 .csv.gz", "1 .txt"):
            assert f", {counted} files (" in str(refused.value).replace("left out: ", ", ")


def test_refusals(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-0.tar").write_bytes(b"no tar at all" * 100)
    shards, full, empty = (tmp_path / name for name in ("shards", "full", "empty"))
    write_folder(full, 2)
    empty.mkdir()
    need, many = (
        "'digits', CelebA's folder, a folder",
        "2 images take 6 MB as uint8 of 1000 px; memory_limit_mb must be as",
    )
    calls = [
        (
            lambda: load_split(str(tmp_path / "absent"), "train", 32),
            f"data: .*absent does not exist; it must be {need}",
        ),
        (lambda: load_split("digits", "valid", 32), "split: must be 'train', 'probe' or 'test', got 'valid'"),
        (lambda: load_split(str(empty), "train", 32), "data: no image below"),
        (lambda: load_split(str(full), "test", 32), r"has no test split; it must hold .*test"),
        (lambda: load_split(str(full), "train", 1000, limit_bytes=1 << 20), f"{many} large, got 1"),
        (lambda: ImageSource(shards, "train"), r"data: shard .*train-0\.tar cannot be read"),
        (lambda: ImageSource(shards, "test"), "data: no test shards at"),
    ]
    assert unlike([(call, ValueError, words) for call, words in calls]) == []


def test_every_epoch_is_another_permutation():
    order = loader.Order(10, 3, seed=1)
    epochs = [torch.cat([order.indices(3 * e + i) for i in range(3)]) for e in range(2)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(loader.Order(10, 3, seed=1).indices(4), order.indices(4))  # by position alone
    assert not torch.equal(loader.Order(10, 3, seed=2).indices(4), order.indices(4))


def test_processes_share_a_batch_without_overlap():
    parts = [loader.Order(12, 2, seed=0, rank=rank, world=3).indices(0) for rank in range(3)]
    assert torch.equal(torch.cat(parts), loader.Order(12, 6, seed=0).indices(0))


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="batch_size: 8 x 2 processes must be at most the 10 images"):
        loader.Order(10, 8, seed=0, world=2)


@pytest.fixture
def none_held(monkeypatch):
    """No set of images fits into memory."""
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)


def first_batches(tmp_path, geometry, workers, position=0, count=3):
    config = AMDIMConfig(
        data=str(tmp_path),
        augment=AugmentConfig(geometry=geometry),
        optim=OptimConfig(batch_size=4),
        run=RunConfig(workers=workers, memory_limit_mb=64),
    )
    source = config.open_loader(0, 1)
    batches = source.batches(position)
    return source, [next(batches) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("geometry", ["translate", "crop"])
def test_the_memory_limit_changes_no_batch(tmp_path, workers, geometry, monkeypatch):
    """Wide images: a crop must come from the whole of one, held or not."""
    write_folder(tmp_path, 10, size=(90, 40))
    _, held = first_batches(tmp_path, geometry, 0)
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)
    source, streamed = first_batches(tmp_path, geometry, workers)
    assert source.held is None
    for ours, theirs in zip(streamed, held, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_crops_of_workers_depend_on_the_position_alone(tmp_path, none_held):
    write_folder(tmp_path, 10, size=(50, 40))
    state = torch.get_rng_state()
    _, whole = first_batches(tmp_path, "crop", 0)
    assert torch.equal(torch.get_rng_state(), state)  # the trainer's generator is its own
    _, again = first_batches(tmp_path, "crop", 2, position=2, count=1)
    assert whole[2].images.shape == (4, 2, 3, 32, 32)
    assert torch.equal(whole[2].images, again[0].images)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_images_on_the_way_are_one_line(tmp_path, workers, none_held):
    write_folder(tmp_path, 40, classes=("one",))
    for name in ("0007.png", "0008.png"):
        (tmp_path / "one" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"^data: 1 of 40 images are damaged, above 1 %; the last: [^\n]*$"):
        first_batches(tmp_path, "translate", workers, count=10)


def test_an_image_is_cropped_anew_at_every_position(tmp_path):
    write_folder(tmp_path, 4, size=(50, 40))
    reader = loader.Reader(ImageSource(str(tmp_path), "train"), AugmentConfig(geometry="crop"), 32, 2, 0)
    first, again, later = (reader[key][0] for key in ((0, 3), (0, 3), (7, 3)))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(*first)  # nor are the two views one


def test_a_replacement_brings_its_own_label(tmp_path, monkeypatch):
    write_folder(tmp_path, 100)
    (tmp_path / "ant" / "0098.png").write_bytes(b"")  # the last of its class
    held = load_split(str(tmp_path), "train", 32)
    assert held.labels.tolist() == [0] * 49 + [1] * 51
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)
    _, batches = first_batches(tmp_path, "translate", 0, count=25)
    assert torch.cat([b.labels for b in batches]).sum() == 51


def test_a_damaged_image_on_the_way_keeps_the_batch_full(tmp_path, none_held):
    write_folder(tmp_path, 100, classes=("one",))
    (tmp_path / "one" / "0041.png").write_bytes(b"")
    source, batches = first_batches(tmp_path, "translate", 2, count=25)
    assert [len(b.images) for b in batches] == [4] * 25
    assert source.damaged == 1
    assert 41 not in torch.cat([b.indices for b in batches]).tolist()


def test_images_of_the_models_own_size_are_held_for_crops_too(tmp_path):
    write_folder(tmp_path, 10, size=(32, 32))
    source, batches = first_batches(tmp_path, "crop", 0)
    assert source.held is not None
    assert not source.seeded
    assert batches[0].images.shape == (4, 3, 32, 32)
    write_folder(tmp_path / "other", 10, size=(32, 33))
    source, batches = first_batches(tmp_path / "other", "crop", 0)
    assert source.held is None
    assert source.seeded
    assert batches[0].images.shape == (4, 2, 3, 32, 32)


def test_draws_from_a_seed_leave_all_generators_alone(monkeypatch):
    """`torch.manual_seed` starts every GPU's anew, and no fork of the CPU's puts those back: only the loop calls it."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU's generator"))
    before = torch.get_rng_state()
    with seeded(-3):
        found = torch.randn(4)
    assert torch.equal(found, torch.randn(4, generator=torch.Generator().manual_seed(-3)))
    assert torch.equal(before, torch.get_rng_state())
    sources = Path(fused_nce.__file__).parent.rglob("*.py")
    assert {path.name for path in sources if "torch.manual_seed(" in path.read_text(encoding="utf-8")} == {"loop.py"}
