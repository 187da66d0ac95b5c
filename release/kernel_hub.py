"""`python release/kernel_hub.py FOLDER`: the package as a universal kernel of the Kernel Hub.

`build/torch-universal/fused_nce` holds the package without its compiled library, trainer, models and command line, and
can be imported from there. The package imports itself by its own name, so the folder must be on the path, as it is when
`kernels` loads a kernel whose name is the package's.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns("train", "models", "bench", "cli.py", "__pycache__", "*.so", "_C.stamp.json")


def main(folder: Path) -> Path:
    """Lay it out; returns the folder that goes on the path."""
    target = folder / "build/torch-universal"
    shutil.copytree(ROOT / "fused_nce", target / "fused_nce", ignore=LEFT_OUT)
    for name in ("LICENSE", "README.md", "release/kernel-hub/build.toml"):
        shutil.copy(ROOT / name, folder)
    return target


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
