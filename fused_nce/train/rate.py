"""`python -m fused_nce.train.rate FOLDER`: images a second that one core reads and augments, printed as JSON.

With `--decode` instead the ways in which people decode and crop a JPEG, in turn, where they are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_nce.train import config
from fused_nce.train.data import geometry
from fused_nce.train.data.image_source import to_rgb
from fused_nce.train.methods.amdim import PRESETS

AREA, RATIO = (0.3, 1.0), (0.7, 1.4)  # amdim-public's crops
PACKAGES = {"torch": "torch", "torchvision": "torchvision", "pillow": "PIL", "simplejpeg": "simplejpeg"}


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


def ways(side: int) -> dict[str, Callable[[bytes], Tensor]]:
    """A JPEG to one random resized crop (3, side, side) uint8, by name."""
    from PIL import Image
    from torchvision.io import decode_jpeg
    from torchvision.transforms import v2

    bicubic = v2.InterpolationMode.BICUBIC
    cut = v2.RandomResizedCrop(side, AREA, RATIO, bicubic, antialias=True)

    def pillow(content: bytes) -> Tensor:
        image: Tensor = v2.functional.pil_to_tensor(cut(Image.open(io.BytesIO(content)).convert("RGB")))
        return image

    def turbo(content: bytes) -> Tensor:
        image: Tensor = cut(decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8)))
        return image

    found: dict[str, Callable[[bytes], Tensor]] = {
        "fused_nce's reader": lambda content: geometry.crop(to_rgb(content), side, AREA, RATIO),
        "Pillow, torchvision's RandomResizedCrop": pillow,
        "torchvision.io.decode_jpeg, v2.RandomResizedCrop": turbo,
    }
    if importlib.util.find_spec("simplejpeg") is not None:
        import simplejpeg

        def simple(content: bytes, **reduced: int) -> Tensor:
            image: Tensor = cut(torch.from_numpy(simplejpeg.decode_jpeg(content, **reduced)).permute(2, 0, 1))
            return image

        found["simplejpeg, v2.RandomResizedCrop"] = simple
        # As far as libjpeg shrinks while it decodes, with the short side no smaller than the crop's.
        found["simplejpeg reduced, v2.RandomResizedCrop"] = lambda content: simple(
            content, min_height=side, min_width=side
        )
    return found


def decode(folder: str, side: int, rounds: int) -> dict[str, Any]:
    """Images a second of processor time on one thread, of each way; the fastest of the rounds, in turn."""
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))]
    if not files:
        raise ValueError(f"folder: must hold .jpg files, got {folder}")
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, way in ways(side).items():
            start = time.process_time()
            for content in files:
                way(content)
            spent = time.process_time() - start
            best[name] = max(best.get(name, 0.0), len(files) / spent)
    versions = {name: metadata.version(name) for name, module in PACKAGES.items() if importlib.util.find_spec(module)}
    return {
        "side": side, "images": len(files), "mean_bytes": sum(map(len, files)) // len(files), "rounds": rounds,
        "images_per_s": best, "versions": versions,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fused_nce.train.rate", description=__doc__)
    parser.add_argument("folder", help="of images, a subfolder a class")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--decode", type=int, metavar="SIDE", help="crops of so many px")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    if options.decode:
        found: Any = decode(options.folder, options.decode, options.rounds)
    else:
        found = measure(options.folder, options.batch, options.batches)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
