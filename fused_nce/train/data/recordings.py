"""Recordings for training and evaluation: WAV files in folders or WebDataset shards, and windows of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_nce.train.data import wav
from fused_nce.train.data.account import some
from fused_nce.train.data.image_source import Damage, open_samples
from fused_nce.train.data.images import DEFAULT_LIMIT_BYTES
from fused_nce.train.data.labels import Classes
from fused_nce.train.data.loader import Batch, Order
from fused_nce.train.data.members import RECORDING
from fused_nce.train.data.wav import FULL_SCALE
from fused_nce.train.limits import ABOVE_0, AT_LEAST_1, Rule, optional, setting


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


class WavSource:
    """Mono `.wav` files. Every field of a `.json` member is a label by that name, `.cls` or the folder is "class".

    Attributes:
        samples: their files.
        tags: the labels as text, of every recording, by name; "" where one has none.
        rate: samples a second, of most of the recordings.
        decoded_bytes: what all take as int16, by their headers.

    Raises:
        ValueError: for data that cannot be read, or two labels of one name.
    """

    def __init__(self, data: str, split: str) -> None:
        self.samples = samples = open_samples(data, split, RECORDING)
        classes, known = Classes(samples), []
        for i, (text, fields) in enumerate(zip(samples.texts, samples.fields, strict=True)):
            number = classes.number(samples, text) if text else None
            own = {} if number is None else {"class": classes.names[number]}
            if fields.get("class", own.get("class")) != own.get("class", fields.get("class")):
                raise ValueError(
                    f"data: {samples.label_name(i)} says {own['class']}, the .json beside it {fields['class']}"
                )
            known.append(fields | own)
        names = list(dict.fromkeys(name for found in known for name in found))
        self.tags = {name: [found.get(name, "") for found in known] for name in names}
        rates, self.decoded_bytes = Counter[int](), 0
        for i in range(len(samples)):
            with suppress(ValueError, OSError):  # counted when it is read
                header = wav.read_header(samples.content(i, wav.HEADER_BYTES))
                rates[header.rate] += header.rate > 0
                self.decoded_bytes += header.decoded_bytes(samples.size(i))
        self.rate = max(rates, key=lambda rate: (rates[rate], rate), default=0)

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Tensor:  # (samples,) int16
        """A recording.

        Raises:
            ValueError: for another rate than most have, an empty or a damaged file: see `wav.read`.
        """
        found, header = wav.read(self.samples.content(index))
        if header.rate != self.rate:
            raise ValueError(f"must have the {self.rate} Hz of most recordings, got {header}")
        return found


@dataclass
class Recordings:
    """A split, decoded.

    Args:
        waves: `(samples,)` int16 each.
        tags: labels as text, by name.
        rate: samples a second.
        damaged: recordings that could not be read, each replaced by the next good one.
        account: one line: recordings, their labels, and what was left out and why.
        digest: of the recordings' names and labels.
        names: where each lies.
    """

    waves: list[Tensor]
    tags: dict[str, list[str]]
    rate: int
    damaged: int = 0
    account: str = ""
    digest: str = ""
    names: list[str] = field(default_factory=list)

    def labels(self, name: str, classes: list[str]) -> Tensor:  # (n,)
        """Numbers of a label, −1 for what is no class."""
        number = {text: i for i, text in enumerate(classes)}
        return torch.tensor([number.get(text, -1) for text in self.tags[name]])


def load(data: str, split: str, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Recordings:
    """Decode one split into memory; "probe" is the training split.

    Args:
        data: see `open_samples`.
        split: "train", "probe" or "test".
        limit_bytes: refuse a split that takes more as int16, before any of it is decoded.

    Raises:
        ValueError: if the shards or their recordings cannot be used, more than 1 % of them are damaged, or they take
            more than the limit.
    """
    source = WavSource(data, split)
    if source.decoded_bytes > limit_bytes:
        raise ValueError(
            f"data: {data}, {split}: {len(source):,} recordings take {-(-source.decoded_bytes >> 20)} MB as int16; "
            f"memory_limit_mb must be as large, got {limit_bytes >> 20}"
        )
    samples, damage = source.samples, Damage(len(source), RECORDING)
    waves, used = zip(*(damage.read(source, i) for i in range(len(source))), strict=True)
    tags = {name: [values[i] for i in used] for name, values in source.tags.items()}
    account = samples.account.line(
        data,
        split,
        f"{len(source):,} recordings of {source.rate} Hz",
        *(_described(name, values) for name, values in tags.items()),
        some(damage.count, "damaged, each replaced by the next one"),
    )
    return Recordings(
        list(waves), tags, source.rate, damage.count, account, samples.digest(), [samples.name(i) for i in used]
    )


def _described(name: str, values: list[str]) -> str:
    without = some(values.count(""), "without it")
    return f"{len(set(values) - {''}):,} classes of {name!r}{without and f' ({without})'}"


def classes(values: list[str]) -> list[str]:
    """The different ones, numbers in their order."""
    return sorted(set(values) - {""}, key=lambda v: (not v.isdecimal(), int(v) if v.isdecimal() else 0, v))


def unit(
    recording: Tensor,  # (samples,) int16
    level: float | None,
) -> Tensor:  # () float32
    """What becomes 1: `level`, a share of full scale; or, if it is None, the recording's own root mean square."""
    if level is not None:
        return torch.tensor(level)
    return (recording.float() / FULL_SCALE).square().mean().sqrt().clamp(min=1 / FULL_SCALE)


def scaled(
    recording: Tensor,  # (samples,) int16
    level: float | None,
) -> Tensor:  # (samples,) float32
    """In units of `unit`."""
    return recording.float() / FULL_SCALE / unit(recording, level)


class WindowLoader:
    """Windows at random places of recordings, in the form of `loader.Loader`; a shorter recording ends in zeros.

    Order and places depend on seed and position alone, so that a run resumes exactly. Recordings are held as int16; a
    window is scaled when it is cut.

    Args:
        data: a folder or shards.
        windows: how long they are, and which label they have.
        local_batch: windows of this process in one batch.
        seed: of the order and the places.
        rank: of this process.
        world: processes.
        limit_bytes: refuse recordings that take more.
    """

    def __init__(
        self,
        data: str,
        windows: WindowConfig,
        local_batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        a, held = windows, load(data, "train", limit_bytes=limit_bytes)
        if a.label is not None and a.label not in held.tags:
            raise ValueError(f"augment.label: must be null or one of {', '.join(held.tags)}, got {a.label}")
        self.waves, self.units = held.waves, torch.stack([unit(x, a.level) for x in held.waves])
        self.window, self.seed = a.window, seed
        self.count, self.damaged, self.rate = len(self.waves), held.damaged, held.rate
        self.account, self.digest = held.account, held.digest
        self.classes = classes(held.tags[a.label]) if a.label is not None else []
        self.labels = held.labels(a.label, self.classes) if a.label is not None else torch.full((self.count,), -1)
        self.order = Order(self.count, local_batch, seed, rank, world, RECORDING)

    kind, streamed = RECORDING, False

    @property
    def labelled(self) -> bool:
        """Whether there is anything for a classifier to learn."""
        return len(self.classes) > 1

    def batches(self, position: int) -> Generator[Batch, None, None]:
        """Endless, from a position on: windows (B, window) float32."""
        while True:
            chosen = self.order.indices(position)
            generator = torch.Generator().manual_seed(hash((self.seed, position, 0)))
            drawn = torch.rand(len(chosen) * self.order.world, generator=generator)  # the same, whoever shares them
            places = drawn.chunk(self.order.world)[self.order.rank].tolist()  # fault: windows-of-processes
            windows = [self._cut(self.waves[i], place) for i, place in zip(chosen.tolist(), places, strict=True)]
            scaled_windows = torch.stack(windows).float() / FULL_SCALE / self.units[chosen, None]
            yield Batch(scaled_windows, self.labels[chosen], chosen)
            position += 1

    def _cut(self, wave: Tensor, place: float) -> Tensor:  # (window,) int16
        spare = len(wave) - self.window
        if spare <= 0:
            return torch.nn.functional.pad(wave, (0, -spare))
        start = int(place * (spare + 1))
        return wave[start : start + self.window]
