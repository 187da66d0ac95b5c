"""The ops as torch sees them: schemas, fake kernels, graphs without a break, and the GEMMs that they cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from fused_nce import AMDIMLoss, amdim_nce, tile_loss, tile_stats
from fused_nce.core import dispatch
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.spec import STATISTICS, Block, Identity, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.conftest import MODULE
from tests.marks import nightly_but

SPEC = Spec(Block(3), TanhClip(20.0))
OPS = torch.ops.fused_nce
NO_IDS = (None,) * 7  # bias, positives, ids, ceilings, guides


def features(n=4, n_c=3, d=5, dtype=torch.float32, grad="qk", seed=0):
    """(q, k)."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, d, generator=g).to(dtype) for rows in (n, n * n_c))
    return q.requires_grad_("q" in grad), k.requires_grad_("k" in grad)


# ---- schema, fake kernel, autograd ------------------------------------------------------------------------------


def samples(backend):
    """(op, arguments) over dtypes, layouts, gradients wanted, reductions."""
    dtypes = (torch.float32, torch.bfloat16) + ((torch.float64,) if backend != "cpu" else (torch.float16,))
    grads = ("qk", "q", "k", "")
    for i, (dtype, grad, spec) in enumerate(itertools.product(dtypes, grads, (SPEC, Spec(Block(1, 2), Identity())))):
        q, k = features(4, spec.layout.n_c if i % 2 else 3, 1 + i % 6, dtype, grad, i)
        if i % 3 == 0:
            q = q.detach().T.contiguous().T.requires_grad_("q" in grad)
        scale = torch.tensor(0.5, requires_grad=i % 4 < 2) if i % 2 else None
        needs = [x is not None and x.requires_grad for x in (q, k, scale)] + [False, False]
        rest = (*NO_IDS, 0.7, spec.code, 0)
        yield OPS.stats.default, (q, k, scale, *rest, backend)
        for reduction in ("mean", "sum", "none"):
            parts = reduction != "sum"
            yield OPS.loss.default, (q, k, scale, *rest, f"nce(0.04,{reduction})", needs, parts, 1 + i % 2, backend)
        with torch.no_grad():
            found = OPS.stats(q, k, scale, *rest, backend)
        leaves = (q.detach(), k.detach(), None if scale is None else scale.detach())
        yield OPS.grads.default, (*leaves, *rest, *found, *map(torch.ones_like, found), needs, backend)


@pytest.mark.parametrize("every", nightly_but([11], [11, 3]))
def test_opcheck(backend, every):
    """All of torch's own checks on some samples, the quick ones on more; the slow one traces the op."""
    count = 0
    for i, (op, arguments) in enumerate(samples(backend)):
        quick = ("test_schema", "test_autograd_registration", "test_faketensor")
        slow = () if i % every else ("test_aot_dispatch_dynamic",)
        if slow or every == 3 or i % 2:
            torch.library.opcheck(op, arguments, test_utils=(*quick, *slow))
            count += 1
    assert count >= 60


# ---- torch.compile ----------------------------------------------------------------------------------------------


def nce(n, seed=0):
    a, c = features(n, seed=seed)
    return amdim_nce, (a, c.view(n, 3, 5))


def module(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    views = [
        {f"f{side}": torch.randn(n, 6, side, side, generator=g).requires_grad_() for side in (1, 2)} for _ in range(2)
    ]
    return AMDIMLoss(pairs=("1>2", "2>2")), views


def stats(n, seed=0):
    return lambda q, k: sum(x.sum() for x in tile_stats(q, k, SPEC, scale=0.3).values()), features(n, seed=seed)


def first(out):
    return out.loss if hasattr(out, "loss") else out


@pytest.mark.parametrize("build", nightly_but([module], [nce, module, stats]))
def test_compiles_at_most_twice_over_ten_batch_sizes(build):
    """No graph break (`fullgraph`), and a batch size is no constant."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function, _ = build(2)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for n in (4, 7, 2, 16, 5, 9, 12, 3, 31, 64):
        _, arguments = build(n, seed=n)
        loss = first(compiled(*arguments))
        loss.backward()
        assert torch.isfinite(loss)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_equals_eager(backend, reduction):
    torch._dynamo.reset()

    def loss(q, k):
        out = tile_loss(q, k, SPEC, Nce(0.04, reduction), scale=0.3, backend=backend)
        return out.loss, out.nce.detach(), out.penalty.detach(), out.report["top1"]

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        q, k = features(9, seed=1)
        values = function(q, k)
        (3 * values[0]).backward()
        results.append((*values, q.grad, k.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_compiled_parts_are_differentiable(backend):
    torch._dynamo.reset()

    def parts(q, k):
        out = tile_loss(q, k, SPEC, Nce(0.04), scale=0.3, backend=backend)
        return 2 * out.nce - 3 * out.penalty

    grads = []
    for function in (parts, torch.compile(parts, fullgraph=True, backend="aot_eager")):
        q, k = features(9, seed=1)
        function(q, k).backward()
        grads.append((q.grad, k.grad))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_compiled_under_no_grad(backend):
    torch._dynamo.reset()
    q, k = features(6)
    compiled = torch.compile(
        lambda q, k: tile_loss(q, k, SPEC, Nce(0.04), backend=backend).loss, fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        out = compiled(q, k)
    assert not out.requires_grad
    assert torch.equal(out, tile_loss(q, k, SPEC, Nce(0.04), backend=backend).loss.detach())


# ---- the GEMMs --------------------------------------------------------------------------------------------------

N, N_C, D = 16, 3, 8  # the C++ kernels pad rows to 16 and odd widths to pairs, and the FLOP of padding count
UNIT = 2 * N * (N * N_C) * D  # u, one score GEMM
MATMULS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # name: index of the left operand


def gemm_flop(function):
    """FLOP of the matrix products that ran: the C++ kernels' own count, and torch's from the profiler.

    An op's inside is closed to dispatch modes.
    """
    before = MODULE.gemm_flop() if MODULE else 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    total = 0
    for event in profile.events():
        if event.name in MATMULS:
            left, right = event.input_shapes[MATMULS[event.name] :][:2]
            total += 2 * left[0] * left[1] * right[1]
    return total + (MODULE.gemm_flop() - before if MODULE else 0)


def formula_flop(function):
    """FLOP by the registered formulas."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def run_loss(backend, grad, parts=False, mode=None):
    q, k = features(N, N_C, D, grad=grad)

    def run():
        with mode() if mode else torch.enable_grad():
            out = tile_loss(q, k, SPEC, Nce(0.04), scale=0.3, backend=backend)
        if out.loss.requires_grad:
            (out.nce + out.penalty if parts else out.loss).backward()

    return run


def run_stats(backend, grad):
    q, k = features(N, N_C, D, grad=grad)

    def run():
        out = tile_stats(q, k, SPEC, scale=0.3, backend=backend)
        if out["pos"].requires_grad:
            (out["pos"].sum() + out["neg_lse"].sum()).backward()

    return run


COSTS = {  # what runs: cost in u
    "both gradients": (lambda b: run_loss(b, "qk"), 3),
    "keys frozen": (lambda b: run_loss(b, "q"), 2),
    "queries frozen": (lambda b: run_loss(b, "k"), 2),
    "all frozen": (lambda b: run_loss(b, ""), 1),
    "no_grad": (lambda b: run_loss(b, "qk", mode=torch.no_grad), 1),
    "inference_mode": (lambda b: run_loss(b, "qk", mode=torch.inference_mode), 1),
    "parts: the scores again": (lambda b: run_loss(b, "qk", parts=True), 3 + 3),
    "tile_stats": (lambda b: run_stats(b, "qk"), 1 + 3),
    "tile_stats, keys frozen": (lambda b: run_stats(b, "q"), 1 + 2),
    "tile_stats, all frozen": (lambda b: run_stats(b, ""), 1),
}


@pytest.mark.parametrize("name", COSTS)
def test_gemm_count(backend, name):
    build, units = COSTS[name]
    assert gemm_flop(build(backend)) == units * UNIT


@pytest.mark.parametrize("name", COSTS)
def test_flop_formula(backend, name):
    build, units = COSTS[name]
    assert formula_flop(build(backend)) == units * UNIT


@pytest.mark.parametrize("guided", ["reference", "chunked", "cpu"])  # no other knows guides
def test_a_guide_is_counted(guided, monkeypatch):
    """Its products come with the scores', once more where those are made once more, which the CPU's plan says."""
    n, d, width, unit = 256, 64, 16, 2 * 256 * 256
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, d, generator=g).requires_grad_() for _ in range(2))
    guide = torch.randn(n, width, generator=g), torch.randn(n, width, generator=g)
    if (
        reason := dispatch.why_not(guided, Spec(Block(1), Identity(), Nce.READS, filters=("guide",)), q, k)
    ) is not None:
        pytest.skip(f"{guided}: {reason}")

    def step(prefixes):
        spec = Spec(Block(1), Identity(), Nce.READS, filters=("guide",), prefixes=prefixes)
        tail = Prefixed(0.0, "mean", 1.0, prefixes, (1.0, 1.0)) if prefixes else Nce()
        ceilings = torch.full((spec.n_widths, n), 3.0)
        tile_loss(q, k, spec, tail, ceilings=ceilings, guide=guide, backend=guided).loss.backward()

    cases: list[tuple[str, tuple[int, ...], int]] = [("16", (), 3 * d + width)]
    if guided == "cpu":
        cases += [("16", (16, d), 3 * d + width), ("0.1", (), 4 * d + 2 * width)]
    if guided == "chunked":
        cases += [("16", (16, d), 3 * d + 2 * width)]
    for workspace_mb, prefixes, products in cases:
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
        assert formula_flop(lambda: step(prefixes)) == products * unit  # noqa: B023  (runs at once)
        assert gemm_flop(lambda: step(prefixes)) == products * unit  # noqa: B023


def test_learnable_scale_costs_no_gemm():
    q, k = features(N, N_C, D)
    scale = torch.tensor(0.3, requires_grad=True)
    assert gemm_flop(lambda: tile_loss(q, k, SPEC, Nce(), scale=scale, backend="chunked").loss.backward()) == 3 * UNIT


def test_panels_cost_one_gemm_more(monkeypatch):
    """Where no strip of whole rows fits, the scores are computed twice: still within the workspace."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.0005")
    q, k = features(64, N_C, D)
    unit = 2 * 64 * 64 * N_C * D
    assert gemm_flop(lambda: tile_loss(q, k, SPEC, Nce(), backend="chunked").loss.backward()) == 4 * unit


def test_unwanted_gradients_are_empty(backend):
    """Nothing of their size is allocated either."""
    q, k = features(N, N_C, D)
    for needs in itertools.product([True, False], repeat=3):
        wanted = [*needs, False, False]
        arguments = (q.detach(), k.detach(), None, *NO_IDS, 0.3, SPEC.code, 0, "nce(0.04,mean)", wanted, True, 1)
        assert [x.numel() > 0 for x in OPS.loss(*arguments, backend)[-5:]] == wanted


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("stats", [("square",), ("neg_max",), ("neg_lse",), ("square", "neg_lse")])
def test_any_choice_of_statistics_has_its_gradient(backend, stats):
    torch.manual_seed(0)
    q, k = torch.randn(6, 8, requires_grad=True), torch.randn(18, 8, requires_grad=True)
    if (reason := dispatch.why_not(backend, Spec(Block(3)), q, k)) is not None:
        pytest.skip(f"{backend}: {reason}")

    def gradients(name, wanted):
        found = tile_stats(q, k, Spec(Block(3), TanhClip(20.0), wanted), backend=name)
        total = found["pos"].sum() + sum(found[s].sum() for s in stats if s != "neg_max")
        return torch.autograd.grad(total, (q, k))

    for ours, whole in zip(gradients(backend, stats), gradients("reference", STATISTICS), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
