"""`python -m fused_nce.train.rate FOLDER`: images a second that one core reads and augments, printed as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

import torch

from fused_nce.train import config
from fused_nce.train.methods.amdim import PRESETS


def measure(folder: str, batch: int, batches: int) -> dict[str, float]:
    """Read, decoded and cut to two views as a worker does; then augmented, by `imagenet-small`'s settings."""
    torch.set_num_threads(1)
    values = {"method": "amdim", "data": folder, **PRESETS["imagenet-small"]}
    settings = config.from_dict({**values, "optim": {"batch_size": batch}, "run": {"workers": 0}})
    loader, views = settings.open_loader(0, 1), settings.make_views()
    source = loader.batches(0)
    views(next(source).images)
    read_s = augment_s = 0.0
    for _ in range(batches):
        start = time.perf_counter()
        images = next(source).images
        read = time.perf_counter()
        views(images)
        read_s += read - start
        augment_s += time.perf_counter() - read
    count = batch * batches
    return {"read_images_per_s": count / read_s, "augment_images_per_s": count / augment_s, "images": count}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fused_nce.train.rate", description=__doc__)
    parser.add_argument("folder", help="of images, a subfolder a class")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args(argv)
    print(json.dumps(measure(options.folder, options.batch, options.batches)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
