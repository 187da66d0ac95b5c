"""Recordings for training and evaluation: WAV files in WebDataset shards, and windows of them."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fused_nce.train.data.loader import Batch, Order
from fused_nce.train.data.sources import Damage, Shards
from fused_nce.train.limits import ABOVE_0, AT_LEAST_1, Rule, optional, setting

FULL_SCALE = 32768  # of 16-bit samples


@dataclass
class WindowConfig:
    """What the model is given of a recording.

    Args:
        window: samples, from a random place; a shorter recording ends in zeros.
        level: the share of full scale that becomes 1, or null for each recording's own root mean square.
        label: that the online classifiers learn, of those in the shards; null for none.
    """

    window: int = setting(20480, AT_LEAST_1)
    level: float | None = setting(0.063, optional(ABOVE_0))
    label: str | None = setting(None, optional(Rule("the name of a label", bool)))


class WavSource(Shards):
    """Mono 16-bit `.wav` members. Every field of a `.json` member is a label by that name, `.cls` one named "class".

    Attributes:
        tags: the labels as text, of every recording, by name; "" where one has none.
        rate: samples a second.
    """

    def __init__(self, pattern: str, split: str) -> None:
        super().__init__(pattern, split, {".wav"}, {"json": _fields, "cls": lambda text: {"class": text.decode()}})
        if not self.entries:
            raise ValueError(f"data: no .wav in {', '.join(map(str, self.shards))}")
        known = [{k: v for found in note.values() for k, v in found.items()} for note in self.notes]
        names = list(dict.fromkeys(name for found in known for name in found))
        self.tags = {name: [found.get(name, "") for found in known] for name in names}
        with wave.open(io.BytesIO(self.content(0))) as file:
            self.rate = file.getframerate()

    def read(self, index: int) -> Tensor:  # (samples,) int16
        """A recording.

        Raises:
            ValueError: for another format than the first recording's, an empty or a damaged file.
        """
        try:
            with wave.open(io.BytesIO(self.content(index))) as file:
                form, content = file.getparams(), file.readframes(file.getnframes())
        except (wave.Error, EOFError) as error:
            raise ValueError(str(error) or "ends too early") from error
        if (form.nchannels, form.sampwidth, form.framerate) != (1, 2, self.rate):
            raise ValueError(
                f"must be mono, 16 bit and {self.rate} Hz, got {form.nchannels} channels, {8 * form.sampwidth} bit and "
                f"{form.framerate} Hz"
            )
        if not content or len(content) != 2 * form.nframes:
            raise ValueError(f"holds {len(content) // 2} of {form.nframes} samples")
        return torch.from_numpy(np.frombuffer(content, dtype="<i2").astype(np.int16))


def _fields(text: bytes) -> dict[str, str]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"a .json member must hold an object, got {text[:40]!r}")
    return {name: str(value) for name, value in found.items() if isinstance(value, str | int)}


@dataclass
class Recordings:
    """A split, decoded.

    Args:
        waves: `(samples,)` int16 each.
        tags: labels as text, by name.
        rate: samples a second.
        damaged: recordings that could not be read, each replaced by the next good one.
    """

    waves: list[Tensor]
    tags: dict[str, list[str]]
    rate: int
    damaged: int = 0

    def labels(self, name: str, classes: list[str]) -> Tensor:  # (n,)
        """Numbers of a label, −1 for what is no class."""
        number = {text: i for i, text in enumerate(classes)}
        return torch.tensor([number.get(text, -1) for text in self.tags[name]])


def load(data: str, split: str) -> Recordings:
    """Decode one split into memory; "probe" is the training split.

    Raises:
        ValueError: if the shards or their recordings cannot be used, or more than 1 % of them are damaged.
    """
    source = WavSource(data, "test" if split == "test" else "train")
    damage = Damage(len(source))
    waves, used = zip(*(damage.read(source, i) for i in range(len(source))), strict=True)
    tags = {name: [values[i] for i in used] for name, values in source.tags.items()}
    return Recordings(list(waves), tags, source.rate, damage.count)


def classes(values: list[str]) -> list[str]:
    """The different ones, numbers in their order."""
    return sorted(set(values) - {""}, key=lambda v: (not v.isdigit(), int(v) if v.isdigit() else 0, v))


def scaled(
    recording: Tensor,  # (samples,) int16
    level: float | None,
) -> Tensor:  # (samples,) float32
    """In units of `level`, a share of full scale; or, if it is None, of the recording's own root mean square."""
    x = recording.float() / FULL_SCALE
    return x / (x.square().mean().sqrt().clamp(min=1 / FULL_SCALE) if level is None else level)


class WindowLoader:
    """Windows at random places of recordings, in the form of `loader.Loader`; a shorter recording ends in zeros.

    Order and places depend on seed and position alone, so that a run resumes exactly.

    Args:
        data: shards.
        windows: how long they are, and which label they have.
        local_batch: windows of this process in one batch.
        seed: of the order and the places.
        rank: of this process.
        world: processes.
    """

    def __init__(
        self, data: str, windows: WindowConfig, local_batch: int, *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        a, held = windows, load(data, "train")
        if a.label is not None and a.label not in held.tags:
            raise ValueError(f"augment.label: must be null or one of {', '.join(held.tags)}, got {a.label}")
        self.waves = [scaled(x, a.level) for x in held.waves]
        self.window, self.seed, self.rank = a.window, seed, rank
        self.count, self.damaged = len(self.waves), held.damaged
        self.classes = classes(held.tags[a.label]) if a.label is not None else []
        self.labels = held.labels(a.label, self.classes) if a.label is not None else torch.full((self.count,), -1)
        self.order = Order(self.count, local_batch, seed, rank, world)

    @property
    def labelled(self) -> bool:
        """Whether there is anything for a classifier to learn."""
        return len(self.classes) > 1

    def batches(self, position: int) -> Iterator[Batch]:
        """Endless, from a position on: windows (B, window) float32."""
        while True:
            chosen = self.order.indices(position)
            generator = torch.Generator().manual_seed(hash((self.seed, position, self.rank)))
            places = torch.rand(len(chosen), generator=generator).tolist()
            windows = [self._cut(self.waves[i], place) for i, place in zip(chosen.tolist(), places, strict=True)]
            yield Batch(torch.stack(windows), self.labels[chosen], chosen)
            position += 1

    def _cut(self, wave: Tensor, place: float) -> Tensor:
        spare = len(wave) - self.window
        if spare <= 0:
            return torch.nn.functional.pad(wave, (0, -spare))
        start = int(place * (spare + 1))
        return wave[start : start + self.window]
