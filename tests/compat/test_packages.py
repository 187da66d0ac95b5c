"""The adapters against the packages themselves, where they are installed: 50 random configurations each."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fused_nce.compat import lightly, open_clip

pytestmark = pytest.mark.nightly
WITHIN = 5e-5  # as in test_formulas; both sides are float32 here


@pytest.fixture(scope="module")
def theirs_lightly():
    return pytest.importorskip("lightly.loss.ntx_ent_loss", reason="lightly is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def theirs_open_clip():
    """open_clip/loss.py alone: the package around it imports tokenizers and models."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("open_clip_torch is not installed")
    source = importlib.util.spec_from_file_location("upstream_open_clip_loss", Path(spec.origin).with_name("loss.py"))
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    sys.modules[source.name] = module
    source.loader.exec_module(module)
    return module


def agree(theirs, ours, tensors):
    """Values, and gradients by every tensor."""
    found = []
    for loss in (theirs, ours):
        given = [x.clone().requires_grad_() for x in tensors]
        value = loss(*given)
        grads = torch.autograd.grad(value, given, allow_unused=True)
        found.append([value, *(torch.zeros_like(x) if g is None else g for x, g in zip(given, grads, strict=True))])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= WITHIN * a.abs().max() + 1e-2 * WITHIN


@pytest.mark.parametrize("seed", range(50))
def test_lightly(theirs_lightly, seed):
    """Several steps with one bank: the same start from the same seed, the same contents after each step."""
    pick = random.Random(seed)
    n, width, temperature = pick.randint(2, 20), pick.choice((3, 16, 33)), pick.choice((0.07, 0.1, 0.5, -0.5))
    size = pick.choice((0, (n * pick.randint(1, 3), width)))
    losses = []
    for module in (theirs_lightly, lightly):
        torch.manual_seed(seed)
        losses.append(module.NTXentLoss(temperature, memory_bank_size=size))
    for _ in range(4):
        agree(losses[0], losses[1], [torch.randn(n, width) for _ in range(2)])
        if size:
            torch.testing.assert_close(losses[1].memory_bank.keys, losses[0].memory_bank.bank, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("seed", range(50))
def test_open_clip(theirs_open_clip, name, seed):
    pick = random.Random(seed)
    torch.manual_seed(seed)
    n, width = pick.randint(2, 20), pick.choice((3, 16, 33))
    rows = [nn.functional.normalize(torch.randn(n, width), dim=1) for _ in range(2)]
    tensors = [*rows, torch.tensor(pick.choice((1.0, 14.0))), torch.tensor(pick.choice((-10.0, 0.0)))]
    agree(getattr(theirs_open_clip, name)(), getattr(open_clip, name)(), tensors)
