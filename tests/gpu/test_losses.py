"""Every registered loss on a device's kernels, within the budget that its dense oracle gives on the CPU.

A Triton kernel is compiled for each loss and dtype, 1.5 s a kernel: bfloat16 of one loss a layout, the rest nightly.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fused_nce import moco_nce
from fused_nce.losses.registry import LOSSES
from tests.budget import eta, precision
from tests.cases import DTYPES
from tests.gpu.conftest import require
from tests.losses.sensitivity import exact
from tests.losses.test_registry import posed, run, widened

OPEN = [name for name, entry in LOSSES.items() if not entry.closed]
ONE_A_LAYOUT = (
    "info_nce/targets, clip, penalty",
    "info_nce/symmetric, targets, penalty",
    "moco_nce",
    "nt_xent",
    "siglip_loss",
    "sup_con",
    "dim_mi",
)


def check(name, place, dtype, monkeypatch, record_eta):
    entry, inputs, leaves = posed(name, 0, DTYPES[dtype])
    wide = {key: widened(x, key in leaves) for key, x in inputs.items()}
    budget = exact(entry, wide, leaves, precision(DTYPES[dtype], place.backend), monkeypatch)

    def placed(key, x):
        return x.detach().to(place.device).requires_grad_(key in leaves) if isinstance(x, Tensor) else x

    try:
        out, grads = run(entry, {key: placed(key, x) for key, x in inputs.items()}, leaves, place.backend)
    except ValueError as error:
        if "which cannot run this: " not in str(error):
            raise
        pytest.skip(str(error))
    etas = {"loss": eta(out.loss, budget.loss.numpy(), budget.loss_budget.numpy())}
    for key in leaves:
        etas[key] = eta(grads[key], budget.grads[key].numpy(), budget.grad_budgets[key].numpy())
    record_eta(place.backend, dtype, etas)
    assert max(etas.values()) <= 1, (name, etas)


@pytest.mark.parametrize("name", ONE_A_LAYOUT)
def test_one_loss_a_layout(name, kernels, monkeypatch, record_eta):
    require(kernels, torch.bfloat16)
    check(name, kernels, "bfloat16", monkeypatch, record_eta)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OPEN)
def test_every_loss(name, dtype, kernels, monkeypatch, record_eta):
    require(kernels, DTYPES[dtype])
    check(name, kernels, dtype, monkeypatch, record_eta)


@pytest.mark.parametrize(("dtype", "bank"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_bank_of_another_dtype(dtype, bank, kernels):
    """The same as with both cast to the wider one, which holds the other exactly."""
    require(kernels, torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    q, k, queue = (torch.randn(rows, 40, generator=g) for rows in (70, 70, 300))
    mine = [q.to(kernels.device, dtype).requires_grad_(), k.to(kernels.device, dtype), queue.to(kernels.device, bank)]
    wide = [q.to(dtype).double().requires_grad_(), k.to(dtype).double(), queue.to(bank).double()]
    try:
        loss = moco_nce(*mine, normalize=False, temperature=4.0, backend=kernels.backend).loss
    except ValueError as error:
        if "which cannot run this: " not in str(error):
            raise
        pytest.skip(str(error))
    whole = moco_nce(*wide, normalize=False, temperature=4.0, backend="reference").loss
    (found,), (wanted,) = torch.autograd.grad(loss, mine[:1]), torch.autograd.grad(whole, wide[:1])
    torch.testing.assert_close(loss.cpu().double(), whole, rtol=1e-5, atol=0)
    # A score of 40 terms of 1/6 is off by 10 u of their 6; twice that in each weight, and the rounding of dq.
    step = torch.finfo(dtype).eps + 128 * 2.0**-24
    assert (found.cpu().double() - wanted).abs().max() <= step * wanted.abs().max()
