"""A bias of each column: its digits in every dtype, masks, and what counts candidates."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from fused_nce import info_nce
from tests.losses.test_candidates import F64, K, N, Q


@pytest.mark.parametrize("offset", [-150.0, -15.0, 0.0, 15.0])
def test_a_bias_keeps_its_bits_in_bfloat16(offset):
    """A log Q far from 0 is nothing that the softmax sees: the bias itself is, to 24 bits."""
    q, k = (nn.functional.normalize(x, dim=1).bfloat16() for x in (Q, K))
    bias = torch.linspace(-2, 2, N) + 1e-3 + offset
    rows = info_nce(q, k, column_bias=bias, temperature=0.05, reduction="none").nce
    exact = q.double() @ k.double().T / 0.05 + bias.double()
    exact = nn.functional.cross_entropy(exact, torch.arange(N), reduction="none")
    assert (rows.double() - exact).abs().max() < 3e-7 * (30 + abs(offset))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_keeps_its_bits_at_every_temperature_and_minus_infinity_is_out(dtype):
    """log Q to 24 bits, where the embeddings may have 8: cross entropy of the columns that are left."""
    for temperature, gone, smoothing, guided in itertools.product((0.05, 1.0, 1e5), (None, 2), (0.0, 0.2), (0, 1)):
        q, k = Q.to(dtype).requires_grad_(), K.to(dtype).requires_grad_()
        bias = torch.linspace(-9, -3, N) + 1e-3
        left = [i for i in range(N) if i != gone]
        if gone is not None:
            bias[gone] = -math.inf
        leaves = q, k, bias.requires_grad_()
        options: dict[str, Any] = {"guide": (Q, K), "guide_margin": -99.0} if guided else {}
        options |= {"column_bias": bias, "temperature": temperature, "label_smoothing": smoothing, "reduction": "none"}
        rows = info_nce(q, k, **options).nce
        scores = (q.double() @ k.double().T / temperature + bias.double())[left][:, left]
        exact = nn.functional.cross_entropy(
            scores, torch.arange(len(left)), reduction="none", label_smoothing=smoothing
        )
        torch.testing.assert_close(rows[left].double(), exact, rtol=1e-5, atol=1e-5)
        tolerance = 0.02 if dtype != torch.float32 else 1e-4
        for mine, theirs in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (rows[left], exact)), strict=True):
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
        assert gone is None or rows[gone] == math.inf
    for bad in (math.nan, math.inf):
        assert not info_nce(q, k, column_bias=torch.tensor([0.0, bad, *[0.0] * (N - 2)])).loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_finite_mask_leaves_out_other_rows_columns_and_costs_its_own_row_what_it_is(dtype):
    """Nothing overflows: not the mask in 16 bits, nor the sum of a row's scores, nor a gradient."""
    leaves = (
        *(nn.functional.normalize(x, dim=1).to(dtype).requires_grad_() for x in (Q, torch.cat([K, K[:3] - 1]))),
        (torch.tensor(0.0).requires_grad_()),
    )
    for mask, logs, several in itertools.product((-1e9, -1e20, torch.finfo(torch.float32).min), (0, -3), (False, True)):
        q, k, t = leaves
        bias = torch.linspace(-9, -3, N + 3)
        bias[[1, N, N + 2]] = mask
        temperature = 10.0**logs + t
        targets: dict[str, Any] = {"positives": torch.arange(N)[:, None]} if several else {"targets": torch.arange(N)}
        how: dict[str, Any] = {"column_bias": bias.requires_grad_(), "temperature": temperature, "reduction": "none"}
        rows = info_nce(q, k, **targets, **how).nce
        scores = q.double() @ k.double().T / temperature.double() + bias.double()
        exact = nn.functional.cross_entropy(scores, torch.arange(N), reduction="none")
        torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-3 if logs else 1e-5)
        grads = (torch.autograd.grad(x.sum(), (*leaves, bias)) for x in (rows, exact))
        for mine, theirs in zip(*grads, strict=True):
            assert (mine - theirs).abs().max() <= (1e-4 if dtype == torch.float32 else 0.05) * theirs.abs().max()


def test_a_bias_beside_shared_hard_negatives():
    """Where candidates are counted, which the bias does by a guide of its own."""
    h = torch.randn(N, 2, Q.shape[1], generator=torch.Generator().manual_seed(3), dtype=Q.dtype)
    for options in ({"label_smoothing": 0.1}, {"tau_plus": 0.1}):
        for shared in (False, True):
            more: dict[str, Any] = {**options, "hard_negatives": h, "share_hard_negatives": shared, **F64}
            found = info_nce(Q, K, column_bias=torch.zeros(N).double(), **more).loss
            torch.testing.assert_close(found, info_nce(Q, K, **more).loss)


def test_a_bias_beside_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert info_nce(Q.float(), K.float(), column_bias=torch.zeros(N).float()).loss.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("tau_plus", [None, 0.1])
def test_a_column_that_is_out_is_no_candidate_of_a_debiased_loss(tau_plus):
    more = torch.cat([K, K[:2] + 1])
    bias = torch.tensor([0.0] * N + [-math.inf] * 2).double()
    found = info_nce(Q, more, torch.arange(N), column_bias=bias, tau_plus=tau_plus, **F64).loss
    torch.testing.assert_close(found, info_nce(Q, K, tau_plus=tau_plus, **F64).loss)
