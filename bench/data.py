"""`python -m bench.data`: images a second that one core reads, cuts and augments, of JPEGs shaped like ImageNet's.

The images are noise, smoothed to about the bytes of a photograph (500 × 375 px, some 100 kB), one subfolder a class.
With `--keep FOLDER` they stay, for a dry run: `docs/imagenet.md` has it.
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

import torch
import torch.nn.functional as F

from bench import host

WIDTH, HEIGHT, CLASSES = 500, 375, 4
IMAGENET_IMAGES = 1_281_167


def synthesise(folder: Path, count: int) -> None:
    """`count` JPEGs in `CLASSES` subfolders."""
    from torchvision.io import write_jpeg

    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, 3, HEIGHT // 4, WIDTH // 4, generator=generator)
        image = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic", antialias=True)[0].clamp(0, 1)
        image = (255 * (0.9 * image + 0.1 * torch.rand(3, HEIGHT, WIDTH, generator=generator))).to(torch.uint8)
        path = folder / f"class{i % CLASSES}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(image, str(path), quality=90)


def measure(folder: Path, batch: int, batches: int) -> dict[str, Any]:
    """What the trainer's own readers reach, in a process of their own."""
    command = [sys.executable, "-m", "fused_nce.train.rate", str(folder), f"--batch={batch}", f"--batches={batches}"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the record where asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    parser.add_argument("--images", type=int, default=256, help="JPEGs to make")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--keep", type=Path, help="folder to make the images in, and leave them")
    parser.add_argument("--out", type=Path, help="JSON record")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        synthesise(folder, options.images)
        found = measure(folder, options.batch, options.batches)
    found |= {**host.provenance(), "busy_share": host.busy_now()}
    both = 1 / (1 / found["read_images_per_s"] + 1 / found["augment_images_per_s"])
    print(
        f"one core, two views of 128 px: reads {found['read_images_per_s']:.0f} images/s, augments "
        f"{found['augment_images_per_s']:.0f} images/s, both {both:.0f}; ImageNet's {IMAGENET_IMAGES:,} images are "
        f"{IMAGENET_IMAGES / both / 3600:.1f} core-hours an epoch. Others used {found['busy_share']:.0%} of the cores."
    )
    if options.out:
        host.write(options.out, found)
    return found


if __name__ == "__main__":
    main()
