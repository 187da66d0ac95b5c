"""What is held in memory: of a sample a few bytes and no object of its own, of recordings 16 bits and a limit."""

import gc
import pickle
import tarfile
import tracemalloc
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fused_nce.train import command
from fused_nce.train.data import recordings, wav
from fused_nce.train.data.image_source import ImageSource
from fused_nce.train.data.loader import Loader, Reader
from fused_nce.train.data.texts import Texts
from fused_nce.train.evaluation.recordings import evaluate
from fused_nce.train.settings import AugmentConfig
from tests.train import speech
from tests.train.pictures import write_folder, write_shard

ODD = ["a/b.png", "", "ü", "\udcff\udcc3\udca9", "😀" * 40, "c"]  # the fourth: bytes of a name that are no UTF-8


def test_texts_are_a_list_of_texts():
    texts = Texts(ODD)
    assert (list(texts), texts[-2], len(texts), texts.index("ü")) == (ODD, ODD[-2], 6, 2)
    assert list(pickle.loads(pickle.dumps(texts))) == ODD
    with pytest.raises(IndexError):
        texts[6]


def members(count, ids):
    """Files that an index does not look into, of 100 classes; with an `.id` each too, which is no label."""
    for i in range(count):
        yield f"class{i % 100}/{i:07d}.png", f"image {i}".encode()
        yield f"class{i % 100}/{i:07d}.cls", str(i % 100).encode()
        if ids:
            yield f"class{i % 100}/{i:07d}.id", str(i + 10**9).encode()


def write(kind, root, count):
    root.mkdir()
    if kind == "folder":
        for path, content in members(count, ids=False):
            (root / path).parent.mkdir(exist_ok=True)
            if path.endswith(".png"):
                (root / path).write_bytes(content)
    else:
        write_shard(root / f"train-0.{kind.partition(' ')[0]}", members(count, ids=kind == "tar ids"))
    return root


def reachable(thing):
    """The objects of Python that it leads to."""
    found, ahead = {}, [thing]
    while ahead:
        one = ahead.pop()
        if id(one) not in found and not isinstance(one, type | ModuleType | FunctionType):
            found[id(one)] = one
            ahead += gc.get_referents(one)
    return found


@pytest.mark.parametrize("kind", ["folder", "tar", "tar ids", "tar.gz"])
def test_a_sample_is_a_few_bytes_and_no_object(tmp_path, kind):
    """A forked reader copies the page of each object that it looks at: there is none of a single sample."""
    few, many = (write(kind, tmp_path / str(count), count) for count in (100, 400))

    def traced(root):
        gc.collect()
        tracemalloc.start()
        try:
            source = ImageSource(root, "train")
            gc.collect()
            return source, tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    traced(few)  # what is imported or remembered once
    (small, before), (large, after) = traced(few), traced(many)
    assert (after - before) / 300 < 125  # 690 of shards, 121 of folders as objects
    assert (len(pickle.dumps(large)) - len(pickle.dumps(small))) / 300 < 90
    objects = [len(reachable(Reader(source, AugmentConfig(), 32, 1, 0))) for source in (small, large)]
    assert abs(objects[1] - objects[0]) < 10  # a count in the account is one


@pytest.mark.parametrize("kind", ["folder", "tar", "tar ids", "tar.gz"])
def test_a_spawned_reader_and_one_of_some_samples_read_the_same(tmp_path, kind):
    source = ImageSource(write(kind, tmp_path / "data", 30), "train")
    other = pickle.loads(pickle.dumps(source))
    there, again = (
        [(s.samples.name(i), s.samples.label_name(i), s.samples.content(i), s.samples.size(i)) for i in range(30)]
        for s in (source, other)
    )
    assert again == there
    assert sorted((content, size) for *_, content, size in there) == sorted(
        (f"image {i}".encode(), len(f"image {i}")) for i in range(30)
    )
    source.keep([2, 5, 29])
    kept: Any = source.samples
    assert [(kept.name(i), kept.label_name(i), kept.content(i), kept.size(i)) for i in range(3)] == [
        there[i] for i in (2, 5, 29)
    ]
    if kind != "folder":
        assert bytes(kept.held) == (b"".join(there[i][2] for i in (2, 5, 29)) if kind == "tar.gz" else b"")


def test_of_an_archive_that_is_held_nothing_stays_that_no_sample_has(tmp_path):
    kept = [("0.png", b"one"), ("1.png", b"three"), ("2.png", tarfile.LNKTYPE, "1.png")]
    write_shard(tmp_path / "train-0.tar.gz", [kept[0], ("0.jpg", b"further"), *kept[1:]])
    samples: Any = ImageSource(tmp_path, "train").samples
    assert [samples.content(i) for i in range(3)] == [b"one", b"three", b"three"]
    assert bytes(samples.held) == b"onethree"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_warning_with_its_reason(tmp_path, caplog, workers):
    write_folder(tmp_path, 100, classes=("one",))
    (tmp_path / "one" / "0041.png").write_bytes(b"junk")
    loader = Loader(str(tmp_path), AugmentConfig(geometry="translate"), 32, 4, seed=0, workers=workers, limit_bytes=1)
    batches = loader.batches(0)
    for _ in range(50):  # two epochs
        next(batches)
    batches.close()
    assert loader.damaged == 1
    said = [message for message in caplog.messages if "damaged" in message]
    assert said == [
        f"damaged image 1, replaced by the next one: {tmp_path}/one/0041.png: "
        "is no image of a format that Pillow knows (4 bytes)"
    ]
    assert not loader.reader.damage.said  # the other processes are silent


# --- recordings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [None, 0.063])
def test_recordings_are_held_as_they_are_and_windows_have_the_bits_of_the_scaled_whole(tmp_path, level):
    loader = recordings.WindowLoader(
        str(speech.make(tmp_path)), recordings.WindowConfig(window=700, level=level), 12, seed=0
    )
    assert {wave.dtype for wave in loader.waves} == {torch.int16}
    for window, index in zip(*next(loader.batches(0))[::2], strict=True):
        wave = loader.waves[index].float() / 32768
        whole = wave / (wave.square().mean().sqrt() if level is None else level)
        spare = len(whole) - 700
        if spare <= 0:
            assert torch.equal(window, torch.nn.functional.pad(whole, (0, -spare)))
        else:
            assert any(torch.equal(window, whole[start : start + 700]) for start in range(spare + 1))


def test_recordings_above_the_limit_are_refused_by_their_headers(tmp_path, monkeypatch):
    for split, count in (("train", 3), ("test", 1)):
        content = [(f"{i}.wav", speech.wav(np.zeros(200_000 + i))) for i in range(count)]
        write_shard(tmp_path / f"{split}-0.tar", content)
    data, need = str(tmp_path), "3 recordings take 2 MB as int16; memory_limit_mb must be as large, got 1$"
    assert recordings.WavSource(data, "train").decoded_bytes == 2 * 600_003
    assert len(recordings.load(data, "train", limit_bytes=2 * 600_003).waves) == 3
    monkeypatch.setattr(wav, "read", lambda content: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=f"^data: {data}, train: {need}"):
        recordings.load(data, "train", limit_bytes=1 << 20)
    words = [f"--data={data}", "--preset=fsdd-tiny", "--run.memory_limit_mb=1", f"--out={tmp_path / 'a'}"]
    config = command.parse("cpc", words)[0]
    with pytest.raises(ValueError, match=f"train: {need}"):
        config.open_loader(0, 1)
    none_asked: Any = (None, config, SimpleNamespace(taps=("c_t",), protocols=()))
    with pytest.raises(ValueError, match=f"probe: {need}"):
        evaluate(*none_asked)


def test_decoded_bytes_are_those_of_a_header_and_no_more_than_the_file_has():
    def header(bits, size):
        return wav.Header(1, 1, 8000, bits, 44, size)

    sizes = {(16, 1000): 1000, (32, 1000): 500, (8, 1000): 2000, (4, 1000): 4000, (0, 1000): 1000}
    assert {(h.bits, h.size): h.decoded_bytes(1044) for h in (header(*key) for key in sizes)} == sizes
    assert [header(16, size).decoded_bytes(file) for size, file in ((None, 144), (1 << 30, 144), (10, 20))] == [
        100,
        100,
        0,
    ]
