"""Where nvcc and CUDA's headers are: a toolkit in /usr/local, or the pieces that NVIDIA's wheels bring beside torch.

``setup.py`` executes this file by its path: it may import neither torch nor the package at the top.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# Registers are what limits the row kernels. Division within 2 ulp and flushed subnormals are within the error budget.
FLAGS = ("-O3", "-prec-div=false", "-ftz=true")


class Nvcc(NamedTuple):
    """A compiler and the toolkit that it belongs to."""

    path: str
    home: Path
    release: tuple[int, int]  # (13, 0)

    @property
    def architectures(self) -> tuple[str, ...]:
        """What to build for where no GPU is visible: A100 (and all 8.x), H100; from CUDA 12.8 on, B200, RTX 50."""
        return ("8.0", "9.0", "10.0", "12.0") if self.release >= (12, 8) else ("8.0", "9.0")


def find() -> Nvcc | None:
    """The nvcc of ``CUDA_HOME``, else the one on the path, else that of /usr/local/cuda; None without any.

    The one on the path may be a link or a script, so nvcc itself is asked where its toolkit is.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    path = next((found for found in map(shutil.which, candidates) if found), None)
    if path is None:
        return None
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+)\.(\d+)", version.stdout)
    dry = subprocess.run([path, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    if release is None or top is None:
        return None
    return Nvcc(path, Path(top[1].strip()).resolve(), (int(release[1]), int(release[2])))


def wheel_includes(nvcc: Nvcc) -> list[str]:
    """The headers of cuBLAS and its kin in NVIDIA's wheels, where the toolkit comes without them."""
    if (nvcc.home / "include" / "cublas_v2.h").is_file():
        return []
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (found.submodule_search_locations or [])] if found else []
    return sorted(str(folder) for root in roots for folder in root.glob("*/include") if list(folder.glob("cu*.h")))
