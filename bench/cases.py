"""The shapes that are measured, what they cost, and what is asked of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_nce.bench.rivals import Problem

FLOAT32, BFLOAT16 = "float32", "bfloat16"


@dataclass(frozen=True)
class Case:
    """One call of the loss: n_a antecedents against n_c consequents of each of n_a images."""

    n_a: int
    n_c: int
    d: int
    dtype: str = FLOAT32

    @property
    def name(self) -> str:
        """Shape as the tables write it."""
        return f"{self.n_a}×{self.n_c}, {self.d}"

    @property
    def m(self) -> int:
        """Columns M of the score matrix."""
        return self.n_a * self.n_c

    @property
    def scores(self) -> int:
        """Entries N·M of the score matrix."""
        return self.n_a * self.m

    @property
    def flop(self) -> int:
        """Three GEMMs of 2·N·M·D: scores, and the two gradients; what a loss adds on top is not counted."""
        return 3 * 2 * self.scores * self.d

    @property
    def inputs_bytes(self) -> int:
        """Antecedents and consequents; their gradients take the same again."""
        return (self.n_a + self.m) * self.d * getattr(torch, self.dtype).itemsize

    @property
    def problem(self) -> Problem:
        """The call of the loss."""
        return Problem("amdim_nce", self.name, self.n_a, self.m, self.d, self.n_c)

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Leaves (n_a, D) and (n_a, n_c, D), standard normal, so that the scores have variance 1."""
        return self.problem.inputs(getattr(torch, self.dtype), seed)


@dataclass(frozen=True)
class Target:
    """What is asked of our default backend in float32."""

    ours_over_bound: float  # at most
    naive_over_ours: float  # at least
    peak_mib: float = 16.0  # at most, above inputs and gradients


BF16_SPEEDUP = 1.5  # at least, where the CPU multiplies bf16 natively

WIDE, MIDDLE, NARROW = Target(1.25, 2.5), Target(1.3, 3.0), Target(1.6, 5.0)
TABLE: dict[Case, Target] = {  # on a two-core AVX-512 host
    Case(128, 49, 1024): WIDE,
    Case(256, 49, 1024): WIDE,
    Case(126, 49, 2560): WIDE,
    Case(128, 49, 512): MIDDLE,
    Case(256, 49, 256): MIDDLE,
    Case(512, 49, 256): MIDDLE,
    Case(256, 49, 128): NARROW,
    Case(512, 49, 128): NARROW,
}
AVX2_TABLE = {case: Target(1.35 if case.d == 128 else 1.2, 1.0) for case in TABLE}
QUICK_TABLE = {case: TABLE[case] for case in (Case(128, 49, 1024), Case(256, 49, 256), Case(256, 49, 128))}

SWEEP_WIDTHS = (256, 1024)
SWEEP_BATCHES = (32, 64, 128, 256, 512, 1024)
SWEEP = tuple(Case(n_a, 49, d) for d in SWEEP_WIDTHS for n_a in SWEEP_BATCHES)
QUICK_SWEEP = tuple(Case(n_a, 49, 256) for n_a in (16, 32, 64, 128))
