"""`python release/kernel_hub.py FOLDER`: the package as a kernel of the Kernel Hub.

`build/torch-cuda` and `build/torch-cpu` each hold the package without its compiled library, trainer, models and command
line. The package imports itself by its own name, which the kernel therefore has as its id: a process that loads it has
this one fused_nce and no other.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns("train", "models", "bench", "cli.py", "__pycache__", "*.so", "_C.stamp.json")
ABOUT = {"id": "fused_nce", "name": "fused-nce", "version": 1, "license": "Apache-2.0", "python-depends": []}


def main(folder: Path) -> Path:
    """Lay it out; returns the folder that `kernels.get_local_kernel` takes."""
    for backend in ("cuda", "cpu"):
        target = folder / f"build/torch-{backend}"
        shutil.copytree(ROOT / "fused_nce", target / "fused_nce", ignore=LEFT_OUT)
        about = json.dumps(ABOUT | {"backend": {"type": backend}}, indent=2)
        (target / "metadata.json").write_text(about + "\n", encoding="utf-8")
    for name in ("LICENSE", "README.md", "release/kernel-hub/build.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
