"""What the tests of the adapters share: random configurations, in two dtypes, against a dense formula: 25, nightly 200.

float64 shows a wrong formula: within 1e-10 of the largest gradient. float32, on whatever backend is chosen, is held to
5e-5 of it: 2^-24·(4 + √D)·|s| for the scores, whose largest here is 1/0.07, with a factor of ten to spare.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

CONFIGURATIONS, NIGHTLY = 25, 200
WITHIN = {torch.float64: 1e-10, torch.float32: 5e-5}


class Configuration:
    """A seed of sizes and tensors, and the dtype that ours computes in."""

    def __init__(self, seed, dtype):
        self.seed, self.dtype = seed, dtype
        self.generator, self.pick = torch.Generator().manual_seed(seed), random.Random(seed)  # of tensors and of sizes

    def agree(self, ours, formula, tensors):
        """Values, and the gradients of a random weighting of them by every tensor."""
        exact = [x.double().requires_grad_() for x in tensors]
        given = [x.to(self.dtype).requires_grad_() for x in tensors]
        expected, found = formula(*exact), ours(*given)
        expected, found = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (expected, found))
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.rand(len(expected), dtype=torch.float64, generator=generator) + 0.5
        within = WITHIN[self.dtype]
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == self.dtype
            torch.testing.assert_close(a.double(), b, rtol=within, atol=within, msg=f"value, seed {self.seed}")
        want, have = (
            torch.autograd.grad(
                sum((w.item() * x.sum() for w, x in zip(weights, values, strict=True))), leaves, materialize_grads=True
            )
            for values, leaves in ((expected, exact), (found, given))
        )
        for i, (a, b) in enumerate(zip(have, want, strict=True)):
            assert a.dtype == self.dtype
            allowed = within * b.abs().max() + 1e-2 * within
            assert (a.double() - b).abs().max() <= allowed, f"gradient {i}, seed {self.seed}"


def unit(*shape, generator):
    return nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def both(test):
    """Run `test(at)` on every configuration, in both dtypes; the later ones nightly."""

    @pytest.mark.parametrize("dtype", WITHIN)
    @pytest.mark.parametrize(
        ("first", "end"), [(0, CONFIGURATIONS), pytest.param(CONFIGURATIONS, NIGHTLY, marks=pytest.mark.nightly)]
    )
    def every(dtype, first, end):
        for seed in range(first, end):
            test(Configuration(seed, dtype))

    every.__doc__ = test.__doc__
    return every
