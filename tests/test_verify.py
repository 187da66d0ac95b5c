"""`verify` tells agreement from difference, in its own units, and touches nothing of the user's."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

import fused_nce
from fused_nce import MemoryQueue, amdim_nce, info_nce, verify


def dense(queries, keys):
    """Row-wise InfoNCE at temperature 0.1, as people write it."""
    return nn.functional.cross_entropy(queries @ keys.T / 0.1, torch.arange(len(queries)))


def batch(dtype=torch.float32, n=40, d=16):
    g = torch.Generator().manual_seed(3)
    return [nn.functional.normalize(torch.randn(n, d, generator=g), dim=1).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_formula_is_within_a_few_roundings(dtype, capsys):
    found = verify(dense, info_nce, *batch(dtype), repeats=1, within=8)
    assert [row.name for row in found.differences] == ["loss", "gradient of input 0", "gradient of input 1"]
    assert found.worst <= 8
    assert 0 < found.differences[1].relative < 100 * torch.finfo(dtype).eps
    assert capsys.readouterr().out == f"{found}\n"
    assert "gradient of input 1" in str(found)


@pytest.mark.parametrize("factor", [1.001, 0.0, -1.0])
def test_another_formula_is_not(factor):
    """A loss that is off by a thousandth, gone, or of the other sign: hundreds of roundings at the least."""
    found = verify(dense, lambda q, k: factor * info_nce(q, k).loss, *batch(), repeats=1, show=False)
    assert all(row.roundings > 100 for row in found.differences)
    assert found.differences[1].relative == pytest.approx(abs(factor - 1), rel=1e-2)
    with pytest.raises(ValueError, match=r"^ours: .* differs by .* roundings, need <= 8$"):
        verify(dense, lambda q, k: factor * info_nce(q, k).loss, *batch(), repeats=1, show=False, within=8)


def test_a_wrong_gradient_under_the_right_value():
    """Only one input's gradient is lost: that row shows it, and no other."""
    found = verify(dense, lambda q, k: info_nce(q, k.detach()).loss, *batch(), repeats=1, show=False)
    loss, first, second = found.differences
    assert max(loss.roundings, first.roundings) <= 8
    assert second.relative == 1.0
    assert second.roundings > 1e3


def test_nothing_that_is_not_finite_passes():
    found = verify(dense, lambda q, k: info_nce(q, k).loss * float("nan"), *batch(), repeats=1, show=False)
    assert math.isnan(found.worst)
    with pytest.raises(ValueError, match=r"nan roundings, need <= 1e"):
        verify(dense, lambda q, k: info_nce(q, k).loss * float("nan"), *batch(), repeats=1, show=False, within=1e9)


def test_gradients_of_those_that_want_one():
    q, k = batch()
    found = verify(dense, info_nce, q.requires_grad_(), k, repeats=1, show=False)
    assert [row.name for row in found.differences] == ["loss", "gradient of input 0"]


def test_inputs_state_and_randomness_stay_as_they_were():
    class Noisy(nn.Module):
        """A loss with a queue and a draw of its own."""

        def __init__(self):
            super().__init__()
            self.queue = MemoryQueue(8, 16)

        def forward(self, q, k):
            self.queue.update(k.detach())
            q.detach().mul_(1.0)
            return dense(q + 0.1 * torch.randn_like(q), k) + (q @ self.queue.keys.T).sum()

    q, k = batch()
    kept, module = [q.clone(), k.clone()], Noisy()
    keys, state = module.queue.keys.clone(), torch.get_rng_state()
    found = verify(module, module, q, k, repeats=2, show=False)
    assert found.worst == 0  # the same draws for both, from the same state
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.queue.keys, keys)
    assert torch.equal(q, kept[0])
    assert torch.equal(k, kept[1])
    assert q.grad is None
    assert not q.requires_grad


@pytest.mark.parametrize("shape", [dict, list, tuple])
def test_what_a_loss_may_return(shape):
    parts = {"contrastive_loss": 0.25, "other_loss": 0.75}

    def several(q, k):
        found = {name: share * dense(q, k) for name, share in parts.items()}
        return found if shape is dict else shape(found.values())

    assert verify(several, info_nce, *batch(), repeats=1, show=False).worst <= 8


def test_tensors_inside_of_arguments_count_one_by_one():
    """As a task that takes tuples of maps has them; a dict too."""

    def nested(function):
        return lambda pair, options: function(pair[0], pair[1]["keys"]) * options["factor"]

    q, k = batch()
    arguments = ((q, {"keys": k}), {"factor": torch.tensor(2.0)})
    found = verify(nested(dense), nested(lambda q, k: info_nce(q, k).loss), *arguments, repeats=1, show=False)
    assert [row.name for row in found.differences] == ["loss", *(f"gradient of input {i}" for i in range(3))]
    assert found.worst <= 8
    lost = verify(nested(dense), nested(lambda q, k: info_nce(q, k.detach()).loss), *arguments, repeats=1, show=False)
    assert lost.differences[2].relative == 1.0


def test_cost_is_measured():
    """A step that holds 64 MiB more, and one that waits: both are seen."""
    import time

    def heavy(q, k):
        time.sleep(0.02)
        return dense(q, k) + 0 * torch.zeros(1 << 24).add_(1).mean()

    found = verify(heavy, info_nce, *batch(), repeats=1, show=False)
    assert found.upstream.time_ms > 20
    if sys.platform == "linux":
        assert found.upstream.peak_mib is None or 60 < found.upstream.peak_mib < 200
        assert (found.ours.peak_mib is None) == (found.upstream.peak_mib is None)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"^inputs: got 1 arguments without a float tensor"):
        verify(dense, info_nce, torch.arange(3))
    with pytest.raises(ValueError, match=r"^repeats: got 0, need >= 1"):
        verify(dense, info_nce, *batch(), repeats=0)
    with pytest.raises(TypeError, match=r"^loss: got int from it, need a float tensor"):
        verify(lambda q, k: 1, info_nce, *batch(), repeats=1)


def test_amdim_against_a_dense_one(capsys):
    g = torch.Generator().manual_seed(0)
    a, c = torch.randn(12, 32, generator=g), torch.randn(12, 9, 32, generator=g)

    def plain(a, c):
        s = torch.einsum("id,kjd->ikj", a, c) / math.sqrt(32)
        t, own = 20 * torch.tanh(s / 20), torch.eye(12, dtype=torch.bool)
        others = t.masked_fill(own[:, :, None], float("-inf")).flatten(1).logsumexp(1, keepdim=True)
        return (torch.logaddexp(others, t[own]) - t[own]).mean() + 0.04 * s.square().mean()

    verify(plain, amdim_nce, a, c, repeats=1, within=8)
    assert "memory: " in capsys.readouterr().out
    assert fused_nce.verify is verify
