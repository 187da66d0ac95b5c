"""A few recordings that a test makes: tones, whose pitch is the "digit" and whose loudness the "speaker"."""

import io
import json
import wave

import numpy as np

from tests.train.pictures import write_shard

RATE = 8000


def wav(samples, rate=RATE, channels=1):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(np.asarray(samples, dtype="<i2").tobytes())
    return file.getvalue()


def tone(digit, speaker, seed):
    rng = np.random.default_rng(seed)
    t = np.arange(int(rng.integers(600, 1400))) / RATE
    f = 300 * (digit + 1) * (1 + 0.3 * np.sin(2 * np.pi * 5 * t + rng.uniform(0, 6)))
    x = np.sin(2 * np.pi * np.cumsum(f) / RATE) + 0.05 * rng.standard_normal(len(t))
    return np.round(x * 3000 * (1 + 3 * speaker))


def members(split, each=6):
    digits, speakers = 3, 2
    first = {"train": 0, "test": 10_000}[split]
    for i in range(digits * speakers * each):
        digit, speaker = i % digits, i // digits % speakers
        yield f"{i}.wav", wav(tone(digit, speaker, first + i))
        yield f"{i}.json", json.dumps({"digit": digit, "speaker": f"s{speaker}"}).encode()


def make(folder):
    """A folder of one `.tar.gz` to train on and one `.tar` to test."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "train-0.tar.gz", members("train"))
    write_shard(folder / "test-0.tar", members("test", each=3))
    return folder
