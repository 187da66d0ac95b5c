"""Filters: columns that leave a row's negatives by their dot product or by their guides'."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_nce import tile_stats
from fused_nce.backends import cpu
from fused_nce.core import workspace
from fused_nce.core.engine import tile_loss
from fused_nce.core.spec import FILTERS, Block, Identity, Index, Labels, Spec, SqDist, TanhClip
from fused_nce.core.tails import LogOut, Nce
from tests.conftest import MODULE, needs_kernels

N, M, D, G = 40, 150, 7, 3
TILES_MB = {"cpu": "0.03", "cuda": "0.02"}  # of the kernels: several strips, tiles and groups, as `cut_up` sees to
KERNELS = [pytest.param(name, marks=needs_kernels) for name in TILES_MB]
BACKENDS = ["reference", "chunked", *KERNELS]
pytestmark = pytest.mark.usefixtures("play_gpu")


def close(ours, theirs, rtol, atol):
    """As float64 has it, or float32."""
    if ours.dtype == torch.float32:
        rtol, atol = 1e-5, max(1e-6, atol)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol)


def cut_up(backend, spec, **asked):
    """Fails where the kernels' plan has one strip, tile or group of the problem below."""
    sizes = N, M, D, torch.float32, workspace.limit_bytes("cpu")
    if backend == "cuda":
        plan = MODULE.cuda_plan(N, M, D, spec.n_pos, 4, sizes[-1], marked=True)
        assert plan["block_rows"] < N, plan
        return
    plan = MODULE.plan(*sizes, **asked, **cpu._plan_options(spec, shared=False))
    assert min(plan["strips"], plan["tiles"], plan["groups"]) > 1, plan


def problem(backend="reference"):
    """(q, k, guides, ceilings, targets) in the backend's widest dtype; some rows lose every negative."""
    dtype = torch.float32 if backend in TILES_MB else torch.float64
    g = torch.Generator().manual_seed(0)
    q, k, gq, gk = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((N, D), (M, D), (N, G), (M, G)))
    ceilings = torch.randn(2, N, generator=g, dtype=dtype) + 1
    ceilings[:, 3] = -100.0
    return q.requires_grad_(), k.requires_grad_(), (gq, gk), ceilings, torch.randint(M, (N,), generator=g)


def dense(q, k, guide, ceilings, own, clip, filters):
    """(the mean of softplus(neg_lse − pos), who is left out), by masks."""
    s = q @ k.T
    out = torch.zeros_like(s, dtype=torch.bool)
    for name, line in zip(filters, ceilings, strict=True):
        out |= ((guide[0] @ guide[1].T) if name == "guide" else s) > line[:, None]
    t = 0.7 * s if clip is None else clip * torch.tanh(0.7 * s / clip)
    neg = t.masked_fill(own | out, -1e4).logsumexp(1)
    return nn.functional.softplus(neg - t[own]).mean(), out & ~own


@pytest.mark.parametrize("workspace_mb", ["16", "0.002"], ids=["whole", "tiles"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients(backend, workspace_mb, monkeypatch):
    """Every layout with a fixed positive, a clip or none, each filter alone and both."""
    small = workspace_mb != "16"
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", TILES_MB.get(backend, workspace_mb) if small else workspace_mb)
    q, k, guide, both, targets = problem(backend)
    for filters in (("ceiling",), ("guide",), FILTERS):
        ceilings = both[[FILTERS.index(name) for name in filters]]
        given = {"ceilings": ceilings, "guide": guide if "guide" in filters else None}
        for clip in (None, 5.0, 60.0):
            transform = Identity() if clip is None else TanhClip(clip)
            for layout, own_columns, more in (
                (Index(), targets, {"row_ids": targets}),
                (Block(1), torch.arange(N), {}),
            ):
                own = nn.functional.one_hot(own_columns, M).bool()
                exact, out = dense(q, k, guide, ceilings, own, clip, filters)
                assert out.any()
                assert out[3].sum() == M - 1
                spec = Spec(layout, transform, Nce().stats, filters=filters)
                if small and backend in TILES_MB:
                    cut_up(backend, spec)
                found = tile_loss(q, k, spec, Nce(), scale=0.7, **more, **given, backend=backend)
                pairs = zip(*(torch.autograd.grad(x, (q, k)) for x in (found.loss, exact)), strict=True)
                close(found.loss, exact, rtol=1e-12, atol=0)
                for ours, theirs in pairs:
                    close(ours, theirs, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_and_sums(backend, monkeypatch):
    """Of labelled columns, cut into tiles; positives keep their place whatever their height."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", TILES_MB.get(backend, "0.004"))
    q, k, _, ceilings, _ = problem(backend)
    rows, columns = torch.arange(N) % 5, torch.arange(M) % 5
    spec = Spec(Labels(), stats=(*LogOut.READS, "neg_sum", "neg_count"), filters=("ceiling",))
    if backend in TILES_MB:
        cut_up(backend, spec, need_q=False, need_k=False)
        cut_up(backend, spec, statistics=False)
    found = tile_stats(q, k, spec, row_ids=rows, column_ids=columns, ceilings=ceilings[:1], backend=backend)
    s, same = q @ k.T, rows[:, None] == columns
    kept = ~same & (s <= ceilings[0][:, None])
    assert torch.equal(found["pos_count"], same.sum(1).to(q.dtype))
    assert torch.equal(found["neg_count"], kept.sum(1).to(q.dtype))
    exact = (s * kept).sum(1)
    close(found["neg_sum"], exact, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        *(torch.autograd.grad(x.square().sum(), (q, k)) for x in (found["neg_sum"], exact)), strict=True
    ):
        close(ours, theirs, rtol=1e-10, atol=1e-12 if q.dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_that_is_not_finite_is_not_filtered_away(backend):
    q, k, guide, ceilings, targets = problem(backend)
    k = k.detach().clone()
    k[4, 2] = float("nan")
    spec = Spec(Index(), stats=Nce().stats, filters=FILTERS)
    found = tile_stats(q, k, spec, row_ids=targets, ceilings=ceilings, guide=guide, backend=backend)
    assert found["neg_lse"].isnan().all()


def test_messages():
    q, k, guide, ceilings, targets = problem()
    spec = Spec(Index(), stats=Nce().stats, filters=FILTERS)
    plain, given = Spec(Index(), stats=Nce().stats), {"ceilings": ceilings, "guide": guide}
    cases = [
        (plain, {"ceilings": ceilings}, "ceilings: got one without filters, need None"),
        (plain, {"guide": guide}, "guide: got one without filters, need None"),
        (spec, given | {"guide": None}, "guide: got none with the filters"),
        (
            spec,
            given | {"ceilings": ceilings[:1]},
            r"ceilings: got .*\(1, 40\).* need torch.float64 of \(F, N\) = \(2, 40\)",
        ),
        (
            spec,
            given | {"guide": (guide[0].float(), guide[1])},
            r"guide rows: got torch.float32 .*, need torch.float64",
        ),
        (
            Spec(Index(), SqDist(), ("neg_max",), filters=FILTERS),
            given,
            "spec: got filters .* need scores of dot products",
        ),
    ]
    for case, options, message in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            tile_stats(q, k, case, row_ids=targets, **options)
    q, k, guide, ceilings, targets = problem("cpu")
    with pytest.raises(ValueError, match="which cannot run this: it has no guide"):
        tile_stats(q, k, spec, row_ids=targets, ceilings=ceilings, guide=guide, backend="triton")
    both = Spec(Index(), columns=("neg_lse",), filters=FILTERS)
    if MODULE:
        for backend in TILES_MB:
            with pytest.raises(ValueError, match="leave no column of a row out beside statistics of columns"):
                tile_stats(q, k, both, row_ids=targets, ceilings=ceilings, guide=guide, backend=backend)
