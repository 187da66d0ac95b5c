"""What a caller may rely on with every loss: derivatives served or refused, inputs left alone, threads, memory."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_nce.losses.registry import LOSSES
from tests.losses.poses import is_float, posed
from tests.losses.test_registry import FIRST, OPEN, able, grown, on
from tests.marks import nightly_but

# Banks may change before the backward; of triplets and pairs only the loss is differentiable.
NO_INPUTS_KEPT = ("moco_nce", "npid_softmax")


def loss_of(name, backend, only, seed=0, dtype=torch.float32):
    """(the loss as a function of one of its inputs, that input)."""
    entry, inputs, _ = posed(name, seed, dtype)
    still = {key: x.detach() if isinstance(x, Tensor) else x for key, x in inputs.items()}

    def loss(x: Tensor) -> Tensor:
        return entry.function(**(still | {only: x}), **on(entry, backend)).loss

    return loss, still[only]


# By one input of each loss, and nightly by every one on its own.
LEAVES = nightly_but(
    [(name, posed(name)[2][0]) for name in OPEN], [(name, key) for name in OPEN for key in posed(name)[2]]
)
# The row's dot products with its own hard negatives are torch's, and have every derivative on any backend.
OWN = ("own hard negatives, row weights", "own hard negatives, label smoothing", "several positives, hard negatives")
PLAIN_TORCH = [(f"info_nce/{name}", "hard_negatives") for name in OWN]

# ---- derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "only"), LEAVES)
def test_double_backward_is_served_or_refused_by_name(name, only, backend):
    """`chunked` serves it; tests/core/test_twice.py holds it to differences."""
    able(name, backend)
    loss, x = loss_of(name, backend, only)
    x = x.requires_grad_()
    if (backend == "chunked" and LOSSES[name].name not in NO_INPUTS_KEPT) or (name, only) in PLAIN_TORCH:
        (graphed,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (plain,) = torch.autograd.grad(loss(x), x)
        assert graphed.requires_grad
        torch.testing.assert_close(graphed.detach(), plain, rtol=1e-4, atol=1e-5)
        return
    with pytest.raises(RuntimeError, match=r"^fused_nce: double backward \(create_graph=True\) is not supported"):
        torch.autograd.grad(loss(x), x, create_graph=True)


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.vmap(f), (x[None],), (x[None],)),
    "grad of vmap": lambda f, x: torch.func.grad(lambda y: torch.vmap(f)(y).sum())(x[None]),
}


@pytest.mark.parametrize(("name", "only"), LEAVES)
def test_transforms_are_refused_by_name(name, only):
    """On the fastest backend: a derivative that is not there must not read as zero."""
    loss, x = loss_of(name, None, only)
    for transform in TRANSFORMS.values():
        with pytest.raises(RuntimeError, match=r"^fused_nce: (torch\.func\.grad|forward-mode)"):
            transform(loss, x)


@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize(("name", "only"), LEAVES)
def test_vmap_is_one_call_after_the_other(name, only, backend):
    """And its gradient: a tensor inside of a vmap says that it wants none."""
    able(name, backend)
    loss, x = loss_of(name, backend, only)
    several = torch.stack((x, 0.5 * x, 0.8 * x)).requires_grad_()
    upstream, results = torch.tensor([1.0, -2.0, 0.5]), []
    for values in (torch.vmap(loss)(several), torch.stack([loss(y) for y in several.unbind()])):
        results.append((values, torch.autograd.grad(values, several, upstream)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", nightly_but(["clip_loss"], ["info_nce", "clip_loss", "siglip_loss"]))
def test_compiled_vmap_drops_no_gradient(name):
    torch._dynamo.reset()
    loss, x = loss_of(name, None, posed(name)[2][0])
    several = torch.stack((x, 0.5 * x)).requires_grad_()
    compiled = torch.compile(torch.vmap(loss), fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(several).sum(), several)[0] for f in (torch.vmap(loss), compiled)]
    torch.testing.assert_close(*grads)


# ---- what a call leaves alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_retained_graph_gives_the_same_bits_and_nothing_is_written(name, backend):
    able(name, backend)
    entry, inputs, leaves = posed(name, 2, torch.float32)
    tensors = {key: x for key, x in inputs.items() if isinstance(x, Tensor)}
    before = {key: (x.detach().clone(), x._version) for key, x in tensors.items()}
    out = entry.function(**inputs, **on(entry, backend))
    upstream, wanted = torch.tensor(-2.5), [tensors[key] for key in leaves]
    first = torch.autograd.grad(out.loss, wanted, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    again = torch.autograd.grad(out.loss, wanted, upstream, retain_graph=True)
    last = torch.autograd.grad(out.loss, wanted, upstream)
    for ones in zip(first, kept, again, last, strict=True):
        assert all(torch.equal(ones[0], x) for x in ones[1:])
    assert (upstream.item(), upstream._version) == (-2.5, 0)
    for key, (value, version) in before.items():
        assert torch.equal(tensors[key], value), key
        assert tensors[key]._version == version, key


# What is finite of a number that is not: 1 / ∞ of a temperature, e^−∞ of a score or a variance, a column that is out.
FINITE = {
    *(("temperature", bad) for bad in (math.inf, -math.inf)),
    *(("data_scores", math.inf), ("noise_scores", -math.inf), ("log_kq_data", -math.inf), ("log_kq_noise", math.inf)),
    *(("logvar", math.inf), ("product", -math.inf), ("column_bias", -math.inf)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_number_is_never_hidden(name, backend):
    """Of any tensor of any loss: neither in the value nor, where scores are the engine's, in the gradient."""
    able(name, backend)
    entry, inputs, leaves = posed(name, 0, torch.float32)
    for key, x in inputs.items():
        for i, y in enumerate(x if isinstance(x, tuple) else (x,)):
            for bad in (math.nan, math.inf, -math.inf):
                if not is_float(y) or (key, bad) in FINITE:
                    continue
                z = y.detach().clone()
                z.view(-1)[min(1, z.numel() - 1)] = bad
                z.requires_grad_(key in leaves)
                given = (*x[:i], z, *x[i + 1 :]) if isinstance(x, tuple) else z
                try:
                    loss = entry.function(**inputs | {key: given}, **on(entry, backend)).loss
                except ValueError as refusal:  # of weights, which are read
                    assert str(refusal).startswith(f"{key}: got"), refusal  # noqa: PT017
                    continue
                assert not loss.isfinite(), (key, i, bad)
                if key in leaves and z.dim() == 2 and not entry.closed:
                    assert not torch.autograd.grad(loss, z)[0].isfinite().all(), (key, bad)


# ---- threads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [40, pytest.param(200, marks=pytest.mark.nightly)])
def test_eight_threads_of_mixed_losses_equal_one(calls):
    """Each thread runs every loss in its turn, all eight at different places of the list."""
    torch.set_num_threads(1)
    names = list(LOSSES)

    def once(name):
        entry, inputs, leaves = posed(name, 1, torch.float32)
        loss = entry.function(**inputs).loss
        return loss, *torch.autograd.grad(3 * loss, [inputs[key] for key in leaves])

    expected = {name: once(name) for name in names}

    def work(number):
        for i in range(calls):
            name = names[(i + 3 * number) % len(names)]
            assert all(map(torch.equal, once(name), expected[name])), name

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


# ---- memory -----------------------------------------------------------------------------------------------------


def step(name, backend, copies):
    """A function that is one training step."""
    entry, inputs, leaves = grown(name, copies)

    def run() -> None:
        out = entry.function(**inputs, **on(entry, backend))
        torch.autograd.grad(2 * out.loss, [inputs[key] for key in leaves])

    return run


@pytest.mark.parametrize("name", nightly_but(FIRST, LOSSES))
def test_a_step_frees_all_that_it_takes(name, backend):
    able(name, backend)
    run = step(name, backend, 2)
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(3):
            run()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) > 0
    assert sum(sizes) == 0


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOSSES)
def test_two_thousand_steps_do_not_grow(name):
    """A leaked gradient would be at least 5 kB a step, 10 MB in all, and as much again the next time."""
    run = step(name, None, 64)
    for _ in range(200):
        run()
    grown_bytes: list[int] = []
    while len(grown_bytes) < 3 and min(grown_bytes, default=1 << 30) > 2 << 20:  # the heap itself may settle late
        before = resident_bytes()
        for _ in range(2000):
            run()
        grown_bytes.append(resident_bytes() - before)
    assert min(grown_bytes) <= 2 << 20, grown_bytes
