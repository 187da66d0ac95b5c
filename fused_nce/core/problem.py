"""What a backend is given and what it gives back: the protocol between the ops and the backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fused_nce.core.cost import Call, Tiles
from fused_nce.core.spec import FILTERS, Several, Spec
from fused_nce.core.tails import Coefficients, Tail


class Problem(NamedTuple):
    """One call's inputs. Scores are s = scale·⟨q_i, k_j⟩, never held whole."""

    q: Tensor  # (N, D) queries
    k: Tensor  # (M, D) keys
    scale: float | Tensor  # host factor; or, times a learnable one, a 0-d tensor on q's device
    spec: Spec
    offset: int  # Block: image of row 0. Other layouts: the column that row 0 is itself, under drop_self
    bias: float | Tensor = 0.0  # of the Bias transform; 0-d
    positives: Tensor | None = None  # (N, P) transformed scores of `Separate` positives: a backend hands them on
    row_ids: Tensor | None = None  # (N,) int64, of Index (targets) and Labels
    column_ids: Tensor | None = None  # (M,) int64, of Labels
    shared: bool = False  # k is q: dq must hold both roles' gradient, (W + Wᵀ) q, and dk is empty
    blocks: int = 1  # blocks of M keys that the rows meet: more than k where keys go round several processes
    ceilings: Tensor | None = None  # (F, N) one line for each of `spec.filters`, in the accumulation dtype
    guide_q: Tensor | None = None  # (N, G) of the filter `guide`, in the accumulation dtype
    guide_k: Tensor | None = None  # (M, G)

    @property
    def n(self) -> int:
        """N, rows."""
        return self.q.shape[0]

    @property
    def m(self) -> int:
        """M, columns of k."""
        return self.k.shape[0]

    @property
    def marks(self) -> tuple[Tensor | None, ...]:
        """What `spec.MARKS` read, for the C++ kernels: ceilings of scores and of guides, (K, N), guides, columns."""
        lines: dict[str, Tensor] = {}
        if self.ceilings is not None:
            each = self.ceilings.unflatten(0, (self.spec.n_widths, -1)).unbind(1)
            lines = dict(zip(self.spec.filters, each, strict=True))  # fault: cpu-ceilings-another
        several = self.row_ids if isinstance(self.spec.layout, Several) else None
        return *(lines.get(name) for name in FILTERS), self.guide_q, self.guide_k, several

    @property
    def n_columns(self) -> int:
        """Columns that each row meets."""
        return self.m * self.blocks


class Needs(NamedTuple):
    """Which gradients are wanted; an unwanted one costs no GEMM and comes back empty."""

    q: bool
    k: bool
    scale: bool  # of the scale and, where there is one, of the bias


class Statistics(NamedTuple):
    """float32 (float64 for float64 inputs)."""

    pos: Tensor  # (N, P) transformed scores of the positives
    rows: Tensor  # (S, N) in the order of spec.stats
    columns: Tensor | None = None  # (S', M) in the order of spec.columns; None without any


class Gradients(NamedTuple):
    """At upstream 1, in the accumulation dtype or the inputs'; the op casts them to what they wait in. Empty where not
    wanted. Where a problem has several blocks, in the accumulation dtype: they are shares of a sum.
    """

    dq: Tensor  # (N, D)
    dk: Tensor  # (M, D)
    dscale: Tensor  # 0-d
    dbias: Tensor | None = None  # 0-d; None without a bias


class GatheredGradients(NamedTuple):
    """Of unscaled scores of gathered columns, in their dtype; what is not wanted is empty, dscale 0."""

    dq: Tensor  # (N, D)
    dk: Tensor  # (M, D)
    dscale: Tensor  # 0-d


class Summary(NamedTuple):
    """What a loss reports, of one problem or added up over several."""

    loss: Tensor  # 0-d
    nce: Tensor  # 0-d, or the elements under reduction="none"
    penalty: Tensor  # 0-d
    report: Tensor  # (report groups of all problems, len(tail.REPORT))


ASIDE = "aside|"  # begins the backend of a small part of a call, whose path is that of the rest


class Backend(Protocol):
    """A module of `fused_nce.backends`, with every member: what it has nothing for is None, or `core/defaults.py`'s."""

    ATOMS: frozenset[str]  # the names of `spec.VOCABULARY` that it runs
    BOTH_WAYS: bool  # whether `loss` takes a spec with column statistics

    def why_not(self, spec: Spec, q: Tensor, k: Tensor) -> str | None:
        """Why this backend cannot run the spec on these tensors, or None if it can. Its `ATOMS` are checked before."""

    def workspace_bytes(self, spec: Spec, n: int, m: int, d: int, dtype_bytes: int, limit_bytes: int) -> int:
        """Bytes that it allocates beside its outputs: the published formula, asserted by the tests."""

    def stats(self, problem: Problem) -> Statistics:
        """One score GEMM."""

    def grads(self, problem: Problem, statistics: Statistics, coefficients: Coefficients, needs: Needs) -> Gradients:
        """The gradients of any tail, from its coefficients: recomputes the scores, one GEMM and one a gradient."""

    def loss(self, problem: Problem, tail: Tail, needs: Needs) -> tuple[Statistics, Gradients]:
        """Statistics, and the gradients of the tail's loss, in one sweep: no score is computed twice.

        Asked of a spec with column statistics, whose weights need all rows, where the module's `BOTH_WAYS` is true;
        elsewhere the op calls `stats`, then `grads`.
        """

    def slopes(
        self, problem: Problem, tail: Tail, found: Statistics, d_element: Tensor | float, d_penalty: Tensor | float
    ) -> Coefficients:
        """dL/d statistic, (S', M) of the columns, from dL/d element (0-d, or (N, P)) and dL/d penalty."""

    def summary(
        self,
        problems: Sequence[Problem],
        tail_of: Sequence[Tail],
        found: Sequence[Statistics],
        report_groups: Sequence[int],
    ) -> Summary:
        """What the losses report, added up."""

    def mirrored(self, spec: Spec, tail: Tail, offset: int) -> bool:
        """Whether `loss` sees the symmetric scores of one matrix in both roles once."""

    def tiles(self, spec: Spec, call: Call, n: int, m: int, d: int, dtype: torch.dtype) -> Tiles:
        """Which scores a call computes, by its plan."""

    def ways(self, spec: Spec, q: Tensor, k: Tensor, shared: bool) -> tuple[bool, int]:
        """How it takes statistics of columns: with those of rows at once; rows of a strip of stored weights, or 0."""

    losses: Losses | None
    whole_loss: WholeLoss | None
    gathered_scores: GatheredScores | None
    gathered_grads: GatheredGrads | None


Losses = Callable[[Sequence[Problem], Sequence[Tail], Sequence[Tensor], bool], tuple[Tensor, Tensor, Tensor]]
"""`loss` of several problems at once: (problems, tails, room for dq and dk of each, dscale wanted) to the positives of
all, flat, the (S, all N) row statistics, and dscale of each."""
WholeLoss = Callable[[Spec, Tail, tuple[Tensor | None, ...], float, int, bool, bool, int, bool], tuple[Any, ...] | None]
"""A loss of plain tensors in one differentiable function: (spec, tail, (q, k, scale tensor, bias, positives, own keys,
row ids, column ids), scale, offset, normalize, parts, report groups, twins) to `engine.Swept`; None: it does not serve
it. twins: q and k are two views, whose rows side by side are one tensor in both roles."""
GatheredScores = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, indices (N, m)) to (N, m) ⟨q_i, k_(indices_ij)⟩, unscaled; NaN for an index out of range."""
GatheredGrads = Callable[[Tensor, Tensor, Tensor, Tensor, bool, bool, bool], GatheredGradients]
"""The same and dL/d score, (N, m), and which of dq, dk, dscale are wanted."""
