"""WAV files of every kind: read as they are, through soundfile, or one line that says what is missing."""

import importlib.util
import io
import json
import re
import struct

import numpy as np
import pytest
import torch

from fused_nce.train.data import recordings, wav
from tests.train import speech
from tests.train.pictures import write_shard

X = np.random.default_rng(0).normal(0, 3000, 501).astype("<i2")
WAVE = torch.from_numpy(X.copy())
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")
UNKNOWN = 0xFFFFFFFF


def riff(data, *, code=1, bits=16, extra=b"", whole=None, size=None, head=b"RIFF", before=b"", after=b""):
    """A WAV file of one channel, and whatever its header says of sizes."""
    form = struct.pack("<HHIIHH", code, 1, 8000, 8000 * bits // 8, bits // 8, bits) + extra
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data + after
    return head + struct.pack("<I", len(body) if whole is None else whole) + body


SOUND = X.tobytes()
EXTENSION = struct.pack("<HHI", 22, 16, 4) + PCM_GUID
DS64 = b"ds64" + struct.pack("<IQQQI", 28, 0, len(SOUND), len(X), 0)
FLOAT = (X / np.float32(32768)).astype("<f4").tobytes()
READ = {
    "plain": riff(SOUND),
    "extensible": riff(SOUND, code=0xFFFE, extra=EXTENSION),
    "streamed": riff(SOUND, whole=UNKNOWN, size=UNKNOWN),
    "streamed by sox": riff(SOUND, whole=0x7FFFFFFF, size=0x7FFFFFFF - 36),
    "sizes of zero": riff(SOUND, whole=0, size=0),
    "whole too small": riff(SOUND, whole=100),
    "whole too large": riff(SOUND, whole=10**8),
    "RF64": riff(SOUND, whole=UNKNOWN, size=UNKNOWN, head=b"RF64", before=DS64),
    "other chunks": riff(SOUND, before=b"LIST" + struct.pack("<I", 5) + b"abcde\0", after=b"LIST\4\0\0\0abcd"),
}
REFUSED = {
    "": "is no WAV file: it starts with b''",
    "RIFX": "is no WAV file: it starts with b'RIFX",
    "cut in the header": "ends before its samples",
    "cut": "holds 499 of 501 samples",
    "no samples": "holds 0 of 0 samples",
    "two channels": "must be mono, got 2 channels, 16 bit and 8000 Hz",
}
BROKEN = {
    "": b"",
    "RIFX": riff(SOUND, head=b"RIFX"),
    "cut in the header": riff(SOUND)[:40],
    "cut": riff(SOUND)[:-4],
    "no samples": riff(b""),
    "two channels": speech.wav(X[:500], channels=2),
}


def test_every_header_of_pcm_gives_the_same_samples():
    for name, content in READ.items():
        found, header = wav.read(content)
        assert torch.equal(found, WAVE), name
        assert (header.rate, header.bits, header.code) == (8000, 16, wav.PCM), name


def test_what_cannot_be_read_says_why():
    for name, message in REFUSED.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            wav.read(BROKEN[name])


def test_other_encodings_go_through_soundfile():
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio`")
    for name, bound in {"PCM_24": 0, "PCM_32": 0, "FLOAT": 0, "DOUBLE": 0, "PCM_U8": 256, "ULAW": 512}.items():
        file = io.BytesIO()
        soundfile.write(file, X / 32768, 8000, format="WAV", subtype=name)
        found, header = wav.read(file.getvalue())
        assert header.rate == 8000
        assert (found.int() - WAVE.int()).abs().max() <= bound, name
    for content in (riff(FLOAT, code=3, bits=32), riff(FLOAT, code=3, bits=32, whole=UNKNOWN, size=UNKNOWN)):
        assert torch.equal(wav.read(content)[0], WAVE)
    with pytest.raises(ValueError, match="holds 500 of 501 samples"):
        wav.read(riff(FLOAT, code=3, bits=32)[:-4])
    with pytest.raises(ValueError, match="not finite"):
        wav.read(riff(np.full(4, np.nan, "<f4").tobytes(), code=3, bits=32))


def test_without_soundfile_other_encodings_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match="must be PCM of 16 bit where soundfile is not installed, got 1 channels, 32 bit"
    ):
        wav.read(riff(FLOAT, code=3, bits=32))


def split(folder, special, name="train", count=200, text=""):
    """A shard of `count` recordings, some of them replaced."""
    folder.mkdir(exist_ok=True)
    content = []
    for i in range(count):
        content += [(f"{i}.wav", special.get(i, speech.wav([i] * 5))), (f"{i}.cls", f"{i % 3}{text}".encode())]
    write_shard(folder / f"{name}-0.tar", content)
    return folder


def test_the_first_recording_is_read_as_guarded_as_the_others(tmp_path):
    odd = {"rate": speech.wav([1], rate=16000), "junk": b"junk", "empty": b"", "stereo": speech.wav([1, 2], channels=2)}
    for name, content in odd.items():
        found = recordings.load(str(split(tmp_path / name, {0: content})), "train")
        assert (found.damaged, found.rate, found.waves[0].tolist(), found.tags["class"][0]) == (1, 8000, [1] * 5, "1")
        assert found.account == (
            f"{tmp_path / name}, train: 200 recordings of 8000 Hz, 3 classes of 'class', "
            "1 damaged, each replaced by the next one"
        )
    half = dict.fromkeys(range(100), odd["rate"])
    with pytest.raises(
        ValueError, match=r"^data: 3 of 200 recordings are damaged.*Hz of most recordings, got 1 channel"
    ):
        recordings.load(str(split(tmp_path / "half", half)), "train")


def test_labels_of_recordings_follow_the_rule_of_images(tmp_path):
    for text in ("", "\n", " "):
        found = recordings.load(str(split(tmp_path / repr(text), {}, count=4, text=text)), "train")
        assert (found.tags["class"], recordings.classes(found.tags["class"])) == (["0", "1", "2", "0"], ["0", "1", "2"])
    (tmp_path / "''" / "classes.json").write_text(json.dumps(["x", "b", "a"]))
    assert recordings.load(str(tmp_path / "''"), "train").tags["class"] == ["x", "b", "a", "x"]
    fields = {"n": 3.0, "who": " 007\n", "long": 1.5, "none": None}
    content = [("0.wav", speech.wav([1])), ("0.json", json.dumps(fields).encode()), ("0.cls", b"4\n")]
    write_shard(tmp_path / "train-0.tar", content)
    found = recordings.load(str(tmp_path), "train")
    assert found.tags == {"n": ["3"], "who": ["007"], "class": ["4"]}
    assert "1 fields long that hold no label" in found.account
    write_shard(tmp_path / "train-0.tar", [*content[:1], ("0.json", b'{"class": "5"}'), content[2]])
    with pytest.raises(ValueError, match=r"train-0\.tar:0\.cls says 4, the \.json beside it 5"):
        recordings.load(str(tmp_path), "train")


def test_recordings_in_folders(tmp_path):
    for name, value in (("b", 1), ("a", 2), ("a", 3)):
        (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name / f"{value}.WAV").write_bytes(speech.wav([value]))
    (tmp_path / "train" / "a" / "._2.wav").write_bytes(b"")
    found = recordings.load(str(tmp_path), "train")
    assert ([w.tolist() for w in found.waves], found.tags) == ([[2], [3], [1]], {"class": ["a", "a", "b"]})
    assert found.account.endswith(f"left out: 1 hidden files ({tmp_path}/train/a/._2.wav)")
