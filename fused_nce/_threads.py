"""How OpenMP's threads wait for work, in the command line's own process.

By default a thread that has nothing to do spins for milliseconds, in case work comes soon. Beside other busy processes
it burns the time that the thread which it waits for needs. OpenMP reads its environment once, when torch loads it, so
this module is imported before torch. A library does not choose for the program that imports it: there, and wherever
the variables are set already, nothing changes.
"""

import os
import sys
from itertools import pairwise

# GNU's (Linux wheels of torch) and LLVM's or Intel's (conda, macOS).
WAITS = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
CHOSEN = (*WAITS, "GOMP_SPINCOUNT")


def is_command_line(arguments: list[str]) -> bool:
    """Whether a process was started as `fused-nce` or as `python -m fused_nce.cli`, by its full command line."""
    words = [os.path.basename(word) for word in arguments[1:2]]
    module = any(pair == ("-m", "fused_nce.cli") for pair in pairwise(arguments))
    return module or words == ["fused-nce"]


def wait_without_spinning() -> None:
    """Where this is the command line, torch is not loaded yet and nobody has chosen."""
    if is_command_line(sys.orig_argv) and "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN):
        os.environ |= WAITS


wait_without_spinning()
