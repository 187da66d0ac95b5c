"""The `cuda` backend on a GPU: cuBLAS, the launches, streams, graphs and memory, which no CPU can play."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fused_nce import AMDIMLoss, amdim_nce, last_path, tile_loss
from fused_nce.backends import cuda
from fused_nce.core import engine
from fused_nce.core.tails import Nce
from tests.backends.test_cuda_on_host import DTYPES, MIB, ROUTES
from tests.budget import Budget, eta, precision
from tests.cases import DTYPES as BY_NAME
from tests.cases import Case, environment, features
from tests.conftest import MODULE, REASON
from tests.gpu.conftest import peak_bytes
from tests.oracle import Oracle

GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPU or MODULE is None or not MODULE.build_info()["cuda"],
        reason="torch finds no GPU here" if not GPU else REASON or "the kernels were built without nvcc",
    ),
]


def solve(case: Case, device: str = "cuda", backend: str | None = "cuda"):
    """(loss parts, dq, dk) of a case, on the CPU."""
    q, k = (x.to(device).requires_grad_() for x in features(case))
    with environment(FUSED_NCE_WORKSPACE_MB=None if case.workspace_mb is None else str(case.workspace_mb)):
        out = tile_loss(q, k, case.spec, Nce(0.04), scale=case.scale, offset=case.offset, backend=backend)
        grads = torch.autograd.grad(out.loss, (q, k))
    return out, *(g.cpu() for g in grads)


@pytest.mark.parametrize("clip", [20.0, 60.0, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_within_budget(route, dtype, clip):
    case = dataclasses.replace(ROUTES[route][0], dtype=dtype, clip=clip)
    out, dq, dk = solve(case)
    q, k = (x.double().numpy() for x in features(case))
    exact = Oracle(q, k, scale=float(np.float32(case.scale)), n_c=case.n_c, offset=case.offset, clip=clip)
    budget = Budget(exact, precision(BY_NAME[dtype], "cuda"))
    g = np.full(exact.nce.shape, 1.0 / exact.nce.size)
    d_square = 0.04 / (exact.n * exact.m)
    gradients = exact.gradients(exact.nce_coefficients(g, d_square))
    allowed = budget.nce_gradients(g, d_square, gradients)
    etas = {
        "pos": eta(out.pos.cpu(), exact.pos, budget.pos),
        "neg_lse": eta(out.rows["neg_lse"].cpu(), exact.neg_lse, budget.neg_lse),
        "square": eta(out.rows["square"].cpu(), exact.square, budget.square),
        "dq": eta(dq, gradients.dq, allowed.dq),
        "dk": eta(dk, gradients.dk, allowed.dk),
    }
    assert max(etas.values()) <= 1, etas


ADDED = (None, None, *(None,) * 5, False, "nce")  # labels of columns, a bias, no marks, optional statistics, the tail


def arguments(n=128, n_c=49, d=256, dtype=torch.bfloat16):
    g = torch.Generator(device="cuda").manual_seed(0)
    q, k = (torch.randn(rows, d, generator=g, device="cuda").to(dtype) for rows in (n, n * n_c))
    return (
        q,
        k,
        d**-0.5,
        None,
        n_c,
        1,
        0,
        20.0,
        None,
        -1,
        None,
        *ADDED,
        1 / (n * n_c),
        1e-8,
        True,
        True,
        True,
        256 * MIB,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_repeat(dtype):
    first = torch.ops.fused_nce.cuda_loss(*arguments(dtype=dtype))
    for _ in range(50):
        again = torch.ops.fused_nce.cuda_loss(*arguments(dtype=dtype))
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_graph_replays_on_new_inputs():
    """Captured after a warm-up, outputs poisoned, replayed on other inputs: what a plain call gives."""
    args = arguments()
    torch.ops.fused_nce.cuda_loss(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.fused_nce.cuda_loss(*args)
    args[0].copy_(args[0].flip(0).clone())
    for x in out:
        x.fill_(float("nan"))
    graph.replay()
    plain = torch.ops.fused_nce.cuda_loss(*args)
    assert all(torch.equal(x, y) for x, y in zip(out, plain, strict=True))


def test_another_stream_gives_the_same():
    args = arguments()
    plain = torch.ops.fused_nce.cuda_loss(*args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = torch.ops.fused_nce.cuda_loss(*args)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(out, plain, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_is_the_one_that_works():
    args = [x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in arguments()]
    assert torch.cuda.current_device() == 0
    plain = torch.ops.fused_nce.cuda_loss(*arguments())
    out = torch.ops.fused_nce.cuda_loss(*args)
    assert all(x.device.index == 1 for x in out)
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(out, plain, strict=True))


@pytest.mark.parametrize(("n", "n_c", "limit_mb"), [(128, 49, 256), (2048, 49, 64), (512, 400, 16)])
def test_memory_is_the_published_formula(n, n_c, limit_mb):
    """Peak above inputs and outputs. A first call leaves cuBLAS its workspace, which torch keeps."""
    args = (*arguments(n, n_c)[:-1], limit_mb * MIB)
    torch.ops.fused_nce.cuda_loss(*args)
    outputs = sum(x.nbytes for x in torch.ops.fused_nce.cuda_loss(*args))
    peak = peak_bytes(lambda: torch.ops.fused_nce.cuda_loss(*args)) - outputs
    q = args[0]
    with environment(FUSED_NCE_WORKSPACE_MB=str(limit_mb)):
        spec = dataclasses.replace(Case("cuda", "bfloat16", 0), n_c=n_c).spec
        published = cuda.workspace_bytes(spec, n, n * n_c, q.shape[1], 2, limit_mb * MIB)
    assert peak <= published + 16 * 1024, (peak, published)
    assert published <= limit_mb * MIB


def test_a_learnable_scale_is_never_read_on_the_host():
    args = arguments()
    scale = torch.tensor(0.05, device="cuda", requires_grad=True)
    q, k = (x.requires_grad_() for x in args[:2])
    amdim_nce(q, k.view(128, 49, -1), scale=scale, backend="cuda").loss.backward()
    assert scale.grad is not None
    assert scale.grad.isfinite()
    args = (q.detach(), k.detach(), 1.0, scale.detach(), *args[4:])
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # a synchronisation would raise
        torch.ops.fused_nce.cuda_loss(*args)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_the_upstream_gradient_meets_the_stash_on_the_device(upstream):
    """Without a wait, and without a pass over the gradients where it is 1."""
    q, k = (x.requires_grad_() for x in arguments()[:2])
    plain = torch.autograd.grad(amdim_nce(q, k.view(128, 49, -1), backend="cuda").loss, (q, k))
    out = amdim_nce(q, k.view(128, 49, -1), backend="cuda")
    found = torch.autograd.grad(out.loss, (q, k), torch.tensor(upstream, device="cuda"))
    for x, y in zip(found, plain, strict=True):
        assert torch.equal(x, y * upstream)


def test_an_amdim_step_shares_its_launches(monkeypatch):
    """Its four problems in one call, captured too, give what each gives by itself."""
    g = torch.Generator(device="cuda").manual_seed(0)
    views = [
        {f"f{s}": torch.randn(32, 256, s, s, generator=g, device="cuda").bfloat16().requires_grad_() for s in (1, 5, 7)}
        for _ in range(2)
    ]
    leaves = [x for view in views for x in view.values()]
    loss = AMDIMLoss(antecedents="all", backend="cuda")

    def step():
        out = loss(*views)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]

    together = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for x in replayed:
        x.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(replayed, together, strict=True))
    monkeypatch.setattr(engine, "LAUNCHES_COUNT_ON", ())
    for x, y in zip(together, step(), strict=True):
        assert (x.double() - y.double()).abs().max() <= 2**-7 * y.double().abs().max()


def test_the_model_chooses_it_for_wide_features():
    q, k = arguments(d=1024)[:2]
    amdim_nce(q, k.view(128, 49, -1))
    path = last_path()
    assert path is not None
    assert path.backend == "cuda"
