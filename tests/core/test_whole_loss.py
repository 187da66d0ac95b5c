"""The loss as one function of the `cpu` backend (csrc/loss.cpp) against the operators in Python: the same numbers."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_nce import amdim_nce, info_nce, last_path, moco_nce, nt_xent, sup_con
from fused_nce.backends import cpu
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.spec import Bias, Block, Hardness, Identity, Index, Separate, Spec, TanhClip
from fused_nce.core.statistics import KERNEL_STATISTICS
from fused_nce.core.tails import KERNEL_TAILS, Nce
from fused_nce.losses.registry import LOSSES, Size
from tests.conftest import MODULE, needs_kernels
from tests.losses.poses import cast

pytestmark = needs_kernels

SIZES = (Size(n=2, m=3, d=4, p=2), Size(n=33, m=70, d=24, p=9))


@pytest.fixture
def served(monkeypatch):
    """Whether the calls since the last look were served by the one function; `.off()` leaves all to the operators."""
    calls, whole = [], cpu.whole_loss

    def listen(*arguments):
        found = whole(*arguments)
        calls.append(found is not None)
        return found

    class Served:
        def __call__(self):
            found, calls[:] = list(calls), []
            return found

        def off(self):
            monkeypatch.setattr(cpu, "whole_loss", None)

        def on(self):
            monkeypatch.setattr(cpu, "whole_loss", listen)

    served = Served()
    served.on()
    return served


def outcome(entry, seed, size, dtype, factors):
    """All that a loss gives, and the gradients of a sum of its parts."""
    made = cast(entry.example(seed, size), dtype)
    leaves = {name: x.requires_grad_() for name, x in entry.differentiable(made).items()}
    out = entry.function(**made)
    parts = (out.loss, out.nce.sum(), out.penalty)
    total = sum(f * x for f, x in zip(factors, parts, strict=True) if f and x.requires_grad)
    grads = torch.autograd.grad(total, tuple(leaves.values()), allow_unused=True)
    named = {"loss": out.loss, "nce": out.nce, "penalty": out.penalty, **out.stats}
    return {name: x.detach() for name, x in named.items()}, dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if not entry.closed])
def test_the_same_bits_as_the_operators(name, dtype, served):
    """Of every loss, on random problems, at an upstream gradient of 1 and of another; the same refusals too."""
    entry, used = LOSSES[name], []
    for seed in range(3):
        for size in SIZES:
            for factors in ((1.0, 0.0, 0.0), (-0.37, 0.0, 0.0)):
                served.on()
                values, grads = outcome(entry, seed, size, dtype, factors)
                used += served()
                served.off()
                exact, wanted = outcome(entry, seed, size, dtype, factors)
                assert values.keys() == exact.keys()
                for key, x in exact.items():
                    assert torch.equal(values[key], x), (key, values[key], x)
                for key, x in wanted.items():
                    assert (x is None) == (grads[key] is None)
                    if x is not None and key in entry.two_paths:
                        near = 4 * torch.finfo(dtype).eps
                        torch.testing.assert_close(grads[key], x, rtol=near, atol=near)
                    elif x is not None:
                        torch.testing.assert_close(grads[key], x, rtol=1e-6, atol=0 if x.dim() else 1e-6)
    expected = {"amdim_nce", "info_nce", "clip_loss", "nt_xent", "moco_nce", "siglip_loss", "sup_con", "npid_softmax"}
    choices = (entry.name == "info_nce" and entry.paths > 1) or any(word in name for word in ("margin", "guide"))
    assert entry.name not in expected or choices or (used and all(used))


@pytest.mark.parametrize("name", [name for name, entry in LOSSES.items() if not entry.closed])
def test_the_report_is_plain_torchs(name):
    """Which the operators share with the one function."""
    entry = LOSSES[name]
    example = entry.example(1, SIZES[1])
    made = {
        key: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in example.items()
    }
    found, wanted = (entry.function(**made, backend=backend).stats for backend in (None, "chunked"))
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        torch.testing.assert_close(found[key], x, rtol=1e-4, atol=1e-5, msg=key)


def test_normalised_rows_are_those_of_the_operators(served):
    """A fused norm is not torch's to the last bit; a row of zeros stays, and has a gradient."""
    draw = torch.Generator().manual_seed(0)
    a, b, q = (torch.randn(n, 40, generator=draw) for n in (17, 17, 50))
    a[3] = 0.0
    ids, found = torch.arange(17) % 5, []
    for on in (True, False):
        served.on() if on else served.off()
        for call in (
            lambda x, y: info_nce(x, y, normalize=True, temperature=0.3),
            lambda x, y: info_nce(x, y, normalize=True, symmetric=True, penalty=0.1, clip=4.0),
            lambda x, y: nt_xent(x, y),
            lambda x, y: moco_nce(x, y, q),
            lambda x, y: sup_con(x, ids),
        ):
            x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
            loss = call(x, y).loss
            found.append((loss.detach(), *torch.autograd.grad(loss * 3.0, (x, y), allow_unused=True)))
    half = len(found) // 2
    for one, two in zip(found[:half], found[half:], strict=True):
        torch.testing.assert_close(one, two, rtol=3e-5, atol=1e-6)


def problem(**options):
    draw = torch.Generator().manual_seed(1)
    q, k = (torch.randn(n, 12, generator=draw).requires_grad_() for n in (6, 18))
    return (q, k), tile_loss(q, k, Spec(Block(3), TanhClip(4.0)), Nce(0.3, **options), scale=0.5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_each_part_has_its_own_gradient(reduction, served):
    """`nce` and `penalty`, alone and together with the loss: the scores are computed again."""
    for part in ("nce", "penalty", "both"):
        found = []
        for on in (True, False):
            served.on() if on else served.off()
            leaves, out = problem(reduction=reduction)
            weights = torch.linspace(-1, 2, out.nce.numel()).view(out.nce.shape)
            terms = {"nce": (weights * out.nce).sum(), "penalty": 2.0 * out.penalty}
            total = terms[part] if part in terms else terms["nce"] + terms["penalty"] - 0.5 * out.loss
            found.append(torch.autograd.grad(total, leaves, allow_unused=True))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_the_graph_may_be_kept_and_is_refused_what_it_cannot_do(served):
    leaves, out = problem()
    one = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    two = torch.autograd.grad(out.loss, leaves, torch.tensor(2.0), retain_graph=True)
    batched = torch.autograd.grad(out.loss, leaves, torch.tensor([1.0, 3.0]), is_grads_batched=True, retain_graph=True)
    for x, y, z in zip(one, two, batched, strict=True):
        assert torch.equal(2 * x, y)
        assert torch.equal(torch.stack((x, 3 * x)), z)
    with pytest.raises(RuntimeError, match=r"double backward \(create_graph=True\) is not supported"):
        torch.autograd.grad(out.loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="batched upstream gradients"):
        torch.autograd.grad(out.nce, leaves, torch.ones(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(out.loss, leaves)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.loss, leaves)
    assert served() == [True]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(4, 8), torch.randn(4, 8))
        with pytest.raises(RuntimeError, match="forward-mode"):
            info_nce(dual, torch.randn(4, 8))
    assert served() == [False]


def test_an_input_that_has_changed_is_noticed(served):
    leaves, out = problem()
    with torch.no_grad():
        leaves[1].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.penalty, leaves)
    queries, queue = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    out = moco_nce(queries, torch.randn(4, 8), queue)
    queue.zero_()  # a bank may change: the gradients have left with the forward
    (grad,) = torch.autograd.grad(out.loss, queries)
    assert grad.abs().sum() > 0
    assert served() == [True, True]


def test_what_is_not_plain_is_left_to_the_operators(served):
    """With the same result, or the operators' own message."""
    a, k = torch.randn(4, 8), torch.randn(4, 8)
    value = info_nce(a, k).loss
    assert served() == [True]
    assert last_path() == ("cpu", "")
    assert torch.equal(info_nce(a, k, backend="cpu").loss, value)
    assert last_path() == ("cpu", "requested")
    served()

    class Mine(torch.Tensor):
        pass

    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        info_nce(a, k)
    assert counter.get_total_flops() == 2 * 4 * 4 * 8
    torch.testing.assert_close(info_nce(a.as_subclass(Mine), k).loss.as_subclass(torch.Tensor), value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        info_nce(a, k)
    torch.testing.assert_close(torch.vmap(lambda x: info_nce(x, k).loss)(a[None]), value[None])
    assert not any(served())
    for bad, error in ((torch.randn(4, 9), "width D"), (torch.randn(0, 8), "N >= 1"), (k.double(), "torch.float64")):
        with pytest.raises((ValueError, TypeError), match=error):
            info_nce(a, bad)
    with pytest.raises(ValueError, match=r"^targets: got 4"):
        info_nce(a, k, torch.tensor([0, 1, 2, 4]))
    with pytest.warns(UserWarning, match="one image has no negatives"):
        info_nce(a[:1], k[:1])
    assert not any(served())


def test_numbers_that_are_not_finite_show(served):
    for bad in (float("nan"), float("inf")):
        a, k = torch.randn(5, 8), torch.randn(5, 8)
        a[2, 3] = bad
        for call in (
            info_nce,
            lambda x, y: amdim_nce(x, y[:, None]),
            nt_xent,
            lambda x, y: info_nce(x, y, symmetric=True),
        ):
            x, y = a.clone().requires_grad_(), k.clone().requires_grad_()
            out = call(x, y)
            (grad,) = torch.autograd.grad(out.loss, x)
            assert out.loss.isnan()
            assert grad[2].isnan().all()
    assert all(served())


def test_the_same_bits_for_any_number_of_threads(served):
    draw = torch.Generator().manual_seed(5)
    a, k = (torch.randn(700, 48, generator=draw) for _ in range(2))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        x, y = a.clone().requires_grad_(), k.clone().requires_grad_()
        out = info_nce(x, y, symmetric=True, normalize=True, penalty=0.1)
        found.append((*torch.autograd.grad(out.loss, (x, y)), out.loss.detach(), *out.stats.values()))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    assert all(served())


def test_a_checkpoint_and_hooks_see_it(served):
    a, k = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    (plain,) = torch.autograd.grad(info_nce(a, k).loss, a)
    (again,) = torch.autograd.grad(checkpoint(lambda x: info_nce(x, k).loss, a, use_reentrant=False), a)
    assert torch.equal(plain, again)
    packed: list[torch.Tensor] = []

    def pack(x):
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = info_nce(a, k)
    assert torch.equal(torch.autograd.grad(out.loss, a)[0], plain)
    assert packed


def test_a_bias_has_its_gradient_without_optional_statistics():
    """Beside separate positives, whose scores it moves too, and of each statistic by itself."""
    draw = torch.Generator().manual_seed(2)
    q, k, pos = (torch.randn(*shape, generator=draw) for shape in ((5, 6), (9, 6), (5, 2)))
    for backend in ("cpu", "reference"):
        bias = torch.tensor(0.3, requires_grad=True)
        loss = tile_loss(q, k, Spec(Separate(2), Bias()), Nce(), bias=bias, positives=pos, backend=backend).loss
        assert abs(torch.autograd.grad(loss, bias)[0]) < 1e-6
        out = tile_stats(q, k[:5], Spec(Block(1), Bias()), bias=bias, backend=backend)
        assert torch.autograd.grad(out["pos"].sum() + 2 * out["neg_lse"].sum(), bias)[0] == pytest.approx(
            15.0, rel=1e-6
        )


def test_the_kernels_know_the_names_in_the_same_order():
    statistics, tails = MODULE.names()
    assert tuple(statistics) == KERNEL_STATISTICS
    assert tails == [tail.NAME for tail in KERNEL_TAILS]


def test_a_call_passes_few_functions():
    """Forward and backward, counted as a profiler sees them; prefixes bring their own checks, and no torch."""
    a, c = torch.randn(2, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    calls: list[str] = []
    for call, most in (
        (lambda: amdim_nce(a, c), 80),
        (lambda: info_nce(a, c[:, 0], normalize=True), 70),
        (lambda: info_nce(a, c[:, 0], prefixes=(2, 3, 5, 8)), 105),
    ):
        for _ in range(2):  # the first fills the caches
            calls.clear()
            sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
            try:
                call().loss.backward()
            finally:
                sys.setprofile(None)
        assert 5 < len(calls) <= most, calls


def test_prefixes_are_served(served):
    """As the operators have them: what a tail and a layout may be, one tensor in both roles, parts by themselves."""
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randn(n, 24, generator=draw) for n in (70, 70, 90)]
    targets, widths, weights = torch.randint(90, (70,), generator=draw), (3, 16, 20), (0.5, 1.0, 2.0)
    transforms: tuple[Any, ...] = (Identity(), TanhClip(2.0), Hardness(3.0))
    every = itertools.product(transforms, ("mean", "sum", "none"), (0, 1, 2), (torch.float32, torch.bfloat16))
    for transform, reduction, other, dtype in every:
        tail = Prefixed(0.0, reduction, 0.5, widths, weights)
        spec = Spec(Index() if other == 2 else Block(1), transform, tail.stats, prefixes=widths)
        found = []
        for on in (True, False):
            served.on() if on else served.off()
            q, k = (rows[i].to(dtype).requires_grad_() for i in (0, other))
            scale = torch.tensor(5.0, requires_grad=True)
            how: dict[str, Any] = {"row_ids": targets if other == 2 else None, "report_groups": 2}
            out = tile_loss(q, k if other else None, spec, tail, scale=scale, **how)
            leaves = (q, k, scale) if other else (q, scale)
            by_loss = torch.autograd.grad(out.loss * 3.0, leaves, retain_graph=True)
            by_part = torch.autograd.grad(
                (out.nce * torch.linspace(-1, 2, out.nce.numel()).view_as(out.nce)).sum(), leaves
            )
            found.append((out.loss, out.nce, *out.report.values(), out.pos, *out.rows.values(), *by_loss, *by_part))
        for ours, theirs in zip(*found, strict=True):
            near = 1e-2 if ours.dtype == torch.bfloat16 else 2e-6
            torch.testing.assert_close(ours, theirs, rtol=near, atol=near * float(theirs.detach().abs().max()))
    assert served() == [True] * 54


def test_rows_that_are_divided_on_the_way(monkeypatch, served):
    """Where unit rows of all would be more than the workspace's fourth: the same numbers, within a few roundings."""
    cases = (
        (200, 40, "1.2", {"temperature": 0.1}),
        (200, 40, "1.2", {"temperature": 0.01, "penalty": 0.1, "symmetric": True}),
        (333, 1024, "8", {"temperature": 0.1, "symmetric": True}),
        (333, 1024, "3", {"clip": 5.0, "targets": torch.arange(333).flip(0)}),
    )
    for n, d, workspace_mb, options in cases:
        g = torch.Generator().manual_seed(n)
        q, k = (3 * torch.randn(n, d + 3, generator=g))[:, 1 : d + 1], torch.randn(n, d, generator=g)
        q[3], k[5] = 0.0, 1e-15 * k[5]  # a norm of 0, and one below the least
        found = []
        for dtype, mb in ((torch.float64, "16"), (torch.float32, "256"), (torch.float32, workspace_mb)):
            monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", mb)
            leaves = [x.to(dtype).requires_grad_() for x in (q, k)]
            out = info_nce(*leaves, normalize=True, **options)
            found.append([out.loss, *torch.autograd.grad(out.loss, leaves), *out.stats.values()])
        assert served() == [False, True, True]  # no float64
        for exact, whole, divided in zip(*found, strict=True):
            for x in (whole, divided):
                finite = exact.isfinite()
                assert torch.equal(x.isfinite(), finite)
                error = torch.where(finite, x - exact, 0.0).abs()
                # a norm below the least makes a gradient that much larger, row by row
                assert (error <= 4e-6 * torch.where(finite, exact, 0.0).abs().amax(-1, keepdim=True) + 1e-9).all()
