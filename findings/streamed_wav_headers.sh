#!/usr/bin/env bash
# A WAV that was written to a pipe has no lengths: the writer could not go back to fill them in. Three readers, three
# answers. ffmpeg leaves 0xFFFFFFFF in both size fields, sox 0x7FFFFFFF, others 0.
#
# Seen with soundfile 0.14.0 (libsndfile 1.2.2), scipy 1.17.1 and Python 3.11's wave, on 1,000 samples of 16-bit PCM:
#   0xFFFFFFFF  soundfile 1000 samples; scipy 1000, with a warning; wave announces 2147483647 frames and reads 1000
#   0x7FFFFFFF  the same, wave announces 1073741805 frames
#   0           soundfile returns 0 samples and says nothing; scipy raises UnboundLocalError; wave raises Error
# So a frame count taken from the header (`getnframes`, and every duration or buffer made from it) is wrong by a factor
# of two million, and a reader that trusts soundfile loses the recording without a word where the sizes are 0.
# Exits 0 while all of this holds.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check soundfile==0.14.0 scipy==1.17.1 numpy==2.4.6 2>/dev/null
"$work/venv/bin/python" - <<'PY'
import io
import struct
import sys
import warnings
import wave

import numpy as np
import scipy.io.wavfile
import soundfile

SAMPLES = ((np.arange(1000) % 200 - 100) * 100).astype("<i2").tobytes()
FORMAT = struct.pack("<HHIIHH", 1, 1, 8000, 16000, 2, 16)


def streamed(riff, data):
    head = b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt " + struct.pack("<I", 16) + FORMAT
    return io.BytesIO(head + b"data" + struct.pack("<I", data) + SAMPLES)


def by_soundfile(file):
    return len(soundfile.read(file, dtype="int16")[0])


def by_scipy(file):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = len(scipy.io.wavfile.read(file)[1])
    return count, [type(each.message).__name__ for each in caught]


def by_wave(file):
    with wave.open(file) as opened:
        return opened.getnframes(), len(opened.readframes(opened.getnframes())) // 2


def answer(reader, sizes):
    try:
        return reader(streamed(*sizes))
    except Exception as error:
        return type(error).__name__


SIZES = {"0xFFFFFFFF": (2**32 - 1, 2**32 - 1), "0x7FFFFFFF": (2**31 - 1, 2**31 - 37), "0": (0, 0)}
WARNED = ["WavFileWarning"]
EXPECTED = {
    "0xFFFFFFFF": [1000, (1000, WARNED), (2147483647, 1000)],
    "0x7FFFFFFF": [1000, (1000, WARNED), (1073741805, 1000)],
    "0": [0, "UnboundLocalError", "Error"],
}
print("soundfile", soundfile.__version__, soundfile.__libsndfile_version__, "scipy", scipy.__version__, sys.version.split()[0])
found = {name: [answer(r, sizes) for r in (by_soundfile, by_scipy, by_wave)] for name, sizes in SIZES.items()}
for name, answers in found.items():
    print(f"{name:12} soundfile {answers[0]}, scipy {answers[1]}, wave {answers[2]}")
sys.exit(found != EXPECTED)
PY
