"""Problems that share their launches, on a CPU emulation of the GPU: an AMDIM step is one call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_nce import AMDIMLoss, last_path
from fused_nce.core import engine
from fused_nce.core.engine import Term, tile_loss, tile_losses
from fused_nce.core.spec import Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.conftest import MODULE, needs_kernels

pytestmark = needs_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _launches_count_here(play_gpu, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(engine, "LAUNCHES_COUNT_ON", ("cpu",))


def problems(dtype=torch.float32, clip=20.0, seed=0):
    """Three, of other sizes, weights, offsets and numbers of reports; and their leaves."""
    g = torch.Generator().manual_seed(seed)
    parts, leaves = [], []
    for n_c, rows, images, offset, weight, reports in (
        (3, 1, 40, 2, 0.5, 1),
        (5, 2, 21, 0, 1.0, 2),
        (1, 1, 9, 4, 2.0, 3),
    ):
        n = (images - 6) * rows
        q, k = (torch.randn(size, 24, generator=g).to(dtype).requires_grad_() for size in (n, images * n_c))
        parts.append(
            Term(q, k, Spec(Block(n_c, rows), TanhClip(clip)), Nce(0.3 * weight, weight=weight), offset, reports)
        )
        leaves += [q, k]
    return parts, leaves


def one_by_one(parts, backend, **options):
    """(loss, nce, penalty, report) as the sum of the problems' own."""
    found = [
        tile_loss(p.q, p.k, p.spec, p.tail, offset=p.offset, report_groups=p.report_groups, backend=backend, **options)
        for p in parts
    ]
    lines = [
        torch.stack([x.reshape(p.report_groups) for x in out.report.values()], 1)
        for p, out in zip(parts, found, strict=True)
    ]
    loss, nce, penalty = (torch.stack([out[i] for out in found]).sum() for i in range(3))  # type: ignore[misc]
    return loss, nce, penalty, torch.cat(lines)


def close(found, exact, dtype):
    """float32 as `test_cuda_layouts.py`; a 16-bit gradient may be rounded to its other neighbour."""
    ulps = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 5e-6)
    assert (found.double() - exact.double()).abs().max() <= ulps * exact.double().abs().max()


@pytest.mark.parametrize("clip", [20.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workspace_mb", ["16", "0.05"])  # together; too little for that: one after the other
def test_the_sum_is_that_of_the_problems(dtype, clip, workspace_mb, monkeypatch):
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    parts, leaves = problems(dtype, clip)
    scale = torch.tensor(0.3, requires_grad=True)
    wanted = one_by_one(parts, "cuda", scale=scale)
    found = tile_losses(parts, scale=scale, backend="cuda")
    for x, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, exact, rtol=2e-6, atol=2e-6)
    for upstream in (1.0, -2.5):
        exact = torch.autograd.grad(upstream * wanted[0], [*leaves, scale], retain_graph=True)
        ours = torch.autograd.grad(upstream * found[0], [*leaves, scale], retain_graph=True)
        for x, y in zip(ours, exact, strict=True):
            assert x.dtype == y.dtype
            close(x, y, x.dtype)


def test_it_is_the_oracle_too():
    parts, leaves = problems()
    wanted = one_by_one(parts, "reference", scale=0.3)
    found = tile_losses(parts, scale=0.3)
    path = last_path()
    assert path is None or path.backend == "cpu"  # the choice is a CPU's: each problem by itself, in one op
    for out in (found, tile_losses(parts, scale=0.3, backend="cuda")):
        torch.testing.assert_close(out.loss, wanted[0], rtol=2e-6, atol=0)
        for x, y in zip(
            torch.autograd.grad(out.loss, leaves, retain_graph=True),
            torch.autograd.grad(wanted[0], leaves, retain_graph=True),
            strict=True,
        ):
            close(x, y, torch.float32)


def test_reported_parts_are_differentiable():
    """By computing the scores again: the stash is of the sum."""
    parts, leaves = problems()
    scale = torch.tensor(0.3, requires_grad=True)
    results = []
    for loss, nce, penalty, _ in (
        tile_losses(parts, scale=scale, backend="cuda"),
        one_by_one(parts, "cuda", scale=scale),
    ):
        results.append(torch.autograd.grad(loss + 2 * nce - 3 * penalty, [*leaves, scale]))
    for x, y in zip(*results, strict=True):
        close(x, y, torch.float32)


def test_frozen_inputs_cost_no_gemm():
    parts, leaves = problems()
    for x in leaves[1::2]:
        x.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        found = tile_losses(parts, backend="cuda")
    assert counter.get_total_flops() == sum(2 * 2 * p.q.shape[0] * p.k.shape[0] * 24 for p in parts)
    wanted = torch.autograd.grad(one_by_one(parts, "cuda")[0], leaves[::2])
    for x, y in zip(torch.autograd.grad(found.loss, leaves[::2]), wanted, strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert not tile_losses(parts, backend="cuda").loss.requires_grad


def test_what_differs_in_more_than_shape_goes_alone():
    parts, _ = problems()
    parts[1] = parts[1]._replace(spec=Spec(parts[1].spec.layout, TanhClip(9.0)))
    torch.testing.assert_close(tile_losses(parts, backend="cuda").loss, one_by_one(parts, "cuda")[0], rtol=1e-6, atol=0)


def test_the_op_within_torch():
    """torch's own checks; compiled without a break; a double backward is refused by name."""
    parts, leaves = problems()
    scores = [engine._prepare(p.q, p.k, p.spec, 0.3, p.offset, None, None, None, None) for p in parts]
    arguments = (
        *([x.q for x in scores], [x.k for x in scores], None, 0.3, [x.spec for x in scores]),
        *([p.tail.code for p in parts], [p.offset for p in parts], [p.report_groups for p in parts]),
        [True] * 6 + [False],
    )
    torch.library.opcheck(torch.ops.fused_nce.losses, (*arguments, "cuda"))

    def loss(*leaves):
        pairs = zip(parts, leaves[::2], leaves[1::2], strict=True)
        return tile_losses([p._replace(q=q, k=k) for p, q, k in pairs], scale=0.3, backend="cuda").loss

    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), plain, strict=True):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True)


# ---- an AMDIM step ----------------------------------------------------------------------------------------------

FREE = {
    "view", "transpose", "unbind", "select", "slice", "squeeze", "unsqueeze", "permute", "detach", "expand", "split",
    "_unsafe_view", "split_with_sizes", "new_empty_strided", "as_strided", "_local_scalar_dense", "losses",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts torch's own operations that a GPU would launch a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        if name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def maps(dtype=torch.bfloat16, batch=20, d=64):
    """Of two views, as convolutions hand them over."""
    g = torch.Generator().manual_seed(0)
    return [
        {f"f{s}": torch.randn(batch, d, s, s, generator=g).to(dtype).requires_grad_() for s in (1, 5, 7)}
        for _ in range(2)
    ]


def step_of(loss, views):
    """The loss, and the gradients of all maps."""
    torch.manual_seed(0)
    out = loss(*views)
    out.loss.backward()
    return out, [x.grad for view in views for x in view.values()]


def test_an_amdim_step_is_a_handful_of_launches():
    """Six losses, four problems, one call: twelve GEMMs, one kernel for all rows, two for the numbers."""
    loss, views, before = AMDIMLoss(backend="cuda"), maps(), MODULE.cuda_emulated_launches()
    with Launches() as torchs:
        step_of(loss, views)
    assert MODULE.cuda_emulated_launches() - before == 12 + 1 + 2
    # The maps' copies to rows, the sampled locations, their gradients' way back, and the report's means.
    assert len(torchs.names) <= 27, torchs.names


@pytest.mark.parametrize("antecedents", ["sample", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_amdim_step_is_its_problems(dtype, antecedents, monkeypatch):
    loss = AMDIMLoss(antecedents=antecedents, backend="cuda")
    found, grads = step_of(loss, maps(dtype, batch=6, d=16))
    monkeypatch.setattr(engine, "LAUNCHES_COUNT_ON", ())
    wanted, exact = step_of(loss, maps(dtype, batch=6, d=16))
    for x, y in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=0)
    assert found.stats.keys() == wanted.stats.keys()
    for name, value in found.stats.items():
        assert value.item() == pytest.approx(wanted.stats[name].item(), rel=1e-5, abs=1e-6)
    for x, y in zip(grads, exact, strict=True):
        close(x, y, dtype)


def test_published_sizes_go_together_and_large_ones_alone():
    """128 images share their launches; 1008 have work enough."""
    scores = {n: 2 * (2 * n * n * 25 + n * n * 49) for n in (128, 1008)}
    assert scores[128] <= engine.FEW_SCORES < scores[1008]
    plans = [
        MODULE.cuda_plan(2 * 128, 128 * 25, 1024, 25, 2, 1 << 28),
        MODULE.cuda_plan(128, 128 * 49, 1024, 49, 2, 1 << 28),
    ]
    assert all(
        p["panels"] == p["ctas_per_row"] == 1 and p["strip_rows"] == n for p, n in zip(plans, (256, 128), strict=True)
    )
    assert 2 * sum(p["score_bytes"] for p in plans) <= 4 * engine.FEW_SCORES == 32 << 20
    assert math.isclose(2 * sum(p["score_bytes"] for p in plans), 4 * scores[128], rel_tol=0.01)
