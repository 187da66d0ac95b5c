"""What torch asks of every loss: its own checks of the ops, one graph for all batch sizes, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

from fused_nce import MemoryQueue, clip_loss, cpc_nce, info_nce, moco_nce, npid_softmax, triplet_margin
from fused_nce.losses.registry import LOSSES
from tests.losses.poses import is_float, posed, widened
from tests.losses.test_registry import FIRST, grown
from tests.marks import nightly_but

OPEN = [name for name, entry in LOSSES.items() if not entry.closed]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# ---- torch's checks ---------------------------------------------------------------------------------------------


def calls(name, seed, dtype, monkeypatch):
    """(op, arguments) of what a loss hands to the ops, tensors as leaves; by the fastest backend and by plain torch."""
    entry, inputs, _ = posed(name, seed, dtype)
    found = []
    for op in ("stats", "loss"):
        packet = getattr(torch.ops.fused_nce, op)

        def note(*arguments, packet=packet):
            leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in arguments]
            found.append((packet.default, tuple(leaves)))
            return packet(*arguments)

        monkeypatch.setattr(torch.ops.fused_nce, op, note)
    entry.function(**inputs, backend="chunked" if seed else None)
    monkeypatch.undo()
    return found


SAMPLES = [(name, seed, dtype) for name in OPEN if name != "npid_nce" for seed in range(3) for dtype in DTYPES]
assert len(SAMPLES) >= 200


@pytest.mark.parametrize(("name", "seed", "dtype"), nightly_but(SAMPLES[7::66], SAMPLES))
def test_opcheck(name, seed, dtype, monkeypatch):
    found = calls(name, seed, dtype, monkeypatch)
    assert found
    for op, arguments in found:
        torch.library.opcheck(op, arguments)


# ---- torch.compile ----------------------------------------------------------------------------------------------

COPIES = (2, 3, 1, 5, 8, 4, 11, 6, 9, 7)  # of the example's batch


def assert_two_graphs(plain, twin, batches):
    """No break, at most two compiles, and the same numbers as eager; of (inputs, leaves) batches."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for inputs, leaves in batches:
        results = []
        for function in (plain, compiled):
            value = function(**inputs)
            results.append((value, *torch.autograd.grad(value, [inputs[key] for key in leaves])))
        for eager, found in zip(*results, strict=True):
            torch.testing.assert_close(found, eager, rtol=1e-6, atol=1e-7)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("name", nightly_but(["info_nce"], LOSSES))
def test_two_graphs_at_most_for_ten_batch_sizes(name):
    entry = LOSSES[name]

    def loss(**inputs: Any) -> Tensor:
        return entry.function(**inputs).loss

    assert_two_graphs(loss, loss, [grown(name, copies)[1:] for copies in COPIES])


X, Y = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(6)
CHANGING = {  # a number among the settings
    "info_nce": lambda x, y, t: info_nce(x, y, IDS, temperature=t, penalty=t, clip=9 * t, symmetric=True),
    "info_nce, further": lambda x, y, t: info_nce(x, y, false_negative_margin=t, label_smoothing=t, max_scale=t),
    "clip_loss": lambda x, y, t: clip_loss(x, y, t, tau_plus=t),
    "cpc_nce": lambda x, y, t: cpc_nce(x[None], y[None], weights=[t]),
    "npid_softmax": lambda x, y, t: npid_softmax(x, y, IDS, temperature=t, proximal=t),
    "triplet_margin": lambda x, y, t: triplet_margin(x, IDS // 2, margin=t),
}


@pytest.mark.parametrize("name", nightly_but(["info_nce"], CHANGING))
def test_settings_may_be_symbols(name):
    """One compiled function, without a break, for numbers that change."""
    torch._dynamo.reset()
    loss = CHANGING[name]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in (0.2, 0.3):
        torch.testing.assert_close(compiled(X, Y, t).loss, loss(X, Y, t).loss)


class Step(nn.Module):
    """A MoCo step: the loss, then its keys into the queue."""

    def __init__(self):
        super().__init__()
        self.queue = MemoryQueue(23, 5)

    def forward(self, queries, keys):
        """The loss."""
        loss = moco_nce(queries, keys, self.queue.keys, temperature=0.2).loss
        self.queue.update(nn.functional.normalize(keys, dim=1))
        return loss


def test_two_graphs_at_most_for_a_step_with_its_queue():
    """Which holds the same keys then; of a batch of 7 and a batch of 77, in 23 places."""
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        steps.append(Step())
    batches = []
    for copies in COPIES:
        queries, keys = torch.randn(2, 7 * copies, 5)
        batches.append(({"queries": queries.requires_grad_(), "keys": keys}, ["queries"]))
    plain, twin = steps
    assert_two_graphs(plain, twin, batches)
    held = twin.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(held[key], value)


# ---- the meta device --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", nightly_but(FIRST, LOSSES))
def test_shapes_without_numbers(name):
    """On the meta device, which has no autocast to ask for."""
    entry, inputs, leaves = posed(name, 0, torch.float32)
    there = pytree.tree_map_only(Tensor, lambda x: x.detach().to("meta").requires_grad_(x.requires_grad), inputs)
    here, found = (entry.function(**x).loss for x in (inputs, there))
    assert (found.is_meta, found.shape, found.dtype) == (True, here.shape, here.dtype)
    for key, gradient in zip(leaves, torch.autograd.grad(found, [there[key] for key in leaves]), strict=True):
        assert gradient.shape == inputs[key].shape


# ---- autocast ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "one is narrow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast(name, dtype, mixed):
    """The loss float32, gradients in the inputs' dtype; off by no more than rounding every input once and again may.

    To first order that is 2u·Σ |dL/dx·x|; twice that allows for the second order at u = 2^-8.
    """
    entry, inputs, leaves = posed(name, 0, torch.float32)
    narrow = [key for key in leaves if inputs[key].dim()][-1]
    if mixed:
        inputs[narrow] = inputs[narrow].detach().to(dtype).requires_grad_()
    wide = widened(inputs, list(inputs))
    floats = [x for x in wide.values() if is_float(x)]
    exact = entry.oracle(**wide)
    slopes = torch.autograd.grad(exact, floats, allow_unused=True, materialize_grads=True)
    with torch.autocast("cpu", dtype=dtype):
        loss = entry.function(**inputs).loss
    grads = torch.autograd.grad(loss, [inputs[key] for key in leaves])
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [inputs[key].dtype for key in leaves]
    assert all(bool(g.isfinite().all()) for g in grads)
    u, moved = torch.finfo(dtype).eps / 2, sum((g * x).abs().sum() for g, x in zip(slopes, floats, strict=True))
    assert (loss.double() - exact).abs() <= 4 * u * moved + 2**-18 * (1 + exact.abs())


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_leaves_float64_alone(name):
    """Its bits, and those of its gradients."""
    entry, inputs, leaves = posed(name)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = entry.function(**inputs).loss
        found.append((loss, *torch.autograd.grad(loss, [inputs[key] for key in leaves])))
    for plain, under in zip(*found, strict=True):
        assert plain.dtype == torch.float64
        assert torch.equal(plain, under)


@pytest.mark.parametrize("name", OPEN)
def test_autocast_makes_no_pair_of_float64_and_another(name):
    """As `torch.matmul` does not: rounding one of the two would be silent. A frozen bank has a dtype of its own."""
    entry, inputs, leaves = posed(name, 0, torch.float32)
    pairs = [key for key in leaves if inputs[key].dim() > 1]
    for key in pairs if len(pairs) > 1 else []:
        mixed = inputs | {key: inputs[key].detach().double().requires_grad_()}
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"torch\.float64"):
            entry.function(**mixed)
