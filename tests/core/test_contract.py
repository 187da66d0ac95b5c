"""What a caller may rely on beside the numbers: upstream gradients, untouched inputs, layouts, precisions, refusals."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from fused_nce import tile_stats
from fused_nce.core.spec import Block, Spec, TanhClip
from tests.budget import Budget, eta, precision
from tests.conftest import why_not
from tests.core.problems import N_C, SCALE, SPEC, D, N, features, grads_of, run
from tests.layouts import LAYOUTS
from tests.oracle import Oracle

# ---- upstream gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [lambda out: 3 * out.loss, lambda out: 2 * out.nce - out.penalty], ids=["loss", "parts"])
def test_a_retained_graph_gives_the_same_bits_and_so_does_its_release(backend, of):
    """The release may scale the stash in place; what was handed out before must not change."""
    q, k = features()
    f = of(run(backend, q, k))
    first = grads_of(f, q, k, retain_graph=True)
    copies = [g.clone() for g in first]
    second = grads_of(f, q, k, retain_graph=True)
    for ones in zip(first, copies, second, grads_of(f, q, k), strict=True):
        assert all(torch.equal(ones[0], x) for x in ones[1:])


def test_a_second_backward_without_the_graph_is_refused(backend):
    q, k = features()
    out = run(backend, q, k)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_zero_upstream_gives_exactly_zero(backend, reduction):
    q, k = features()
    out = run(backend, q, k, reduction)
    for f in (0 * out.loss, 0 * out.nce.sum() + 0 * out.penalty):
        for g in grads_of(f, q, k, retain_graph=True):
            assert torch.equal(g, torch.zeros_like(g))


def test_expanded_upstream(backend):
    """A stride-0 gradient, as `sum` and `mean` hand it down, equals the dense one."""
    q, k = features()
    out = run(backend, q, k, "none")
    upstream = torch.tensor(0.7).expand_as(out.nce)
    dense = grads_of(out.nce, q, k, grad_outputs=upstream.contiguous(), retain_graph=True)
    stride_0 = grads_of(out.nce, q, k, grad_outputs=upstream)
    for a, b in zip(dense, stride_0, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "stepped", "misaligned"])
def test_strided_upstream(backend, layout):
    q, k = features()
    out = run(backend, q, k, "none")
    upstream = torch.randn_like(out.nce)
    laid = LAYOUTS[layout](upstream)
    found = tile_stats(q, k, SPEC, scale=0.2, backend=backend)
    for x in (out.nce, found["pos"]):
        dense = grads_of(x, q, k, grad_outputs=upstream, retain_graph=True)
        strided = grads_of(x, q, k, grad_outputs=laid, retain_graph=True)
        for a, b in zip(dense, strided, strict=True):
            assert torch.equal(a, b)
    assert torch.equal(laid, upstream)


def test_upstream_is_not_written_to(backend):
    q, k = features()
    out = run(backend, q, k, "none")
    ups = [torch.full_like(x, 3.0) for x in out[:3]]
    torch.autograd.backward(out[:3], ups)
    for g in ups:
        assert g._version == 0
        assert torch.equal(g, torch.full_like(g, 3.0))


def test_outputs_are_not_written_to_by_backward(backend):
    q, k = features()
    out = run(backend, q, k)
    before = [x.detach().clone() for x in (*out[:3], out.pos, *out.rows.values())]
    (5 * out.loss).backward()
    after = (*out[:3], out.pos, *out.rows.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_one_tensor_as_both_inputs(backend):
    """k = q: the gradient is the sum of both sides', and one input into two losses adds up."""
    x, _ = features(6)
    spec = Spec(Block(2, 2), TanhClip(20.0))
    (both,) = torch.autograd.grad(run(backend, x, x, spec=spec).loss, x)
    q, k = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    dq, dk = grads_of(run(backend, q, k, spec=spec).loss, q, k)
    torch.testing.assert_close(both, dq + dk)
    (run(backend, q, k, spec=spec).loss + run(backend, q, k, spec=spec).loss).backward()
    torch.testing.assert_close(q.grad, 2 * dq)


def test_two_backwards_accumulate(backend):
    q, k = features()
    dq, _ = grads_of(run(backend, q, k).loss, q, k)
    for _ in range(2):
        run(backend, q, k).loss.backward()
    assert torch.equal(q.grad, dq + dq)


def test_gradients_of_non_leaves(backend):
    """Through a projection: the op's gradients enter torch's like any other."""
    q, k = features()
    w = torch.eye(D).requires_grad_()
    run(backend, q @ w, k @ w).loss.backward()
    dq, dk = grads_of(run(backend, q, k).loss, q, k)
    torch.testing.assert_close(w.grad, q.detach().T @ dq + k.detach().T @ dk, rtol=1e-5, atol=1e-7)


# ---- layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_does_not_matter(backend, layout, dtype):
    """The C++ kernels tile every layout alike. BLAS may take another path, so for it the budget is the measure."""
    plain = [x.detach() for x in features(dtype=dtype)]
    if layout == "expanded":
        plain = [x[:1].expand_as(x).contiguous() for x in plain]
    results = []
    for q, k in (plain, [LAYOUTS[layout](x) for x in plain]):
        q, k = q.requires_grad_(), k.requires_grad_()
        out = run(backend, q, k)
        results.append((out, grads_of(out.loss, q, k)))
    (dense, dense_grads), (strided, strided_grads) = results
    exact = Oracle(*(x.detach().double().numpy() for x in plain), scale=SCALE, n_c=N_C, clip=20.0)
    budget = Budget(exact, precision(dtype, backend))
    g = np.full((N, N_C), 1 / (N * N_C))
    d_square = 0.04 / (N * N * N_C)
    gradients = exact.gradients(exact.nce_coefficients(g, d_square))
    allowed = budget.nce_gradients(g, d_square, gradients)
    if backend == "cpu":  # its own tiling, the same for every layout
        assert torch.equal(dense.loss, strided.loss)
        assert all(torch.equal(a, b) for a, b in zip(dense_grads, strided_grads, strict=True))
    for grad, value, error in zip(strided_grads, gradients[:2], allowed[:2], strict=True):
        assert eta(grad, value, error) <= 1


# ---- precision --------------------------------------------------------------------------------------------------


def test_float16_at_a_grad_scalers_upstream(backend):
    """2^16 times a gradient that float16 alone would flush: the stash is float32, cast after the multiply."""
    if why_not(backend, torch.float16):
        pytest.skip(f"{backend}: {why_not(backend, torch.float16)}")
    q, k = features(64, 5, 32, torch.float16)
    spec = Spec(Block(5), TanhClip(20.0))
    out = run(backend, q, k, spec=spec)
    dq, dk = grads_of(65536 * out.loss, q, k)
    exact = Oracle(q.detach().double(), k.detach().double(), scale=SCALE, n_c=5, clip=20.0)
    budget = Budget(exact, precision(torch.float16, backend))
    g, d_square = np.full((64, 5), 65536 / 320), 65536 * 0.04 / (64 * 320)
    gradients = exact.gradients(exact.nce_coefficients(g, d_square))
    allowed = budget.nce_gradients(g, d_square, gradients)
    assert eta(dq, gradients.dq, allowed.dq) <= 1
    assert eta(dk, gradients.dk, allowed.dk) <= 1


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_autocast(backend, dtype, inputs, inside):
    """Both inputs cast as `matmul` would; loss float32; gradients in the inputs' dtype, equal to casting by hand."""
    q, k = (x.detach().to(d).requires_grad_() for x, d in zip(features(), inputs, strict=True))
    with torch.autocast("cpu", dtype=dtype):
        out = run(backend, q, k)
        if inside:
            out.loss.backward()
    if not inside:
        out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert (q.grad.dtype, k.grad.dtype) == inputs
    a, b = q.detach().clone().requires_grad_(), k.detach().clone().requires_grad_()
    by_hand = run(backend, a.to(dtype), b.to(dtype))
    by_hand.loss.backward()
    assert torch.equal(out.loss, by_hand.loss)
    assert torch.equal(q.grad, a.grad)
    assert torch.equal(k.grad, b.grad)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["loss", "nce", "stats"])
def test_double_backward_is_refused_by_name(backend, entry):
    if backend == "chunked":
        pytest.skip("it has one: tests/core/test_twice.py")
    q, k = features()
    out = (
        tile_stats(q, k, SPEC, backend=backend)["neg_lse"].sum()
        if entry == "stats"
        else getattr(run(backend, q, k), entry)
    )
    with pytest.raises(RuntimeError, match=r"fused_nce: double backward.*backend='chunked' has one"):
        torch.autograd.grad(out, q, create_graph=True)


def jvp(f):
    return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("transform", [jvp, torch.func.grad, torch.func.jacrev, torch.func.hessian])
@pytest.mark.parametrize("entry", ["loss", "stats"])
def test_function_transforms_are_refused_by_name(backend, entry, transform):
    q, k = (x.detach() for x in features())

    def f(x):
        found = run(backend, x, k).loss if entry == "loss" else tile_stats(x, k, SPEC, backend=backend)["neg_lse"].sum()
        return found

    with pytest.raises(RuntimeError, match=r"fused_nce: (torch\.func\.grad|forward-mode)"):
        transform(f)(q)


def test_batched_upstream_is_each_upstream_or_refused_by_name(backend):
    q, k = features()
    out = run(backend, q, k)
    (both,) = torch.autograd.grad(out.loss, q, torch.tensor([1.0, -3.0]), is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(out.loss, q, retain_graph=True)
    torch.testing.assert_close(both, torch.stack((one, -3 * one)))
    with pytest.raises(RuntimeError, match="fused_nce: batched upstream"):
        torch.autograd.grad(out.nce, q, torch.ones(2), is_grads_batched=True)


# ---- memory -----------------------------------------------------------------------------------------------------


def test_no_reference_cycle(backend):
    """Without the cycle collector, everything dies with its last name."""
    gc.collect()
    gc.disable()
    try:
        q, k = features()
        out = run(backend, q, k)
        refs = [weakref.ref(x) for x in (q, k, out.loss, out.pos)]
        (2 * out.loss).backward()
        del q, k, out
        assert [ref() for ref in refs] == [None] * 4
        q, k = features()
        found = tile_stats(q, k, SPEC, backend=backend)
        refs = [weakref.ref(q), weakref.ref(found["neg_lse"])]
        found["neg_lse"].sum().backward()
        del q, k, found
        assert [ref() for ref in refs] == [None] * 2
    finally:
        gc.enable()


def test_the_graph_holds_no_scores(backend):
    """Between forward and backward only inputs, statistics and the stash are alive."""
    q, k = features(32, 3, 4)
    saved = []

    def note(x):
        saved.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = run(backend, q, k)
    assert 0 < sum(saved) <= 2 * (q.numel() + k.numel()) + 32 * 3 + 3 * 32 + 4
    assert out.loss.isfinite()
