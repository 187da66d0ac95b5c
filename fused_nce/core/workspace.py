"""How much memory a call may take beside its inputs, outputs and gradients."""

from __future__ import annotations

import math
import os

import torch

from fused_nce.core.dispatch import backend_module
from fused_nce.core.spec import Spec

DEFAULT_MB = {"cpu": 16}
GPU_DEFAULT_MB = 256


def limit_bytes(device_type: str) -> int:
    """The workspace limit: `FUSED_NCE_WORKSPACE_MB` (MiB) if set, else 16 MiB on a CPU and 256 MiB elsewhere.

    On a CPU a loss both ways, or of symmetric scores, whose scores are no more than that by themselves keeps them all,
    and may take an eighth more for what stands beside them.

    Raises:
        ValueError: if the variable is not a positive number.
    """
    text = os.environ.get("FUSED_NCE_WORKSPACE_MB")
    if text is None:
        return DEFAULT_MB.get(device_type, GPU_DEFAULT_MB) << 20
    try:
        mb = float(text)
    except ValueError:
        mb = 0.0
    if not 0 < mb < math.inf:
        raise ValueError(f"FUSED_NCE_WORKSPACE_MB: got {text!r}, need a positive number of MiB")
    return int(mb * (1 << 20))


def workspace_bytes(
    spec: Spec, n: int, m: int, d: int, dtype: torch.dtype = torch.float32, backend: str = "cpu", device: str = "cpu"
) -> int:
    """Peak bytes that one call of a backend allocates beside its inputs, outputs and gradients.

    Args:
        spec: what happens to a score.
        n: rows N.
        m: columns M.
        d: width D.
        dtype: of the inputs.
        backend: a name of `fused_nce.backends()`.
        device: the device type whose limit holds.

    Raises:
        ValueError: for an unknown backend, or a dtype that it does not run.

    Example:
        ```
        workspace_bytes(Spec(Block(1)), 4096, 4096, 256, backend="chunked")
        ```
    """
    return backend_module(backend).workspace_bytes(spec, n, m, d, dtype.itemsize, limit_bytes(device))
