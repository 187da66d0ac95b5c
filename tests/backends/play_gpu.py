"""A pytest plugin, `-p tests.backends.play_gpu`: the `cuda` backend takes CPU tensors, and the CPU plays the GPU."""

from typing import Any

from fused_nce import _extension
from fused_nce.backends import cuda

MODULE: Any = _extension.status()[0]

# When the plugin is loaded: before `tests/conftest.py` asks which backends there are.
cuda.why_not = lambda spec, q, k: cuda._unable(MODULE, spec, q, k)
