"""Faults in the losses, and in what the newer of them added to the vocabulary."""

from __future__ import annotations

from tests.mutants.faults import ATOMS, CHUNKED, REFERENCE, STATISTICS, Fault

MARGINS, TRIPLETS = "fused_nce/core/tails.py", "fused_nce/core/statistics.py"

GATHERED, SAMPLED = "fused_nce/backends/gathered.py", ("tests/losses/test_gathered.py",)

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
    # ---- gathered columns, mixtures
    Fault("gathered: the last block alone", GATHERED, "dq[rows] += towards", "dq[rows] = towards", SAMPLED),
    Fault(
        "gathered: out of range unseen", GATHERED, 'found.masked_fill_(block.missing, float("nan"))', "found", SAMPLED
    ),
    Fault(
        "gathered: a learnable scale dropped", GATHERED, "fixed_sum(towards * part) if need_scale else 0", "0", SAMPLED
    ),
    Fault(
        "npid: noise as if one were drawn",
        "fused_nce/losses/npid_nce.py",
        "log_count(m / bank.shape[0], s)",
        "log_count(1 / bank.shape[0], s)",
        SAMPLED,
    ),
    Fault(
        "npid: every batch its own Z",
        "fused_nce/losses/npid_nce.py",
        "torch.where(self.log_z.isnan(), own, self.log_z)",
        "own",
        SAMPLED,
    ),
    Fault(
        "mixture: the best component alone",
        "fused_nce/losses/amdim_mixture.py",
        "fixed_mean((-tau * each).logsumexp(dim=1)) / -tau",
        "fixed_mean(each.amin(dim=1))",
        ("tests/losses/test_estimators.py",),
    ),
    Fault(
        "cpu: the plan forgets that q is k",
        "fused_nce/backends/cpu.py",
        "limit, shared=k is q)",
        "limit, shared=False)",
        ("tests/backends/test_cpu_layouts.py",),
    ),
    Fault(
        "cpc: a sampled own target is left out",
        "fused_nce/losses/cpc.py",
        "return _classified(own, others.logsumexp(dim=1),",
        "return _classified(own, others.masked_fill(others == own[:, None], -1e4).logsumexp(dim=1),",
        ("tests/losses/test_fuzz.py",),
    ),
    Fault(
        "triplets: a hinge's other side",
        "fused_nce/core/tails.py",
        'return {"pos_hardest": -active, "neg_hardest": active}',
        'return {"pos_hardest": -active, "neg_hardest": active.clamp(max=0.99)}',
        ("tests/losses/test_fuzz.py",),
    ),
)
