"""lightly's decoupled losses and the tasks of Lightning Bolts, on random configurations each."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fused_nce.compat import bolts, lightly
from tests.compat import dense
from tests.compat.harness import both, unit


def spread(a, b):
    """A weight with a gradient."""
    return (a - b).square().sum(1)


@both
def test_lightly_dcl(at):
    """Without weights, with weights of one's own, and with the paper's."""
    g, pick = at.generator, at.pick
    n, width, temperature = pick.randint(2, 20), pick.choice((3, 16, 33)), pick.choice((0.07, 0.1, -0.5))
    views = [torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2)]
    sigma = pick.choice((0.2, 0.5))

    def mises_fisher(a, b):
        return 2 - n * ((a * b).sum(1) / sigma).softmax(0).detach()

    loss, weight_fn = pick.choice(
        (
            (lightly.DCLLoss(temperature), None),
            (lightly.DCLLoss(temperature, weight_fn=spread), spread),
            (lightly.DCLWLoss(temperature, sigma), mises_fisher),
        )
    )
    at.agree(loss, lambda a, b: dense.dcl(a, b, temperature, weight_fn), views)


@both
def test_bolts_simclr(at):
    """As a method; upstream's eps, which it adds to the denominators, is nothing here."""
    g, pick = at.generator, at.pick
    n, width, temperature = pick.randint(2, 20), pick.choice((3, 16)), pick.choice((0.1, 0.5))
    views = [unit(n, width, generator=g) for _ in range(2)]
    at.agree(
        lambda a, b: bolts.SimCLR().nt_xent_loss(a, b, temperature, eps=1e-6),
        lambda a, b: dense.nt_xent(a, b, temperature),
        views,
    )


@both
def test_bolts_cpc_task(at):
    """The loss by the maps, and by one parameter of each part."""
    g, pick = at.generator, at.pick
    images, channels, height, width = pick.randint(1, 2), pick.choice((2, 5)), pick.randint(3, 5), pick.randint(3, 4)
    torch.manual_seed(at.seed)
    task = bolts.CPCTask(channels, target_dim=pick.choice((3, 8)), embed_scale=pick.choice((0.1, 1.0)))
    task.context_cnn = bolts.PixelCNN(channels, hidden_channels=8, num_blocks=2)  # 256 channels take their time
    exact = copy.deepcopy(task).double()
    context = nn.Sequential(exact.context_cnn, exact.pred_cnn)
    task = task.to(at.dtype)
    z = torch.randn(images, channels, height, width, generator=g, dtype=torch.float64)

    def formula(z):
        targets, predictions = (f(z).permute(0, 2, 3, 1) for f in (exact.target_cnn, context))
        return dense.cpc(targets, predictions, exact.embed_scale)

    at.agree(task, formula, [z])
    for name in ("target_cnn.weight", "pred_cnn.weight", "context_cnn.blocks.1.2.weight") if at.seed < 9 else ():
        (want,) = torch.autograd.grad(formula(z), exact.get_parameter(name))
        (have,) = torch.autograd.grad(task(z.to(at.dtype)), task.get_parameter(name))
        torch.testing.assert_close(have.double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_pixel_cnn_sees_nothing_below():
    net = bolts.PixelCNN(3, hidden_channels=32)  # with few, a draw may leave every ReLU of a path shut
    z = torch.randn(1, 3, 5, 4, requires_grad=True)
    (seen,) = torch.autograd.grad(net(z)[:, :, 2].sum(), z)
    assert seen[:, :, 3:].abs().max() == 0
    assert seen[:, :, 1].abs().max() > 0
    assert list(net.state_dict())[:2] == ["blocks.0.0.weight", "blocks.0.0.bias"]
    assert {name.split(".")[2] for name in net.state_dict()} == set("0246")


@both
def test_bolts_feature_maps(at):
    """Maps of any shape, both directions or one, at upstream's draws."""
    g, pick = at.generator, at.pick
    images, width, both_ways = pick.randint(2, 5), pick.choice((3, 8)), pick.random() < 0.5
    sides = [(1, 1), (2, 3), (3, 2)]
    maps = [torch.randn(images, width, *s, generator=g, dtype=torch.float64) for s in sides * 2]
    task = bolts.FeatureMapContrastiveTask("01, 02, 11", tclip=5.0, bidirectional=both_ways)

    def ours(*x):
        torch.manual_seed(at.seed)
        return task(x[:3], x[3:])

    def formula(*x):
        torch.manual_seed(at.seed)
        views, losses, penalty = (x[:3], x[3:]), [], 0
        for a, b in ((0, 1), (0, 2), (1, 1)):
            ways = []
            for there, back in (views, views[::-1])[: 1 + both_ways]:
                places = torch.randint(0, there[a].shape[2] * there[a].shape[3], (images,))
                source = torch.stack([y.flatten(1)[:, p] for y, p in zip(there[a], places, strict=True)])
                targets = back[b].permute(1, 0, 2, 3).reshape(width, -1)
                scores, _, square = dense.amdim_scores(source, targets, images, 5.0)
                ways.append((-scores.mean(), square))
            losses.append(sum(way[0] for way in ways) / len(ways))
            penalty = penalty + sum(way[1] for way in ways) / len(ways)
        return torch.stack(losses), penalty

    at.agree(ours, formula, maps)


def test_a_random_map_is_drawn():
    task = bolts.FeatureMapContrastiveTask("0r")
    maps = [torch.randn(3, 4, s, s) for s in (1, 2, 3)]
    torch.manual_seed(0)
    assert len({round(float(task(maps, maps)[0]), 5) for _ in range(20)}) > 2


def test_a_bank_of_another_dtype():
    """Half inputs against the float32 bank: upstream stops here."""
    for dtype in (torch.float16, torch.bfloat16):
        loss = lightly.NTXentLoss(0.1, memory_bank_size=(10, 4))
        out0, out1 = (torch.randn(3, 4).to(dtype).requires_grad_() for _ in range(2))
        kept = loss.get_buffer("memory_bank.bank").clone()
        value = loss(out0, out1)
        value.backward()
        rows = [nn.functional.normalize(x.detach().float(), dim=1).to(dtype) for x in (out0, out1)]
        logits = (
            torch.cat(((rows[0].float() * rows[1].float()).sum(1, keepdim=True), rows[0].float() @ kept.T), 1) / 0.1
        )
        torch.testing.assert_close(value, nn.functional.cross_entropy(logits, torch.zeros(3).long()))
        assert [None if x.grad is None else x.grad.dtype for x in (out0, out1)] == [dtype] * 2
