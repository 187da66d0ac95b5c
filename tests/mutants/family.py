"""Faults in the losses, and in what the newer of them added to the vocabulary."""

from __future__ import annotations

from tests.mutants.faults import ATOMS, CHUNKED, REFERENCE, STATISTICS, Fault

MARGINS, TRIPLETS = "fused_nce/core/margins.py", "fused_nce/core/triplets.py"

FAMILY = (
    # ---- distances, margins, triplets
    Fault(
        "a distance's gradient as a product's",
        CHUNKED,
        "if p.spec.distance:\n                if",
        "if False:\n                if",
    ),
    Fault(
        "reference: a distance's gradient as a product's",
        REFERENCE,
        "atoms.less_itself(dq, both, q, dim=1)",
        "pass",
    ),
    Fault("infinite slope at distance 0", ATOMS, "torch.where(t == 0, t, -1 / t)", "-1 / t"),
    Fault("equally hard ones each get all", STATISTICS, ".to(t.dtype) / found[ties]", ".to(t.dtype)"),
    Fault(
        "ties of a part that is not the extreme",
        STATISTICS,
        "torch.where(first > second, one[ties],",
        "torch.where(first > second, both,",
    ),
    Fault("hinge squared: slope halved", STATISTICS, "lambda t: 2 * _hinge(t)", "lambda t: _hinge(t)"),
    Fault("a NaN hinge leaves no gradient", MARGINS, "d = d + bad(self.element(found))", "pass"),
    Fault("all triplets: margin on the wrong side", TRIPLETS, "(t - 1).masked_fill(~pos", "(t + 1).masked_fill(~pos"),
    Fault(
        "semi-hard: the nearest negative of all", TRIPLETS, "searchsorted(others, own) - 1", "searchsorted(others, own)"
    ),
)
