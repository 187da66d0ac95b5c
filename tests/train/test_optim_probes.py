"""Schedule and online classifiers, by their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_nce.train import optim
from fused_nce.train.config import OptimConfig
from fused_nce.train.online_probes import OnlineProbes, sum_losses


def rates(updates, per_epoch, **settings):
    config = OptimConfig(lr=1.0, **settings)
    return [optim.learning_rate(config, u, per_epoch) for u in updates]


def test_warm_up_counts_updates_from_one():
    assert rates([0, 1, 249, 499, 500], 10**6) == [1 / 500, 2 / 500, 0.5, 1.0, 1.0]


def test_steps_at_the_start_of_their_epochs():
    found = rates([249, 250, 279, 280, 299], 1, warmup_updates=0)
    assert found == pytest.approx([1, 0.2, 0.2, 0.04, 0.04])


def test_cosine_falls_from_the_end_of_the_warm_up_to_zero():
    found = rates([9, 10, 60, 109, 110], 11, warmup_updates=10, schedule="cosine", epochs=10)
    assert found == pytest.approx([1, 1, 0.5, 0.5 * (1 + math.cos(math.pi * 0.99)), 0], abs=1e-12)


def test_weight_decay_is_in_the_gradient():
    """Adam, not AdamW: with zero gradients the first update is lr * sign(w), whatever the decay."""
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    optimizer = optim.build(layer, OptimConfig(lr=1e-3, weight_decay=1e-2))
    (layer.weight.sum() * 0 + layer.bias.sum() * 0).backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight, before - 1e-3 * before.sign(), atol=1e-6, rtol=0)


def test_probe_loss_by_its_formula():
    torch.manual_seed(0)
    logits, labels = 8 * torch.randn(2, 6, 3), torch.tensor([0, 1, -1, 2, -1, 0])
    known = labels >= 0
    expected = sum(
        F.cross_entropy(10 * torch.tanh(z[known] / 10), labels[known]) + 1e-3 * z.square().mean() for z in logits
    )
    torch.testing.assert_close(sum_losses(logits, labels, known), expected)


def test_probes_do_not_reach_the_encoder_and_count_what_is_labelled():
    torch.manual_seed(0)
    probes = OnlineProbes(8, 3)
    features = torch.randn(10, 8, 1, 1, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1, -1, -1, -1])
    out = probes(features, labels)
    out.loss.backward()
    assert features.grad is None
    assert all(p.grad is not None for p in probes.parameters())
    assert int(out.labelled) == 6
    right = (probes.linear(features.flatten(1)).argmax(1) == labels).sum()
    assert int(out.correct[0]) == int(right)


def test_no_label_at_all_is_no_nan():
    out = OnlineProbes(8, 3)(torch.randn(4, 8), torch.full((4,), -1))
    assert torch.isfinite(out.loss)
    assert int(out.labelled) == 0


def test_probe_structure():
    probes = OnlineProbes(64, 10)
    kinds = [type(layer).__name__ for layer in probes.mlp]
    assert kinds == ["Dropout", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert probes.mlp[1].weight.shape == (1024, 64)
    assert probes.mlp[1].bias is None
    assert probes.mlp[0].p == probes.mlp[4].p == 0.2
