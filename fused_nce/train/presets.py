"""What the methods' presets share: the data sets' own numbers. Each method's table is in its file in `methods/`."""

from typing import Any

STL_CROPS: dict[str, Any] = {"geometry": "crop", "mean": [0.43, 0.42, 0.39], "std": [0.27, 0.26, 0.27]}
IMAGENET_CROPS: dict[str, Any] = {
    "geometry": "crop",
    "jitter": [0.4, 0.4, 0.4, 0.1],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
