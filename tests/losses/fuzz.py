"""A random problem of a registered loss: drawn, named in one line, and run against its dense oracle.

A case that fails prints `python -m tests.repro '<json>'`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fused_nce.losses.registry import LOSSES, SMALL, Size
from tests.budget import Precision, eta, precision
from tests.cases import DTYPES, EDGES, environment
from tests.layouts import LAYOUTS
from tests.losses.poses import cast, is_float, widened
from tests.losses.sensitivity import Exact, exact, jumps

KNOW_EVERYTHING = ("reference", "chunked")
LARGEST = 1e5  # of a Jacobian's entries
REFUSAL = "which cannot run this: "


@dataclass(frozen=True)
class LossCase:
    """One problem and how it is posed."""

    loss: str  # of `LOSSES`
    dtype: str
    seed: int
    backend: str = "reference"
    size: tuple[int, int, int, int] = SMALL
    spread: float = 1.0  # of the features, beyond the example's
    layout: str = "contiguous"
    upstream: float = 1.0
    wanted: tuple[int, ...] | None = None  # which of the inputs that have a gradient; None for all
    workspace_mb: float | None = None

    @property
    def line(self) -> str:
        """The command that runs it alone."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: value for name, value in fields.items() if value != getattr(LossCase, name, None)}
        return f"python -m tests.repro '{json.dumps(changed)}'"


def load(fields: dict[str, Any]) -> LossCase:
    """The case that `LossCase.line` wrote."""
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return LossCase(**{**fields, **lists})


def draw(rng: np.random.Generator, dtype: str) -> LossCase:
    """A random case: sizes log-uniform, with the edges of vectors and tiles forced in."""

    def size(least: int, most: int, *edges: int) -> int:
        if edges and rng.random() < 0.35:
            return int(rng.choice(edges))
        return int(math.exp(rng.uniform(math.log(least), math.log(most + 1))))

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    edges = [edge for edge in EDGES if 2 <= edge <= 33]
    while True:
        n, m, d, p = size(2, 33, *edges), size(1, 65, *edges), size(1, 40, *edges), size(1, 5)
        columns = max(n * p, m)
        if n * columns * columns * d <= LARGEST:
            break
    return LossCase(
        loss=pick(*LOSSES),
        dtype=dtype,
        seed=int(rng.integers(2**31)),
        size=(n, m, d, p),
        spread=float(f"{10 ** rng.uniform(-1.5, 0.5):.3g}"),
        layout=pick(*LAYOUTS),
        upstream=pick(1.0, 1.0, -2.5, 300.0, 1e-3),
        wanted=pick(None, None, (0,), (1,), (0, 1)),
        workspace_mb=pick(None, None, 0.002, 0.02),
    )


def laid(x: Tensor, layout: str) -> Tensor:
    """The same values, in this layout as a matrix of rows."""
    return LAYOUTS[layout](x.reshape(-1, x.shape[-1])).view(x.shape) if x.dim() == 2 else x


def pose(case: LossCase) -> tuple[dict[str, Any], list[str]]:
    """(arguments, the names of those that want a gradient)."""
    entry, dtype = LOSSES[case.loss], DTYPES[case.dtype]
    drawn = entry.example(case.seed, Size(*case.size))
    if not entry.closed:
        drawn |= {name: case.spread * x for name, x in drawn.items() if is_float(x) and x.dim()}
    inputs = {name: laid(x, case.layout) if is_float(x) else x for name, x in cast(drawn, dtype).items()}
    leaves = list(entry.differentiable(inputs))
    wanted = range(len(leaves)) if case.wanted is None else case.wanted
    return inputs, [leaves[i] for i in wanted if i < len(leaves)] or leaves


class Judge:
    """The oracle's opinion of one problem, for all backends: made once, and as late as possible."""

    def __init__(self, case: LossCase) -> None:
        self.case, self.entry = case, LOSSES[case.loss]
        self.inputs, self.leaves = pose(case)
        self.budgets: dict[Precision, Exact] = {}
        self.wide = widened(self.inputs, self.leaves)

    def budget(self, p: Precision) -> Exact:
        """Value and gradients with what they may be off by; most backends share a precision."""
        if p not in self.budgets:
            with pytest.MonkeyPatch.context() as patch:
                self.budgets[p] = exact(self.entry, self.wide, self.leaves, p, patch)
        return self.budgets[p]

    @property
    def fair(self) -> bool:
        """The loss has no kink within the scores' rounding: its gradient is one."""
        if not self.entry.kinked:
            return True
        p = precision(DTYPES[self.case.dtype], "reference")
        budget = self.budget(p)
        with pytest.MonkeyPatch.context() as patch:
            return not jumps(self.entry, self.wide, self.leaves, p, patch, budget, self.case.seed)

    def etas(self, backend: str, workspace_mb: float | None) -> dict[str, float]:
        """η of value and gradients on a backend.

        Raises:
            ValueError: where it cannot run this.
            AssertionError: where an input was written to.
        """
        here = {
            name: x.detach().requires_grad_(name in self.leaves) if is_float(x) else x
            for name, x in self.inputs.items()
        }
        workspace = None if workspace_mb is None else str(workspace_mb)
        with environment(FUSED_NCE_WORKSPACE_MB=workspace), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fused_nce: one image")
            out = self.entry.function(**here, **({} if self.entry.closed else {"backend": backend}))
            grads = torch.autograd.grad(self.case.upstream * out.loss, [here[name] for name in self.leaves])
        p = precision(DTYPES[self.case.dtype], backend)
        budget = self.budget(p)
        found = {"loss": eta(out.loss, budget.loss.numpy(), budget.loss_budget.numpy())}
        for name, grad in zip(self.leaves, grads, strict=True):
            value, allowed = (
                self.case.upstream * budget.grads[name],
                abs(self.case.upstream) * budget.grad_budgets[name],
            )
            steps = self.entry.paths if name in self.entry.two_paths else 1  # the smallest step does not scale
            found[name] = eta(grad, value.numpy(), (allowed + steps * p.step).numpy())
        for name in self.wide:
            if isinstance(self.wide[name], Tensor):
                assert torch.equal(self.inputs[name].to(self.wide[name].dtype), self.wide[name]), f"{name} was written"
        return found

    def run(self, backend: str) -> dict[str, float] | None:
        """`etas` at the case's workspace, or the tightest beyond it that the backend takes; None where it refuses."""
        workspace_mb = self.case.workspace_mb
        while True:
            try:
                return self.etas(backend, workspace_mb)
            except ValueError as error:
                if REFUSAL not in str(error):
                    raise
                if workspace_mb is not None and workspace_mb < 16 and "workspace" in str(error):
                    workspace_mb *= 2
                elif backend in KNOW_EVERYTHING:
                    raise
                else:
                    return None
