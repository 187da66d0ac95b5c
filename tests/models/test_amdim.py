"""AMDIM in a loop of one's own: no trainer, no accelerate, no command line."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fused_nce.losses import AMDIMLoss, MultiscaleMixtureLoss, amdim_mixture_nce
from fused_nce.models import AMDIM


def small(**settings):
    torch.manual_seed(0)
    return AMDIM(**({"image_size": 32, "ndf": 4, "n_rkhs": 16, "n_depth": 1} | settings))


def test_five_line_loop_learns():
    model = small(ndf=8, n_rkhs=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    images = torch.rand(16, 3, 32, 32)
    losses = []
    for _ in range(30):
        views = (images + 0.05 * torch.randn_like(images), images + 0.05 * torch.randn_like(images))
        optimizer.zero_grad()
        losses.append(model(views).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 2  # nats, summed over three pairs
    assert all(p.grad is not None for p in model.parameters())


def test_the_forms_of_a_batch_are_the_same():
    model, x = small(), torch.randn(4, 2, 3, 32, 32)
    results = []
    for batch in (x, (x[:, 0], x[:, 1]), [x[:, 0], x[:, 1]]):
        torch.manual_seed(1)
        results.append(model(batch).loss)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_forward_is_the_loss_of_the_two_encodings():
    model, x = small(), torch.randn(4, 2, 3, 32, 32)
    torch.manual_seed(1)
    out = model(x)
    torch.manual_seed(1)
    expected = AMDIMLoss()(model.encode(x[:, 0]), model.encode(x[:, 1]))
    assert torch.equal(out.loss, expected.loss)
    torch.testing.assert_close(out.loss, out.nce + out.penalty)


def test_hooks_of_the_encoder_are_called():
    model, seen = small(), []
    model.encoder.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    model(torch.randn(4, 2, 3, 32, 32))
    assert seen == [2]  # both views at once


def test_the_loss_can_be_replaced():
    class Distance(nn.Module):
        def forward(self, view1, view2):
            loss = (view1["f1"] - view2["f1"]).square().mean()
            return SimpleNamespace(loss=loss, nce=loss, penalty=0 * loss, stats={})

    model, x = small(loss=Distance()), torch.randn(4, 3, 32, 32)
    assert model((x, x)).loss == 0
    assert model((x, -x)).loss > 0


def test_encode_in_eval_mode_treats_images_one_by_one():
    model, x = small().eval(), torch.randn(4, 3, 32, 32)
    together, alone = model.encode(x), model.encode(x[:1])
    assert set(together) == {"f1", "f5", "f7", "h5", "h7"}
    for tap, values in together.items():
        torch.testing.assert_close(values[:1], alone[tap])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 32, 32)] * 2, "batch: must hold at least 2 images, got 1"),
        ([(4, 3, 32, 32)] * 3, "batch: must hold 2 views, got 3"),
        ([(4, 3, 32, 32), (5, 3, 32, 32)], "batch: the views must have one shape"),
        ([(4, 3, 64, 64)] * 2, r"x: must be \(B, 3, 32, 32\) images, got \(4, 3, 64, 64\)"),
        ([(4, 1, 32, 32)] * 2, r"x: must be \(B, 3, 32, 32\) images, got \(4, 1, 32, 32\)"),
    ],
)
def test_refusals(shapes, message):
    with pytest.raises(ValueError, match=message):
        small()([torch.zeros(shape) for shape in shapes])


def test_a_tensor_of_another_rank_is_refused():
    with pytest.raises(ValueError, match=r"batch: a tensor must be \(B, 2, 3, H, W\), got \(4, 3, 32, 32\)"):
        small()(torch.zeros(4, 3, 32, 32))


def test_a_mixture_stands_for_f1_in_its_pairs_and_in_no_other():
    torch.manual_seed(0)
    model = small(mixture=3, loss=MultiscaleMixtureLoss(antecedents="all", tau=2.0, penalty=0.1)).double()
    views = torch.rand(2, 6, 3, 32, 32, dtype=torch.float64)
    taps, inputs = model.embed(tuple(views))
    assert [sorted(view) for view in taps] == [["f1", "f5", "f7", "h5", "h7"]] * 2  # a mixture is no tap
    found = model.loss(*inputs)
    columns = [{name: x[f"f{name}"].flatten(2).transpose(1, 2) for name in "57"} for x in inputs]
    rows = [x["f1"].flatten(1)[:, None] + model.components.net(x["f1"].flatten(1)).view(6, 3, -1) for x in taps]
    alone = AMDIMLoss(["5>5"], "all", penalty=0.1)(*taps)
    mixed = [amdim_mixture_nce(rows[i], columns[1 - i][t], tau=2.0, penalty=0.1) for t in "57" for i in (0, 1)]
    torch.testing.assert_close(found.loss, alone.loss + sum(one.loss for one in mixed) / 2)
    torch.testing.assert_close(found.penalty, alone.penalty + sum(one.penalty for one in mixed) / 2)
    assert found.stats["5>5/top1"] == alone.stats["5>5/top1"]
    assert 0 < found.stats["entropy"] <= math.log(3) + 1e-9
    found.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.components.parameters())
    assert not torch.allclose(rows[0][:, 0], rows[0][:, 1])  # components that are alike would stay so


def test_a_mixture_needs_a_pair_from_f1():
    with pytest.raises(ValueError, match=r"^pairs: got \('5>5',\), need one from map 1"):
        MultiscaleMixtureLoss(["5>5"])
    with pytest.raises(ValueError, match=r"^mixture: got 0, need >= 1$"):
        small(mixture=0)
