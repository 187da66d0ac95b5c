"""MoCo, SimCLR, SupCon and NPID in a loop of one's own: what a batch becomes, what follows a step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_nce.losses import NPIDSoftmaxLoss, sup_con
from fused_nce.losses.nt_xent import oracle as nt_xent_oracle
from fused_nce.models import NPID, MoCo, SimCLR, SupCon
from fused_nce.models.npid import MemoryBank
from tests.refusals import unlike

MINI: dict[str, Any] = {"backbone": "mini", "dim": 16}


def views(count=8, seed=0):
    images = torch.randn(2, count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return images[0], images[1]


def moco(**settings):
    torch.manual_seed(0)
    return MoCo(**({**MINI, "queue_size": 12, "momentum": 0.9} | settings))


def batch_of(model, count=8, seed=0):
    indices = torch.arange(count)
    parts = {SupCon: (*views(count, seed), indices % 3), NPID: (views(count, seed)[0], indices)}
    return parts.get(type(model), views(count, seed))


MODELS = [lambda: moco(), lambda: SimCLR(**MINI), lambda: SupCon(**MINI), lambda: NPID(size=20, **MINI)]


@pytest.mark.parametrize("make", MODELS)
def test_a_loop_of_ones_own_learns(make):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(model(batch_of(model)).loss)
        losses[-1].backward()
        optimizer.step()
        model.after_step()
    start = losses[1] if isinstance(model, MoCo) else losses[0]  # MoCo starts with two equal encoders
    assert max(losses[10:]) < 0.6 * start
    assert all(p.grad is not None for p in model.trained_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS)
def test_in_another_dtype_a_model_and_its_memory_are_near_their_own(make, dtype):
    losses = []
    for kind in (torch.float32, dtype):
        torch.manual_seed(0)
        model = make().to(kind)
        batch = [x.to(kind) if x.is_floating_point() else x for x in batch_of(model)]
        model(batch).loss.backward()
        model.after_step()
        losses.append(model(batch).loss.double())  # of what is in the memory now
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1 if dtype == torch.bfloat16 else 1e-4, atol=0)


@pytest.mark.parametrize("make", MODELS)
def test_taps_and_the_injected_loss(make):
    class Sum(nn.Module):
        def forward(self, *inputs):
            total = inputs[0].sum()
            return SimpleNamespace(loss=total, nce=total, penalty=0 * total, stats={})

    model = make()
    taps = model.eval().encode(views()[0])
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {"h": (8, 128), "z": (8, 16)}
    model.loss = Sum()
    embedded = model.embed(batch_of(model))
    assert torch.equal(model(batch_of(model)).loss, embedded.inputs[0].sum())
    assert all(view["h"].shape == (8, 128) for view in embedded.taps)
    with pytest.raises(ValueError, match=r"x: must be \(B, 3, H, W\) images, got \(8, 1, 16, 16\)"):
        model.encode(torch.zeros(8, 1, 16, 16))


@pytest.mark.parametrize("make", [MODELS[0], MODELS[3]])
def test_a_skipped_step_leaves_no_trace_in_memory_or_keys(make):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(("mean", "var", "tracked"))}
    model(batch_of(model))
    model.after_step(skipped=True)
    after = model.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    model(batch_of(model))
    model.after_step()
    name = f"{model.memories[0]}.{'keys' if isinstance(model, MoCo) else 'vectors'}"
    assert int((model.state_dict()[name] != before[name]).any(1).sum()) == 8  # and not 16


def test_a_forgotten_after_step_is_an_error(monkeypatch):
    monkeypatch.setattr("fused_nce.models.base.MAX_PENDING", 3)
    model = moco()
    for _ in range(3):
        model(views())
    with pytest.raises(RuntimeError, match="after_step: not called for 3 passes"):
        model(views())


def test_simclr_is_its_formula_with_the_statistics_of_both_views():
    torch.manual_seed(0)
    model = SimCLR(**MINI)
    z = model.head(model.encoder(torch.cat(views()))).double().chunk(2)
    torch.testing.assert_close(model(views()).loss.double(), nt_xent_oracle(*z, temperature=0.5), rtol=1e-5, atol=1e-6)


def test_supcon_gives_each_view_its_images_label():
    torch.manual_seed(0)
    model, labels = SupCon(**MINI).eval(), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    z = torch.cat([model.encode(view)["z"] for view in views()])
    expected = sup_con(z, torch.cat((labels, labels)))
    torch.testing.assert_close(model((*views(), labels)).loss, expected.loss)
    with pytest.raises(ValueError, match="batch: must hold 2 views and labels, got 2 parts"):
        model(views())


def test_the_bank_moves_by_its_momentum_and_stays_on_the_sphere():
    torch.manual_seed(0)
    bank = MemoryBank(4000, 32, 0.3)
    assert bank.vectors.norm(dim=1).mean() == pytest.approx(1, abs=0.02)
    assert bank.vectors.abs().max() <= (3 / 32) ** 0.5
    before = bank.vectors.clone()
    features, rows = F.normalize(torch.randn(3, 32), dim=1), torch.tensor([7, 2, 5])
    bank.update(features, rows)
    torch.testing.assert_close(bank.vectors[rows], F.normalize(0.3 * before[rows] + 0.7 * features, dim=1))
    rest = torch.ones(4000, dtype=torch.bool).scatter(0, rows, False)
    assert torch.equal(bank.vectors[rest], before[rest])


def test_npid_classifies_among_all_images_and_remembers_its_own():
    torch.manual_seed(0)
    model = NPID(size=20, **MINI)
    indices = torch.tensor([3, 19, 0, 7, 11, 2, 5, 13])
    before = model.bank.vectors.clone()
    features, bank, rows = model.embed((views()[0], indices)).inputs
    logits = features.double() @ before.double().T / 0.07
    torch.testing.assert_close(model.loss(features, bank, rows).loss.double(), F.cross_entropy(logits, indices))
    model.after_step()
    expected = F.normalize(0.5 * before[indices] + 0.5 * features, dim=1)
    torch.testing.assert_close(model.bank.vectors[indices], expected)
    with pytest.raises(ValueError, match=r"batch: must hold images and their indices, got lengths \[8, 3\]"):
        model((views()[0], indices[:3]))


def test_the_proximal_term_is_two_minus_twice_the_cosine():
    torch.manual_seed(0)
    features, bank = (F.normalize(torch.randn(n, 8), dim=1) for n in (4, 9))
    rows = torch.tensor([8, 0, 3, 3])
    plain = NPID(size=9, **MINI).loss
    out = NPIDSoftmaxLoss(proximal=0.3)(features, bank, rows)
    pull = 0.3 * (2 - 2 * (features * bank[rows]).sum(1)).mean()
    torch.testing.assert_close(out.loss, plain(features, bank, rows).loss + pull)
    torch.testing.assert_close(out.penalty, pull)


ERRORS = [
    (lambda: MoCo(**MINI, momentum=1.5), ValueError, r"^momentum: must be in \[0, 1\], got 1.5$"),
    (lambda: MoCo(**MINI, splits=0), ValueError, "^splits: got 0, need >= 1$"),
    (lambda: MoCo(**MINI, queue_size=0), ValueError, "^size: got 0, need >= 1$"),
    (lambda: SimCLR(**MINI, layers=0), ValueError, "^layers: got 0, need >= 1$"),
    (lambda: NPID(size=0, **MINI), ValueError, "^size: got 0, need >= 1$"),
    (lambda: NPID(size=5, **MINI, momentum=1.0), ValueError, r"^momentum: must be in \[0, 1\), got 1.0$"),
]


def test_bad_numbers_are_refused():
    assert unlike(ERRORS) == []
