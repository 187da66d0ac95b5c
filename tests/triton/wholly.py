"""The plain call as few launches of Triton's kernels, under the interpreter, beside the operators.

`test_interpret.py` runs this file in a process of its own.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fused_nce import info_nce, moco_nce, nt_xent
from fused_nce.backends import triton
from fused_nce.backends.triton import kernels, plan, stored, tail, whole
from tests.backends.test_cuda_whole import (
    LOSSES,
    close,
    count_served,
    draw,
    gradients,
    hold_a_queue_that_changes,
    hold_to_the_operators,
)
from tests.marks import nightly_but
from tests.triton.heard import Heard


@pytest.fixture
def served(monkeypatch):
    return count_served(triton, monkeypatch)


FEW = [*((name, torch.float32) for name in LOSSES), ("moco", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), nightly_but(FEW, product(LOSSES, (torch.float32, torch.float16))))
def test_it_is_what_the_operators_are(name, dtype, served, monkeypatch):
    hold_to_the_operators(triton, name, dtype, served, monkeypatch)


@pytest.mark.parametrize("name", nightly_but(["amdim", "moco"], LOSSES))
def test_wide_rows(name, served, monkeypatch):
    """Whose statistics have a pass without sums, and whose weights are stored."""
    monkeypatch.setattr(plan, "WIDE", 1)
    strip = Heard(monkeypatch, stored, "strip_kernel")
    hold_to_the_operators(triton, name, torch.float32, served, monkeypatch)
    assert bool(strip.launches) == (name != "nt_xent")


def test_rows_of_several_programs(monkeypatch):
    """Of the tail's, whose numbers another launch adds up; several widths of a norm; a row of zeros, a huge one."""
    monkeypatch.setattr(whole, "ALONE", 64)
    for n, d in ((140, 9), (9, 300)):
        q, k = draw(0, n, d).requires_grad_(), draw(1, n, d).requires_grad_()
        with torch.no_grad():
            q[3] = 0.0
        outs = [info_nce(q, k, normalize=True, backend=name) for name in ("triton", "reference")]
        ours, theirs = ([x.loss, *x.stats.values(), *gradients(x.loss, [q, k])] for x in outs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        with torch.no_grad():
            q[5] = 1e30
            rows = info_nce(q, k, normalize=True, reduction="none", backend="triton").nce
        assert torch.equal(rows.isnan().flatten(), torch.arange(n) == 5)


def test_a_graph_that_is_kept_keeps_its_gradients():
    a, b = draw(0, 7, 20).requires_grad_(), draw(1, 7, 20).requires_grad_()
    for loss in (nt_xent(a, b, backend="triton").loss, info_nce(a, b, backend="triton").loss):
        first = gradients(3.0 * loss, [a, b], retain_graph=True)
        first = [x.clone() for x in first]
        assert all(map(torch.equal, first, gradients(3.0 * loss, [a, b], retain_graph=True)))
        close(gradients(loss, [a, b]), [x / 3.0 for x in first], torch.float32)


def test_a_queue_may_change_before_the_backward(served):
    hold_a_queue_that_changes("triton", served)


def test_what_it_does_not_serve_goes_to_the_operators(served):
    q, k = draw(0, 6, 16), draw(1, 6, 16)
    info_nce(q, k, torch.arange(6), backend="triton")  # an index, which it would have to read
    info_nce(q, k, torch.arange(6), symmetric=True, backend="triton")
    moco_nce(q, k, draw(2, 9, 16), normalize=False, backend="triton")
    assert served() == 0


def test_symmetric_scores_of_views_are_seen_once(served, monkeypatch):
    """Its end has what blocks leave for columns, and the rows of several programs."""
    monkeypatch.setattr(plan, "MIRROR", 32)
    monkeypatch.setattr(plan, "MIRROR_FROM", 1)
    monkeypatch.setattr(whole, "ALONE", 64)
    fold, close, last = (
        Heard(monkeypatch, module, name)
        for module, name in ((kernels, "fold_kernel"), (tail, "close_kernel"), (tail, "summary_kernel"))
    )
    views = [draw(i, 151, 9).requires_grad_() for i in range(2)]
    outs = [nt_xent(*views, backend=name) for name in ("triton", "reference")]
    ours, theirs = ([x.loss, *x.stats.values(), *gradients(x.loss, views)] for x in outs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert served() == 1
    assert [(x["MIRRORED"], y["MIRRORED"]) for x, y in zip(fold.launches, close.launches, strict=True)] == [(True, 32)]
    assert len(last.launches) == 1
