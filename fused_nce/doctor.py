"""What runs here, and why not something faster."""

from __future__ import annotations

import os
import platform

import torch

from fused_nce import _extension
from fused_nce._version import __version__
from fused_nce.core import dispatch, workspace
from fused_nce.core.spec import Block, Spec, TanhClip


def backends() -> dict[str, str | None]:
    """Each backend's name with None where it runs float32 on this machine's CPU, else the reason why not."""
    q = torch.empty(1, 1)
    spec = Spec(Block(1), TanhClip(20.0))
    return {name: dispatch.why_not(name, spec, q, q) for name in dispatch.BACKENDS}


def doctor() -> str:
    """A report to read, or to paste into a bug report: versions, CPU, kernels, backends, settings."""
    module, reason = _extension.status()
    lines = [
        f"fused_nce {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"system    {platform.platform()}",
        f"cpu       {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        f"kernels   {'built: ' + _facts(module.build_info()) if module else 'none: ' + reason}",
        *(f"backend   {name:10} {'ready' if why is None else 'no: ' + why}" for name, why in backends().items()),
        f"workspace {workspace.limit_bytes('cpu') >> 20} MiB on a CPU",
    ]
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("FUSED_NCE_")}
    lines += [f"setting   {name}={value}" for name, value in settings.items()]
    return "\n".join(lines)


def _facts(info: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in info.items())
