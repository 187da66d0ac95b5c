"""Prefixes of one pair of operands: each the problem of its first columns, normalised; all at the cost of one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from fused_nce import info_nce
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.spec import Bias, Block, Hardness, Identity, Index, Labels, Separate, Several, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.conftest import MODULE, needs_kernels

N, M, D, WIDTHS, WEIGHTS = 70, 90, 37, (3, 16, 32), (0.5, 1.0, 2.0)
BACKENDS = [("reference", "16"), ("chunked", "16"), ("chunked", "0.05"), ("cpu", "16"), ("cpu", "0.25")]
BACKENDS += [("cuda", "16"), ("cuda", "0.06")]  # on a CPU that plays a GPU; of one strip, and of several
KERNELS = ("cpu", "cuda")

pytestmark = pytest.mark.usefixtures("play_gpu")


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, scale = torch.randn(N, D, generator=g), torch.randn(M, D, generator=g), torch.tensor(3.0)
    return [q.to(dtype).requires_grad_(), k.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_()]


def apart(q: Any, k: Any, spec: Spec, **more: Any) -> dict[str, torch.Tensor]:
    """Each width by a call of its own, in float64."""
    found = []
    for width in WIDTHS:
        q_, k_ = (None if x is None else nn.functional.normalize(x[:, :width], dim=1) for x in (q, k))
        assert q_ is not None
        found.append(tile_stats(q_, k_, spec.one, **more, backend="reference"))
    names = [name for name in found[0] if name != "pos"]
    return {"pos": torch.cat([x["pos"] for x in found], dim=1)} | {
        name: torch.stack([x[name] for x in found]) for name in names
    }


def targets_of(layout: Any, m: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    if isinstance(layout, Labels):
        return {"row_ids": torch.arange(N) % 7, "column_ids": torch.arange(m) % 7}
    if isinstance(layout, Several):
        return {"row_ids": torch.randint(-1, m, (N, layout.p), generator=g)}
    return {"row_ids": torch.randint(m, (N,), generator=g)} if isinstance(layout, Index) else {}


@pytest.mark.parametrize(("backend", "workspace_mb"), BACKENDS)
def test_statistics_and_gradients(backend, workspace_mb, monkeypatch):
    """Layouts, a clip, hardness, scales of 60 and 90, which needs shifts, one tensor in both roles; float64 to 1e-12.

    With hardness 60 needs them too.
    """
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    dtype = torch.float32 if backend in KERNELS else torch.float64
    layouts: tuple[Any, ...] = (Index(), Block(1), Labels(), Several(3))
    every: tuple[Any, ...] = (layouts, (Identity(), TanhClip(2.0), Hardness(9.0)), (False, True), (1, 20, 30))
    for layout, transform, shared, sharp in itertools.product(*every):
        drop = shared and isinstance(layout, Labels)
        if backend in KERNELS and isinstance(layout, Several):
            continue
        stats = ("neg_lse", "neg_max", "square")
        spec = Spec(layout, transform, stats, prefixes=WIDTHS, drop_self=drop, unit_norm=sharp > 1)
        sides = []
        for exact in (False, True):
            q, k, scale = operands(torch.float64 if exact else dtype)
            more: dict[str, Any] = {"scale": sharp * scale, **targets_of(layout, N if shared else M)}
            if exact:
                found = apart(q, None if shared else k, spec, **more)
            else:
                found = tile_stats(q, None if shared else k, spec, **more, backend=backend)
            g = torch.Generator().manual_seed(2)
            terms = [found[x] for x in ("pos", "neg_lse", "square")]
            loss = torch.stack([(x * torch.randn(x.shape, generator=g).to(x)).sum() for x in terms]).sum()
            leaves = [q, scale] if shared else [q, k, scale]
            sides.append([*(x.detach() for x in found.values()), *torch.autograd.grad(loss, leaves)])
        for ours, theirs in zip(*sides, strict=True):
            assert ours.shape == theirs.shape
            if ours.numel():
                error = (ours.double() - theirs).abs().max() / theirs.abs().max()
                assert error < (3e-5 if backend in KERNELS else 1e-12), (spec.code, shared, sharp)


@pytest.mark.parametrize(("backend", "workspace_mb"), BACKENDS)
def test_one_sweep(backend, workspace_mb, monkeypatch):
    """The loss, its parts and gradients, each reduction; columns beyond the widest have no gradient."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    dtype = torch.float32 if backend in KERNELS else torch.float64
    rows = targets_of(Index(), M)
    for reduction in ("mean", "sum", "none"):
        tail = Prefixed(0.0, reduction, 1.0, WIDTHS, WEIGHTS)
        spec = Spec(Index(), Identity(), tail.stats, prefixes=WIDTHS)
        q, k, scale = leaves = operands(dtype)
        found = tile_loss(q, k, spec, tail, scale=scale, **rows, backend=backend)
        wide = operands(torch.float64)
        exact = torch.zeros((), dtype=torch.float64)
        for width, weight in zip(WIDTHS, WEIGHTS, strict=True):
            a, b = (nn.functional.normalize(x[:, :width], dim=1) for x in wide[:2])
            more: dict[str, Any] = {"scale": wide[2], **rows, "backend": "reference"}
            exact = exact + weight * tile_loss(a, b, spec.one, Nce(reduction=reduction), **more).loss
        for upstream in (found.loss, found.nce.sum() / (N if reduction == "none" else 1)):
            pairs = zip(
                [upstream, *torch.autograd.grad(upstream, leaves, retain_graph=True)],
                [exact, *torch.autograd.grad(exact, wide, retain_graph=True)],
                strict=True,
            )
            for ours, theirs in pairs:
                error = (ours.double() - theirs).abs().max() / theirs.abs().max()
                assert error < (3e-6 if backend in KERNELS else 1e-12)
            assert not torch.autograd.grad(upstream, leaves[0], retain_graph=True)[0][:, WIDTHS[-1] :].any()
        assert set(found.report) == {f"{name}_{width}" for name in Nce.REPORT for width in WIDTHS}
        assert found.rows["neg_lse"].shape == (3, N)


@needs_kernels
def test_half_precision_keeps_what_lies_across_rows_that_are_alike():
    """There the weights' sum cancels: of weights rounded to bfloat16 a third of the gradient would be wrong."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(D, generator=g) + 0.05 * torch.randn(n, D, generator=g) for n in (N, M))
    rows = targets_of(Index(), M)
    tail = Prefixed(0.0, "mean", 1.0, WIDTHS, WEIGHTS)
    spec = Spec(Index(), Identity(), tail.stats, prefixes=WIDTHS)
    for dtype in (torch.bfloat16, torch.float16):
        narrow: list[Any] = [x.to(dtype).requires_grad_() for x in (q, k)]
        wide: list[Any] = [x.detach().double().requires_grad_() for x in narrow]
        for leaves, backend in ((narrow, "cuda"), (wide, "reference")):
            tile_loss(leaves[0], leaves[1], spec, tail, scale=10.0, **rows, backend=backend).loss.backward()
        for ours, theirs in zip(narrow, wide, strict=True):
            error = (ours.grad.double() - theirs.grad).abs().max() / theirs.grad.abs().max()
            assert error < 2 * torch.finfo(dtype).eps, (dtype, error)


@needs_kernels
def test_all_of_them_cost_the_products_of_one():
    """FLOP of the CPU's GEMMs: the scores once, a product a gradient, whatever the number of prefixes."""
    q, k, _ = operands(torch.float32)
    flop = []
    for widths in ((D,), (3, 16, 32, D)):
        tail = Prefixed(0.0, "mean", 1.0, widths, (1.0,) * len(widths))
        before = MODULE.gemm_flop()
        tile_loss(q, k, Spec(Block(1), Identity(), tail.stats, prefixes=widths), tail, backend="cpu").loss.backward()
        flop.append(MODULE.gemm_flop() - before)
    assert flop[0] == flop[1]


def test_double_backward():
    """By `chunked`, to what autograd says of each width by itself."""
    found = []
    for both in (True, False):
        q, k, scale = operands(torch.float64)
        if both:
            spec = Spec(Block(1), stats=("neg_lse",), prefixes=WIDTHS)
            lse = tile_stats(q, k, spec, scale=scale, backend="chunked")["neg_lse"]
        else:
            unit = ([nn.functional.normalize(x[:, :d], dim=1) for x in (q, k)] for d in WIDTHS)
            own = torch.eye(N, M, dtype=torch.bool)
            lse = torch.stack([(scale * a @ b.T).masked_fill(own, float("-inf")).logsumexp(1) for a, b in unit])
        (first,) = torch.autograd.grad(lse.square().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (q, k, scale)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked", *KERNELS])
def test_what_is_not_finite_shows_and_a_zero_row_does_not_hurt(backend):
    for value in (float("nan"), float("inf")):
        q, k, _ = (x.detach() for x in operands(torch.float32))
        k[4, 20] = value
        spec = Spec(Block(1), stats=Nce.READS, prefixes=WIDTHS)
        lse = tile_stats(q, k, spec, backend=backend)["neg_lse"]
        assert lse[0].isfinite().all()  # the narrowest does not see it
        assert lse[2, torch.arange(N) != 4].isnan().all()
    q, k, _ = operands(torch.float32)
    zero = (q * (torch.arange(N) != 3)[:, None]).detach().requires_grad_()
    tail = Prefixed(0.0, "mean", 1.0, WIDTHS, WEIGHTS)
    loss = tile_loss(zero, k, Spec(Block(1), stats=tail.stats, prefixes=WIDTHS), tail, backend=backend).loss
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (zero, k)))


@pytest.mark.parametrize("backend", ["reference", "chunked", *KERNELS])
@pytest.mark.parametrize("large", [0, 1])
def test_a_norm_beyond_float32_shows(backend, large):
    """1e20 squared is ∞, and 1 / ∞ would be cosines of 0; also where the other rows keep the products finite."""
    sides = [x.detach().clone() for x in operands(torch.float32)[:2]]
    sides[large][4, :16] = 1e20
    sides[1 - large] *= 1e-12
    q, k = (x.requires_grad_() for x in sides)
    tail = Prefixed(0.0, "none", 1.0, WIDTHS, WEIGHTS)
    found = tile_loss(q, k, Spec(Block(1), stats=tail.stats, prefixes=WIDTHS), tail, backend=backend)
    assert found.nce.isnan().sum() == (1 if large == 0 else N)
    (dq,) = torch.autograd.grad(found.nce.sum(), q)
    assert dq[4].isnan().any()


@pytest.mark.parametrize("backend", ["reference", "chunked", *KERNELS])
def test_of_one_width_it_shows_or_is_no_norm_too_large(backend):
    """The C++ loss finds norms in float64; plain torch, and with it what takes more than one block, cannot."""
    q, k, _ = (x.detach() for x in operands(torch.float32))
    large = q.clone()
    large[4] *= 2.0**70
    for more in ({}, {"false_negative_margin": 0.1}, {"directions": ("q2k", "k2q", "q2q")}):
        small, found = (
            info_nce(x, k[:N], normalize=True, reduction="none", **more, backend=backend).nce for x in (q, large)
        )
        if backend == "cpu" and not more:
            torch.testing.assert_close(found, small)
        else:
            assert found[4].isnan()


@needs_kernels
def test_the_memory_is_what_the_formula_says(monkeypatch):
    """Of the CPU's kernels, whose arena gives no more than the plan counted; and both stay within the limit."""
    for n, m, d, parts in ((1000, 5000, 384, 4), (64, 200_000, 64, 2)):
        for both in (True, False):
            assert 0 < MODULE.prefix_workspace_bytes(n, m, d, 1, parts, both, True, True, True, 16 << 20) <= 16 << 20
            assert 0 < MODULE.cuda_prefix_bytes(n, m, 1, parts, 2, both, True, 16 << 20) <= 16 << 20
    assert MODULE.prefix_workspace_bytes(1000, 5000, 384, 1, 4, True, True, True, True, 1 << 10) == 0
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.001")
    q, k, _ = operands(torch.float32)
    spec = Spec(Block(1), stats=Nce.READS, prefixes=WIDTHS)
    message = "the workspace of 1048 bytes is below that of the smallest plan of 3 prefixes"
    for backend in KERNELS:
        with pytest.raises(ValueError, match=message):
            tile_stats(q, k, spec, backend=backend)
        with pytest.raises(ValueError, match=message):
            info_nce(q, k[:N], prefixes=WIDTHS, backend=backend)


def test_messages():
    q, k, _ = operands(torch.float64)
    for spec, message in (
        (Spec(Block(1), prefixes=(16, 3)), r"prefixes: got \(16, 3\), need ascending widths from 1 to D = 37"),
        (Spec(Block(1), prefixes=(3, 38)), r"prefixes: got \(3, 38\), need ascending widths"),
        (Spec(Block(1), prefixes=(3,), columns=("neg_lse",)), "prefixes: got them with identity.* columns"),
        (Spec(Block(1), Bias(), prefixes=(3,)), "prefixes: got them with bias"),
        (Spec(Separate(1), prefixes=(3, 5)), r"positives: got .*need \(N, P\) = \(70, 2\)"),
    ):
        more: dict[str, Any] = {"positives": torch.zeros(N, 1).double()} if isinstance(spec.layout, Separate) else {}
        with pytest.raises(ValueError, match=f"^{message}"):
            tile_stats(q, k, spec, **more)
    spec = Spec(Block(1), stats=(*Nce.READS, "square"), prefixes=(3, 5))
    for tail in (Nce(), Prefixed(0.0, "mean", 1.0, (3, 6), (1.0, 1.0))):
        with pytest.raises(ValueError, match=r"^tail: got .* with prefixes \(3, 5\), need Prefixed of those widths"):
            tile_loss(q, k, spec, tail)
    with pytest.raises(ValueError, match=r"^tail.penalty: got 0\.1 with prefixes \(3, 5\), need 0"):
        tile_loss(q, k, spec, Prefixed(0.1, "mean", 1.0, (3, 5), (1.0, 1.0)))
    with pytest.raises(ValueError, match=r"^scale: got -0\.5 with hardness 0\.5, need a sum that is not 0"):
        tile_loss(q, k, Spec(Block(1), Hardness(0.5), stats=Nce.READS), Nce(), scale=-0.5)
