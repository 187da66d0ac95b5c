"""Every registered loss on every backend and dtype: value, gradients, determinism, compiled, and its module twin."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_nce
from fused_nce.losses.registry import LOSSES
from tests.budget import eta, precision
from tests.cases import DTYPES
from tests.losses.poses import posed, widened
from tests.losses.sensitivity import exact
from tests.marks import nightly_but

FIRST = [name for name, entry in LOSSES.items() if name == entry.name]  # of each loss
OPEN = [name for name, entry in LOSSES.items() if not entry.closed]
BATCH_AT = {"cpc_nce": 1}  # the dimension of the batch, where it is not the first


def grown(name, copies):
    """`posed` with a batch that many times the example's: those of several seeds, one after the other."""
    entry, inputs, leaves = posed(name, 0, torch.float32)
    parts = [posed(name, seed, torch.float32)[1] for seed in range(copies)]
    for number, part in enumerate(parts):
        if "keys" in part and "targets" in part:  # among its own
            part["targets"] = part["targets"] + number * len(inputs["keys"])
    for key, x in inputs.items():
        if isinstance(x, tuple) and isinstance(x[0], Tensor):
            inputs[key] = tuple(torch.cat(several) for several in zip(*(part[key] for part in parts), strict=True))
        if isinstance(x, Tensor) and x.dim():
            at = 0 if key == "negatives" else min(BATCH_AT.get(entry.name, 0), x.dim() - 1)
            inputs[key] = torch.cat([part[key] for part in parts], at).detach().requires_grad_(key in leaves)
    return entry, inputs, leaves


def on(entry, backend):
    """The backend as a keyword, for a loss that has one."""
    return {} if entry.closed else {"backend": backend}


def run(entry, inputs, leaves, backend, upstream=1.0):
    """The loss, and {name: gradient} of upstream·loss."""
    out = entry.function(**inputs, **on(entry, backend))
    grads = torch.autograd.grad(upstream * out.loss, [inputs[key] for key in leaves])
    return out, dict(zip(leaves, grads, strict=True))


def able(name, backend, dtype=torch.float32):
    """Skip where the backend refuses, with its reason; the two that know every atom may not."""
    entry, inputs, _ = posed(name, 0, dtype)
    if entry.closed:
        if backend != "reference":
            pytest.skip("plain torch, the same on every backend")
        return
    try:
        entry.function(**inputs, backend=backend)
    except ValueError as error:
        if backend in ("reference", "chunked") or "which cannot run this: " not in str(error):
            raise
        pytest.skip(str(error))


@functools.cache
def budget_of(name, seed, dtype, p):
    """The exact value and gradients of an example, and what they may be off by: for all backends of one precision."""
    entry, inputs, leaves = posed(name, seed, dtype)
    with pytest.MonkeyPatch.context() as patch:
        return exact(entry, widened(inputs, leaves), leaves, p, patch)


def placed(x: Any, device: str) -> Any:
    """An argument on the device, as the leaf that it was."""
    return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x


def etas_of(
    name: str, device: str, backend: str, dtype: torch.dtype, seed: int = 0, upstream: float = 1.0
) -> dict[str, float]:
    """η of the registered example's value and gradients."""
    entry, inputs, leaves = posed(name, seed, dtype)
    budget = budget_of(name, seed, dtype, precision(dtype, backend))
    here = {key: placed(x, device) for key, x in inputs.items()}
    out, grads = run(entry, here, leaves, backend, upstream)
    etas = {"loss": eta(out.loss, budget.loss.numpy(), budget.loss_budget.numpy())}
    for key in leaves:
        value, allowed = upstream * budget.grads[key], abs(upstream) * budget.grad_budgets[key]
        etas[key] = eta(grads[key], value.numpy(), allowed.numpy())
    return etas


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(name, backend, dtype, record_eta):
    able(name, backend, DTYPES[dtype])
    for seed, upstream in ((0, 1.0), (3, -2.5), (7, 300.0)):
        etas = etas_of(name, "cpu", backend, DTYPES[dtype], seed, upstream)
        record_eta(backend, dtype, etas)
        assert max(etas.values()) <= 1, (name, seed, etas)


@pytest.mark.parametrize("name", OPEN)
def test_across_strips_and_panels(name, monkeypatch):
    """The chunk loop at its smallest: every strip and panel has to merge. float64, so that a lost term shows."""
    entry, inputs, leaves = posed(name)
    whole = run(entry, inputs, leaves, "reference")
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.0004")
    if "mining" in inputs and inputs["mining"] != "hard":  # sorts whole rows: strips of one
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.002")
    found = run(entry, inputs, leaves, "chunked")
    torch.testing.assert_close(found[0].loss, whole[0].loss, rtol=1e-12, atol=1e-14)
    for key in leaves:
        torch.testing.assert_close(found[1][key], whole[1][key], rtol=1e-10, atol=1e-13)
    for key, value in whole[0].stats.items():
        torch.testing.assert_close(found[0].stats[key], value, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", nightly_but(FIRST, [name for name, entry in LOSSES.items() if not entry.stopped]))
def test_gradcheck(name):
    entry, inputs, leaves = posed(name)

    def loss(*values):
        return entry.function(**{**inputs, **dict(zip(leaves, values, strict=True))}, **on(entry, "reference")).loss

    assert torch.autograd.gradcheck(loss, [inputs[key] for key in leaves], eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_twice(name, backend):
    able(name, backend)
    entry, inputs, leaves = posed(name, 1, torch.float32)
    first, again = run(entry, inputs, leaves, backend), run(entry, inputs, leaves, backend)
    assert torch.equal(first[0].loss, again[0].loss)
    assert all(torch.equal(first[1][key], again[1][key]) for key in leaves)


# One of each way through the engine: blocks, labels, gathered columns, sorted triplets; the others nightly.
TRACED = ("amdim_nce", "sup_con", "npid_nce", "triplet_margin/all")


@pytest.mark.parametrize("name", nightly_but(TRACED, LOSSES))
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    entry, inputs, leaves = posed(name, 2, torch.float32)
    compiled = torch.compile(
        lambda **x: entry.function(**x, **on(entry, "chunked")).loss, fullgraph=True, backend="aot_eager"
    )
    eager = run(entry, inputs, leaves, "chunked")
    found = torch.autograd.grad(compiled(**inputs), [inputs[key] for key in leaves])
    for key, gradient in zip(leaves, found, strict=True):
        torch.testing.assert_close(gradient, eager[1][key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_module_twin(name):
    """The same number through the module, a copy of it and a pickle of it; what is not an input is a setting."""
    entry, inputs, _ = posed(name)
    if name == "amdim_nce":
        pytest.skip("AMDIMLoss takes feature maps, and has tests of its own")
    accepted = inspect.signature(entry.module.forward).parameters
    settings = {key: x.item() if isinstance(x, Tensor) else x for key, x in inputs.items() if key not in accepted}
    given = {key: x for key, x in inputs.items() if key in accepted}
    module = entry.module(**settings, **on(entry, "chunked"))
    expected = entry.function(**given, **settings, **on(entry, "chunked")).loss
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(**given).loss, expected)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    module.load_state_dict(torch.load(buffer, weights_only=True))


def test_registry_covers_the_public_functions():
    """Each loss of the package has an entry, an oracle in its file or the one beside it, and a public name."""
    functions = {entry.function for entry in LOSSES.values()}
    public: dict[str, Any] = {key: getattr(fused_nce, key) for key in fused_nce.__all__}
    named = {f for key, f in public.items() if inspect.isfunction(f) and f.__module__.startswith("fused_nce.losses")}
    assert functions == named
    for entry in LOSSES.values():
        assert public[entry.name] is entry.function
        assert entry.oracle.__module__.removesuffix("_oracle") == entry.function.__module__


def test_a_modules_settings_are_shown_and_may_be_changed():
    module = fused_nce.losses.NTXentLoss(0.5, backend="chunked")
    assert repr(module) == "NTXentLoss(temperature=0.5, normalize=True)"
    module.temperature = 0.1
    views = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = fused_nce.nt_xent(*views, temperature=0.1, backend="chunked")
    assert torch.equal(module(*views).loss, expected.loss)
