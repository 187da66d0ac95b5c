"""Whom AMDIM's loss is measured against. All compute the same number and gradients; `bound` is their common floor."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.cases import Case
from fused_nce.bench import rivals
from fused_nce.bench.rivals import Rival, Step, Subject

SHARED = {"naive": "eager", "compile": "compile", "chunked": "chunked", "ours": "ours"}  # as `fused_nce.bench` has them
RIVALS: dict[str, Rival] = {name: rivals.RIVALS[shared] for name, shared in SHARED.items()}


def prepare(rival: str, case: Case) -> Step:
    """One training step's worth of a rival's loss on a case: its value and both gradients, no optimizer."""
    loss = RIVALS[rival].make(case.problem)
    assert loss is not None
    return partial(rivals.step, loss, case.inputs())


def subject(rival: str, case: Case) -> Subject:
    """Whose peak of memory is measured."""
    return Subject(SHARED[rival], case.problem, getattr(torch, case.dtype))


def check_agreement(case: Case, steps: dict[str, Step]) -> None:
    """Refuse to time a rival that computes something else: loss and gradients against the naive ones.

    Raises:
        ValueError: naming the rival, the quantity and the relative difference.
    """
    expected = None
    for name in ("naive", *(name for name in steps if name != "naive")):
        values = (steps[name] if name in steps else prepare(name, case))()
        found = dict(zip(("loss", "antecedents' gradient", "consequents' gradient"), values, strict=True))
        expected = found if expected is None else expected
        require_close(f"{name} on {case.name} {case.dtype}", found, expected, case.dtype)


def require_close(where: str, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> None:
    """Each quantity within the dtype's rounding of what another way of computing it gave, in the Euclidean norm.

    Raises:
        ValueError: naming the place, the quantity and the relative difference.
    """
    # 16-bit leaves agree to their own rounding; in float32 two orders of summation differ by about 1e-5 of the largest.
    tolerance = 1e-3 if dtype == "float32" else 5e-2
    for quantity, tensor in found.items():
        wanted = expected[quantity].float()
        difference = ((tensor.float() - wanted).norm() / wanted.norm()).item()
        if not difference <= tolerance:
            raise ValueError(f"{where}: {quantity} differs by {difference:.1e}, need <= {tolerance:.0e}")
