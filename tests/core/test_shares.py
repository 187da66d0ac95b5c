"""Gradients that several processes add up leave in the accumulation dtype: the sum alone is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_nce.backends import cpu, cuda
from fused_nce.core.problem import Needs, Problem
from fused_nce.core.spec import Block, Spec
from fused_nce.core.tails import Coefficients, Nce
from tests.conftest import MODULE, needs_kernels

ALL = Needs(True, True, True)


def features():
    return torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0)).bfloat16()


@needs_kernels
@pytest.mark.parametrize("module", [cpu, cuda])
def test_a_share_is_not_rounded(module):
    backend: Any = module
    q, k = features()
    p = Problem(q, k, 1.0, Spec(Block(1), stats=Nce().stats), 0)
    found = backend.stats(p)
    d = Nce().coefficients(p.spec, found.pos, found.rows, None, 0.05, 1.0, p.n * p.m)
    whole, share = (backend.grads(p._replace(blocks=blocks), found, d, ALL) for blocks in (1, 2))
    assert share.dq.dtype == share.dk.dtype == torch.float32
    assert torch.equal(share.dq.to(whole.dq.dtype), whole.dq)
    assert torch.equal(share.dk.to(whole.dk.dtype), whole.dk)
    if module is cuda or MODULE.build_info()["bf16_hardware"]:
        assert whole.dk.dtype == torch.bfloat16


def test_a_share_of_stored_weights_is_not_rounded(monkeypatch):
    """What `triton` makes room for; nothing is computed."""
    jit = pytest.importorskip("triton.runtime.jit", reason="triton is not installed")
    from fused_nce.backends.triton import configs, launch, stored

    monkeypatch.setattr(jit.JITFunction, "__getitem__", lambda kernel, grid: lambda *given, **options: None)
    monkeypatch.setattr(configs, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(stored, "multiply", lambda *given, **options: None)
    q, k = features()
    p = Problem(q, k, 1.0, Spec(Block(1), stats=Nce().stats, columns=("neg_lse",)), 0)
    found = launch.stats(p)
    d = Coefficients(*(torch.zeros_like(x) for x in found))  # type: ignore[arg-type]
    for blocks, dtype in ((1, torch.bfloat16), (2, torch.float32)):
        made = launch.grads(p._replace(blocks=blocks), found, d, ALL)
        assert made.dq.dtype == made.dk.dtype == dtype
