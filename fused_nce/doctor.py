"""What runs here, and why not something faster."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from typing import Any

import torch

from fused_nce import _extension, _nvcc
from fused_nce._version import __version__
from fused_nce.core import dispatch, workspace
from fused_nce.core.spec import Block, Spec, TanhClip


def backends() -> dict[str, str | None]:
    """Each backend's name with None where it runs float32 on this machine's CPU, else the reason why not."""
    q = torch.empty(1, 1)
    spec = Spec(Block(1), TanhClip(20.0))
    return {name: dispatch.why_not(name, spec, q, q) for name in dispatch.BACKENDS}


EXTRAS = {  # module → package
    "train": {"accelerate": "accelerate", "jsonargparse": "'jsonargparse[signatures]'", "safetensors": "safetensors",
              "torchvision": "torchvision", "sklearn": "scikit-learn"},
    "plots": {"matplotlib": "matplotlib"},
    "shards": {"webdataset": "webdataset"},
    "onnx": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
}  # fmt: skip


def call_ms(rows: int = 32, tries: int = 50) -> float:
    """The least milliseconds of `info_nce` and both gradients, of so few rows that the call is all there is to time."""
    from fused_nce.losses import info_nce

    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(rows, 32, generator=g, requires_grad=True) for _ in range(2))
    times = []
    for _ in range(tries):
        begin = time.perf_counter()
        torch.autograd.grad(info_nce(q, k).loss, (q, k))
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def missing() -> dict[str, list[str]]:
    """Extra → its packages that are not installed; extras that are whole are left out."""
    found = {
        extra: [x for m, x in needs.items() if importlib.util.find_spec(m) is None] for extra, needs in EXTRAS.items()
    }
    return {extra: names for extra, names in found.items() if names}


def doctor() -> str:
    """A report to read, or to paste into a bug report: versions, devices, compilers, kernels, backends, settings.

    What is missing stands with the command that adds it. One small call is timed.
    """
    module, reason = _extension.status()
    lines = [
        f"fused_nce {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"system    {platform.platform()}",
        f"cpu       {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        f"kernels   {'built ' + _facts(module.build_info()) if module else 'none: ' + reason}",
        *(
            [f"gpu       {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
            or ["gpu       none"]
        ),
        f"compiler  C++ {_compiler()}, nvcc {_toolkit()}",
        *(
            f"backend   {name:10} {'ready' if why is None else 'no: ' + why}"  # fault: doctor-ready
            for name, why in backends().items()
        ),
        f"workspace {workspace.limit_bytes('cpu') >> 20} MiB on a CPU",
        f"call      {_call()}, info_nce of 32 rows and both gradients",
        *(f"missing   for {extra}; add: pip install {' '.join(x)}" for extra, x in missing().items()),
    ]
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("FUSED_NCE_")}
    lines += [f"setting   {name}={value}" for name, value in settings.items()]
    return "\n".join(lines)


def _call() -> str:
    try:
        return f"{call_ms():.3f} ms"
    except (RuntimeError, ValueError) as error:  # a setting that nothing here can follow
        return f"none: {error}"


def _compiler() -> str:
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return found or "none; add: apt-get install g++"


def _toolkit() -> str:
    found = _nvcc.find()
    return ".".join(map(str, found.release)) if found else "none"


def _facts(built: dict[str, Any]) -> str:
    """What `_C.build_info` tells, in words."""
    halves = "" if built["bf16_hardware"] else ", bfloat16 widened to float32"
    cuda = f"CUDA for {built['cuda_architectures']}" if built["cuda"] else "no CUDA"
    isa = f"{built['isa_active']} (of {', '.join(built['isa_compiled'])})"
    return f"by {built['compiler']} for torch {built['torch_version']}; uses {isa}{halves}; {cuda}"
