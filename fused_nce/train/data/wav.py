"""The samples of a WAV file: mono PCM of 16 bits from its bytes, every other encoding through soundfile."""

from __future__ import annotations

import importlib.util
import io
import struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FULL_SCALE = 32768  # of 16-bit samples
PCM, EXTENSIBLE = 1, 0xFFFE
NAMES = {1: "PCM", 2: "ADPCM", 3: "float", 6: "A-law", 7: "µ-law", 0x11: "IMA ADPCM", 0x55: "MP3"}
UNKNOWN_BYTES = 0x7FFFFF00  # and above: what writers put there that cannot go back to the header
HEADER_BYTES = 1 << 16  # where the header must be found when only the rate is asked for


class Header(NamedTuple):
    """Of a WAV file.

    Attributes:
        code: of the encoding, that of the extension if there is one.
        channels: how many.
        rate: samples a second.
        bits: of a sample.
        start: of the samples, in bytes.
        size: of the samples, in bytes; None where the header does not know it.
    """

    code: int
    channels: int
    rate: int
    bits: int
    start: int
    size: int | None

    def decoded_bytes(self, file: int) -> int:
        """What the samples take as int16, by the header of a file of so many bytes."""
        there = max(0, file - self.start)
        return (there if self.size is None else min(self.size, there)) * 16 // (self.bits or 16)

    def __str__(self) -> str:
        coded = "" if self.code == PCM else f" {NAMES.get(self.code, f'format {self.code}')}"
        return f"{self.channels} channels, {self.bits} bit{coded} and {self.rate} Hz"


def read_header(content: bytes) -> Header:
    """Of a WAV file, RIFF or RF64, from its first bytes. The size of the whole in it is not looked at.

    Raises:
        ValueError: for what is none.
    """
    if content[:4] not in (b"RIFF", b"RF64") or content[8:12] != b"WAVE":
        raise ValueError(f"is no WAV file: it starts with {content[:12]!r}")
    (whole,) = struct.unpack_from("<I", content, 4)
    form: tuple[int, int, int, int] | None = None
    large, place = None, 12
    while place + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        place += 8
        if name == b"ds64" and place + 16 <= len(content):
            (large,) = struct.unpack_from("<Q", content, place + 8)
        elif name == b"fmt " and place + 16 <= len(content):
            code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", content, place)
            if code == EXTENSIBLE and size >= 40 and place + 26 <= len(content):
                (code,) = struct.unpack_from("<H", content, place + 24)
            form = code, channels, rate, bits
        elif name == b"data":
            if form is None:
                raise ValueError("has its samples before their format")
            if content[:4] == b"RF64" and size == 0xFFFFFFFF and large is not None:
                return Header(*form, place, large)
            unknown = size >= UNKNOWN_BYTES or (size == 0 and whole in (0, 8))
            return Header(*form, place, None if unknown else size)
        place += size + size % 2
    raise ValueError("ends before its samples")


def read(content: bytes) -> tuple[Tensor, Header]:
    """The samples (n,) int16 of a recording, and its header.

    Raises:
        ValueError: for a damaged or empty file, for more than one channel, and for an encoding that needs soundfile
            where it is not installed.
    """
    header = read_header(content)
    if header.channels != 1:
        raise ValueError(f"must be mono, got {header}")
    raw = content[header.start :] if header.size is None else content[header.start : header.start + header.size]
    size = len(raw) if header.size is None else header.size
    if not raw or len(raw) != size:
        width = max(1, header.bits // 8)
        raise ValueError(f"holds {len(raw) // width} of {size // width} samples")
    if (header.code, header.bits) != (PCM, 16):
        return _through_soundfile(content, header), header
    return torch.from_numpy(np.frombuffer(raw[: len(raw) // 2 * 2], dtype="<i2").astype(np.int16)), header


def _through_soundfile(content: bytes, header: Header) -> Tensor:
    if importlib.util.find_spec("soundfile") is None:
        raise ValueError(f"must be PCM of 16 bit where soundfile is not installed, got {header}: pip install soundfile")
    import soundfile

    values, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"holds {len(values)} samples" if not len(values) else "holds samples that are not finite")
    scaled = np.rint(values * FULL_SCALE).clip(-FULL_SCALE, FULL_SCALE - 1)
    return torch.from_numpy(scaled.astype(np.int16))
