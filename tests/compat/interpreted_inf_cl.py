"""`python -O -m tests.compat.interpreted_inf_cl`: Inf-CL's kernels under Triton's interpreter, and ours beside them.

-O takes away upstream's assertion that there is a GPU, and its inline PTX, a rounding to TF32, is left out. Rows end
with the first block of 64: beyond it upstream masks by the place within the block and reads past its statistics.
"""

from __future__ import annotations

import importlib
import os
import random
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.language as tl

from fused_nce.compat import inf_cl as ours

tl.inline_asm_elementwise = lambda asm, constraints, args, dtype, is_pure, pack: args[0]

theirs = importlib.import_module("inf_cl")  # after the variable that has its kernels interpreted

CONFIGURATIONS = 50


def results(module: Any, seed: int) -> list[torch.Tensor]:
    """Each query's loss, and the gradients of a weighting of them."""
    pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, heads = pick.randint(1, 64), pick.randint(1, 2)
    m = 64 if pick.random() < 0.5 else n
    q, k = (torch.randn(rows, 16 * heads, generator=g).requires_grad_() for rows in (n, m))
    scale = torch.tensor(pick.choice((0.3, 2.0)), requires_grad=True)
    labels = torch.randint(0, m, (n,), generator=g) if pick.random() < 0.5 else None
    loss = module.cal_flash_loss(q, k, labels, scale, 16)
    return [loss, *torch.autograd.grad((torch.rand(n, generator=g) * loss).sum(), (q, k, scale))]


def worst() -> float:
    """The largest difference, relative to the largest of its kind, or to 1 for a sum that cancels."""
    found = 0.0
    for seed in range(CONFIGURATIONS):
        for a, b in zip(results(theirs, seed), results(ours, seed), strict=True):
            found = max(found, float((a - b).abs().max() / a.abs().max().clamp(min=1)))
    return found


if __name__ == "__main__":
    print(worst())
