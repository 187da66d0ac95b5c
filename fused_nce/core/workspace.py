"""How much memory a call may take beside its inputs, outputs and gradients."""

from __future__ import annotations

import math
import os

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
