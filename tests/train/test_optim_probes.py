"""Schedule and online classifiers, by their formulas."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_nce.train import optim
from fused_nce.train.monitor.online_probes import OnlineProbes, sum_losses
from fused_nce.train.settings import OptimConfig


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
    torch.manual_seed(0)  # a weight as small as Adam's eps would move less
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    optimizer = optim.build(layer, OptimConfig(lr=1e-3, weight_decay=1e-2))["optimizer"]
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


def weights(*shapes):
    torch.manual_seed(0)
    layers = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])
    for p in layers:
        p.grad = torch.randn_like(p)
    return layers


def test_lars_by_its_formula():
    """Two updates of a matrix, whose rate follows its size, and of a bias, which is plain SGD without decay."""
    layers = weights((4, 3), (3,))
    config = OptimConfig(name="lars", lr=0.5, momentum=0.9, trust=0.01, weight_decay=0.1, decay_all=False)
    optimizer = optim.build(layers, config)["optimizer"]
    matrix, bias = (p.detach().double().clone() for p in layers)
    v_matrix, v_bias = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for _ in range(2):
        g_matrix, g_bias = (p.grad.double() for p in layers)
        step = g_matrix + 0.1 * matrix
        v_matrix = 0.9 * v_matrix + 0.5 * 0.01 * matrix.norm() / step.norm() * step
        v_bias = 0.9 * v_bias + 0.5 * g_bias
        matrix, bias = matrix - v_matrix, bias - v_bias
        optimizer.step()
    torch.testing.assert_close(layers[0].double(), matrix, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layers[1].double(), bias, rtol=1e-6, atol=1e-6)


def test_lars_moves_a_weight_of_zeros_and_stays_without_a_gradient():
    layers = weights((2, 2), (2, 2))
    layers[0].data.zero_()
    layers[1].grad = None
    before = layers[1].detach().clone()
    optim.build(layers, OptimConfig(name="lars", lr=0.5, weight_decay=0.0))["optimizer"].step()
    torch.testing.assert_close(layers[0].detach(), -0.5 * layers[0].grad)
    assert torch.equal(layers[1], before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_is_torchs_of_kernels_as_matrices_and_adam_of_the_rest(layout):
    """Two updates, in either memory format, in torch's bfloat16."""
    layers = weights((6, 4, 3, 3), (40, 5), (3,), (2, 2))
    layers[3].grad = None
    layers[0].data = layers[0].data.to(memory_format=layout)
    flat = [nn.Parameter(p.detach().clone().flatten(min(1, p.dim() - 1))) for p in layers]
    config = OptimConfig(name="muon", lr=0.01, momentum=0.9, weight_decay=0.1, decay_all=False)
    ours = optim.build(layers, config, precision="bf16")
    theirs = torch.optim.Muon(flat[:2], lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(flat[2:3], lr=0.01, betas=config.betas, fused=True)
    for _ in range(2):
        for p, q in zip(layers[:3], flat, strict=False):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.flatten(min(1, p.dim() - 1))
        for optimizer in (*ours.values(), theirs, adam):
            optimizer.step()
    for p, q in zip(layers, flat, strict=True):
        torch.testing.assert_close(p.flatten(min(1, p.dim() - 1)), q, rtol=0, atol=4e-4)


def test_muon_makes_singular_values_alike():
    """Of tall and of wide ones, in either precision; a root mean square of about 0.2 times the rate, Adam's."""
    for shape, precision in product(((40, 12), (12, 4, 3, 3)), ("fp32", "bf16")):
        layer = weights(shape)
        before = layer[0].detach().clone()
        config = OptimConfig(name="muon", lr=1.0, weight_decay=0.0)
        optim.build(layer, config, precision=precision)["optimizer"].step()
        moved = (before - layer[0].detach()).flatten(1)
        found = torch.linalg.svdvals(moved) / (0.2 * math.sqrt(max(moved.shape)))
        assert 0.6 < found.min() < found.max() < 1.3
        assert 0.15 < moved.square().mean().sqrt() < 0.25


@pytest.mark.parametrize(("decay_all", "moved"), [(True, [True, True]), (False, [True, False])])
def test_decay_of_biases_and_norms_is_a_choice(decay_all, moved):
    layers = weights((2, 2), (2,))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    before = [p.detach().clone() for p in layers]
    for p in layers:
        p.grad.zero_()
    module = nn.ParameterList([*layers, frozen])
    config = OptimConfig(name="sgd", lr=0.1, weight_decay=0.5, decay_all=decay_all)
    optimizer = optim.build(module, config)["optimizer"]
    optimizer.step()
    assert [not torch.equal(p, old) for p, old in zip(layers, before, strict=True)] == moved
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
