"""`python -m tests.triton.launched ARCHITECTURE DTYPE LOSS…`: compile what those losses launch, as a first call would.

The interpreter knows no types, and `bench.static` writes its own launches. Here a driver that poses as a card gives the
real ones, with their real arguments, to Triton's just-in-time compiler; only the run itself is left out, so nothing
that comes back means anything. Prints how many kernels were compiled.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from fused_nce.losses.registry import LOSSES
from tests.losses.poses import cast
from tests.ptx.compiled import pose


def main(architecture: str, dtype: str, *names: str) -> None:
    """Forward and backward of each loss's example; without names, of all that the backend takes."""
    compiled = pose(pytest.MonkeyPatch(), architecture, None)
    warnings.simplefilter("ignore")  # what nothing was written to may be NaN
    for name in names or [name for name, entry in LOSSES.items() if not entry.closed]:
        entry = LOSSES[name]
        inputs = cast(entry.example(0), getattr(torch, dtype))
        for x in entry.differentiable(inputs).values():
            x.requires_grad_()
        try:
            loss = entry.function(**inputs, backend="triton").loss
        except ValueError as error:
            if names or "which cannot run this: " not in str(error):
                raise
            continue
        loss.backward()
    print(len(compiled), "kernels")


if __name__ == "__main__":
    main(*sys.argv[1:])
