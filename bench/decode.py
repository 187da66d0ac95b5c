"""`python -m bench.decode`: JPEGs that one core decodes and crops in a second, by the ways that people use, in turn.

The images are those of `python -m bench.data`, or your own (`--folder`). simplejpeg is measured where it is installed.
`--out bench/results/decode-HOST.json` keeps the record; `python -m bench.tables` puts it into `docs/imagenet.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import host
from bench.data import synthesise
from bench.text import markdown


def table(found: dict[str, Any]) -> str:
    """Of a record, and where it is from."""
    sides, host_, first = found["sides"], found["host"], found["sides"][0]
    header = ["way", *(f"{side['side']} px, images/s" for side in sides)]
    rows = [[name, *(f"{side['images_per_s'][name]:,.0f}" for side in sides)] for name in first["images_per_s"]]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{markdown(header, rows)}\n\nProcessor time of one thread, {first['images']} JPEGs of about "
        f"{first['mean_bytes'] >> 10} kB, the best of {first['rounds']} rounds in turn. {host_['cpu_model']}; "
        f"{versions}; commit {found['code']['commit'][:7]}."
    )


def block(folder: Path) -> str:
    """What the documents show."""
    return host.shown(folder, "decode-*.json", table, "python -m bench.decode --out bench/results/decode-HOST.json")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the record where asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--images", type=int, default=64, help="JPEGs to make")
    parser.add_argument("--folder", help="of JPEGs to take instead")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 224], help="of the crops, px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        if not options.folder:
            synthesise(Path(temporary), options.images)
        command = [sys.executable, "-m", "fused_nce.train.rate", str(folder), f"--rounds={options.rounds}"]
        runs = [
            subprocess.run([*command, f"--decode={side}"], check=True, stdout=subprocess.PIPE).stdout
            for side in options.sides
        ]
    found: dict[str, Any] = {"sides": [json.loads(run) for run in runs]}
    found |= {**host.provenance(), "busy_share": host.busy_now()}
    print(table(found))
    if options.out:
        host.write(options.out, found)
    return found


if __name__ == "__main__":
    main()
