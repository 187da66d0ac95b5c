"""Golden values of the family, its identities, and what happens where a batch, a label or a queue has too little."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fused_nce import (
    InfoNCELoss,
    MoCoLoss,
    SupConLoss,
    clip_loss,
    info_nce,
    moco_nce,
    npid_softmax,
    nt_xent,
    siglip_loss,
    sup_con,
    tile_loss,
    tile_stats,
)
from fused_nce.core.spec import Block, Index, Labels, Separate, Spec
from fused_nce.core.tails import LogOut, Nce
from tests.refusals import unlike

SCORES = torch.tensor([[2, 0.5, -0.5], [1, 3, 0], [-1, 2, 1]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
ANGLES = torch.tensor([0, 90, 200, 20, 100, 170], dtype=torch.float64).deg2rad()
UNIT = torch.stack((ANGLES.cos(), ANGLES.sin()), dim=1)
LABELS = torch.tensor([0, 1, 0, 0, 1, 0])


# ---- golden values ----------------------------------------------------------------------------------------------


def test_golden_info_nce(wide):
    """Identity queries make the keys the scores."""
    one_way = info_nce(EYE, SCORES.T, temperature=1.0, backend=wide)
    both = info_nce(EYE, SCORES.T, temperature=1.0, symmetric=True, backend=wide)
    assert one_way.loss.item() == pytest.approx(0.5950753787105353, rel=1e-15)
    assert both.loss.item() == pytest.approx(0.4950243614767367, rel=1e-15)
    assert clip_loss(EYE, SCORES.T, 1.0, backend=wide).loss.item() == pytest.approx(0.4950243614767367, rel=1e-15)
    assert one_way.stats["top1"].item() == pytest.approx(2 / 3)


def test_golden_nt_xent_and_sup_con(wide):
    found = nt_xent(UNIT[:3], UNIT[3:], temperature=0.5, backend=wide)
    assert found.loss.item() == pytest.approx(0.41498628068925864, rel=1e-14)
    out, inside = (sup_con(UNIT, LABELS, temperature=0.5, variant=v, backend=wide).loss.item() for v in ("out", "in"))
    assert out == pytest.approx(2.0598666866277586, rel=1e-14)
    assert inside == pytest.approx(1.114995272438782, rel=1e-14)


def test_one_positive_each_makes_all_of_them_one_loss(wide):
    """NT-Xent = SupCon of either form with a label an image = InfoNCE of Index targets without the row itself."""
    z = torch.randn(8, 5, dtype=torch.float64)
    labels, targets = torch.arange(4).repeat(2), torch.arange(8).roll(4)
    expected = nt_xent(z[:4], z[4:], normalize=False, temperature=0.5, backend=wide).loss
    for variant in ("out", "in"):
        found = sup_con(z, labels, temperature=0.5, variant=variant, normalize=False, backend=wide).loss
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    spec = Spec(Index(), stats=Nce().stats, drop_self=True)
    found = tile_loss(z, None, spec, Nce(), scale=2.0, row_ids=targets, backend=wide).loss
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("margin", [5.0, 20.0, 40.0, 200.0])
def test_a_lone_positives_gradient_does_not_cancel(wide, margin):
    """SupCon at p → 1: the positive's weight is −σ(neg_lse − pos), where p − 1/|P| would have no digit left."""
    scores = torch.zeros(2, 4, dtype=torch.float64)
    scores[0, 0] = scores[1, 1] = margin
    q, k = torch.eye(2, dtype=torch.float64), scores.T.clone().requires_grad_()
    spec = Spec(Labels(), stats=LogOut.READS)
    out = tile_loss(
        q, k, spec, LogOut(), row_ids=torch.tensor([0, 1]), column_ids=torch.tensor([0, 1, 2, 2]), backend=wide
    )
    (slopes,) = torch.autograd.grad(out.loss, k)
    missed = 3 / (math.exp(margin) + 3)
    assert slopes[0, 0].item() == pytest.approx(-missed / 2, rel=1e-12)
    assert out.loss.item() == pytest.approx(math.log1p(3 * math.exp(-margin)), rel=1e-12)


def test_normalize_is_the_loss_of_unit_rows(wide):
    a, b, queue = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    unit_a, unit_b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    pairs = [
        (info_nce(a, b, normalize=True, backend=wide), info_nce(unit_a, unit_b, backend=wide)),
        (nt_xent(a, b, backend=wide), nt_xent(unit_a, unit_b, normalize=False, backend=wide)),
        (moco_nce(a, b, queue, backend=wide), moco_nce(unit_a, unit_b, queue, normalize=False, backend=wide)),
        (sup_con(a, LABELS, backend=wide), sup_con(unit_a, LABELS, normalize=False, backend=wide)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["info_nce", "symmetric", "nt_xent", "moco", "clip", "siglip", "sup_con"])
def test_many_strips_and_panels(name, monkeypatch):
    """Three strips of rows at the least, and panels that do not divide: what the strips hand on must add up."""
    a, b = (torch.randn(300, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
    labels = torch.randint(20, (300,))
    losses = {
        "info_nce": lambda w: info_nce(a, b, torch.arange(300).flip(0), clip=9.0, penalty=0.1, backend=w),
        "symmetric": lambda w: info_nce(a, b, torch.randperm(300), symmetric=True, temperature=0.5, backend=w),
        "nt_xent": lambda w: nt_xent(a, b, backend=w),
        "moco": lambda w: moco_nce(a, b, b, backend=w),
        "clip": lambda w: clip_loss(a, b, 2.0, backend=w),
        "siglip": lambda w: siglip_loss(a, b, 2.0, -1.0, backend=w),
        "sup_con": lambda w: sup_con(a, labels, backend=w),
    }
    leaves = [a] if name in ("moco", "sup_con") else [a, b]
    results = []
    for backend, workspace_mb in (("reference", "16"), ("chunked", "0.1"), ("chunked", "0.5")):
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
        torch.manual_seed(0)
        loss = losses[name](backend).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


# ---- too little -------------------------------------------------------------------------------------------------


def test_anchors_without_a_positive_count_as_zero(wide):
    """Labels of their own: loss 0 for them, and they still count in the mean; the gradient is finite everywhere."""
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    some = sup_con(z, torch.tensor([0, 0, 1, 2]), backend=wide)
    rows = sup_con(z, torch.tensor([0, 0, 1, 2]), backend="reference")
    assert some.loss.isfinite()
    assert torch.autograd.grad(some.loss, z)[0].isfinite().all()
    none = sup_con(z, torch.arange(4), backend=wide)
    assert none.loss.item() == 0
    assert not torch.autograd.grad(none.loss, z)[0].any()
    torch.testing.assert_close(some.loss, rows.loss)


def test_one_label_has_no_negatives(wide):
    """All rows positives: log_in is log of the mean's share, log |P| − log |P| = 0; nothing is NaN."""
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    same = torch.zeros(5, dtype=torch.int64)
    inside, out = (sup_con(z, same, variant=variant, backend=wide).loss for variant in ("in", "out"))
    assert inside.item() == pytest.approx(math.log(4), rel=1e-14)  # all_lse − log mean = log |P|
    assert out.item() >= inside.item()
    assert torch.autograd.grad(out, z)[0].isfinite().all()


@pytest.mark.parametrize("both", [False, True])
def test_a_batch_of_one(wide, both):
    x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    losses = []
    for call in (
        lambda: info_nce(x, 2 * x, symmetric=both, backend=wide),
        lambda: nt_xent(x, 2 * x, backend=wide),
        lambda: sup_con(x, torch.tensor([7]), backend=wide),
    ):
        with pytest.warns(UserWarning, match="no negatives"):
            losses.append(call().loss)
    losses.append(moco_nce(x, x, torch.ones(1, 3, dtype=torch.float64), backend=wide).loss)
    assert [loss.item() for loss in losses[:3]] == [0, 0, 0]
    for loss in losses:
        assert torch.autograd.grad(loss, x)[0].isfinite().all()


def test_a_key_bank_may_change_before_the_backward_and_have_its_own_dtype(wide):
    q, keys, queue = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    q.requires_grad_()
    expected = torch.autograd.grad(moco_nce(q, keys, queue, backend=wide).loss, q)[0]
    loss = moco_nce(q, keys, queue, backend=wide).loss
    queue.zero_()
    assert torch.equal(torch.autograd.grad(loss, q)[0], expected)
    bank = torch.randn(9, 3).bfloat16()
    torch.testing.assert_close(
        moco_nce(q, keys, bank, backend=wide).loss, moco_nce(q, keys, bank.double(), backend=wide).loss
    )


# ---- refusals ---------------------------------------------------------------------------------------------------

A, B = torch.ones(4, 3), torch.ones(4, 3)
T = torch.arange(4)
FLOAT: Any = 0.0
ERRORS = [
    (lambda: info_nce(A, B[:3]), ValueError, r"^keys: got N = 3, need queries's 4, or targets$"),
    (lambda: info_nce(A, B, T.int()), TypeError, r"^targets: got torch.int32, need int64$"),
    (lambda: info_nce(A, B, T[:2]), ValueError, r"^targets: got shape \(2,\), need \(N,\) = \(4,\)$"),
    (lambda: info_nce(A, B, T + 1), ValueError, r"^targets: got 4, need 0 <= index < 4$"),
    (lambda: info_nce(A, B, T - 1), ValueError, r"^targets: got -1, need 0 <= index < 4$"),
    (lambda: info_nce(A, B, T // 2, symmetric=True), ValueError, r"^targets: got one key twice .*permutation.*$"),
    (lambda: info_nce(A, B[:3], T, symmetric=True), ValueError, r"^targets: got N = 4 for M = 3 keys, need .*$"),
    (lambda: info_nce(A, B, temperature=0), ValueError, r"^temperature: got 0, need a finite number > 0$"),
    (lambda: info_nce(A, B, temperature=-1.0), ValueError, r"^temperature: got -1.0, need a finite number > 0$"),
    (lambda: info_nce(A, B, clip=0.0), ValueError, r"^clip: got 0.0, need a finite number > 0$"),
    (lambda: info_nce(A, B, reduction="max"), ValueError, r"^reduction: got 'max', need one of .*$"),
    (lambda: nt_xent(A, B.double()), TypeError, r"^view1: got torch.float64, need view0's torch.float32 .*$"),
    (lambda: moco_nce(A, B, B[:, :2]), ValueError, r"^queue: got width D = 2, need queries's 3$"),
    (lambda: moco_nce(A, B, B[:0]), ValueError, r"^queue: got shape \(0, 3\), need \(K, D\) with K >= 1$"),
    (lambda: clip_loss(A, B, math.nan), ValueError, r"^logit_scale: got nan, need a finite number > 0$"),
    (lambda: siglip_loss(A, B, 1.0, torch.ones(1)), ValueError, r"^logit_bias: got a .* need a 0-d float tensor$"),
    (lambda: sup_con(A, T[:3]), ValueError, r"^labels: got shape \(3,\), need \(N,\) = \(4,\)$"),
    (lambda: sup_con(A, T, variant="both"), ValueError, r"^variant: got 'both', need one of 'out', 'in'$"),
    (lambda: SupConLoss(0.0), ValueError, r"^temperature: got 0.0, need a finite number > 0$"),
    (lambda: MoCoLoss(math.inf), ValueError, r"^temperature: got inf, need a finite number > 0$"),
    (lambda: InfoNCELoss(0.0), ValueError, r"^temperature: got 0.0, need a finite number > 0$"),
    # the engine's own
    (lambda: tile_stats(A, B, Spec(Index())), TypeError, r"^targets: got NoneType, need a \(N,\) int64 tensor$"),
    (lambda: tile_stats(A, B, Spec(Block()), row_ids=T), ValueError, r"^row_ids: got a tensor with the layout bl.*$"),
    (lambda: tile_stats(A, B, Spec(Separate())), TypeError, r"^positives: got NoneType, need a \(N, P\) tensor$"),
    (lambda: tile_stats(A, B, Spec(Block()), bias=1.0), ValueError, r"^bias: got one with identity\(\), need .*$"),
    (lambda: tile_stats(A, B, Spec(Block()), offset=FLOAT), TypeError, r"^offset: got float, need an int$"),
    (lambda: tile_stats(A, B, Spec(Block()), offset=False), TypeError, r"^offset: got bool, need an int$"),
    (
        lambda: tile_stats(A, None, Spec(Block(), stats=("pos_gap",))),
        ValueError,
        r"^spec: got statistics .* need pos_count, pos_lse, pos_sum beside pos_gap$",
    ),
    (
        lambda: tile_stats(A, None, Spec(Block(2, 1), drop_self=True)),
        ValueError,
        r"^spec: got n_c = 2, rows_per_image = 1, need the same .*$",
    ),
    (
        lambda: tile_loss(A, None, Spec(Labels()), Nce(), row_ids=T),
        ValueError,
        r"^spec: got the layout labels\(\), need one with a fixed number of positives$",
    ),
    (
        lambda: tile_stats(A, None, Spec(Labels()), row_ids=T, backend="triton"),
        ValueError,
        r"^backend: got 'triton', which cannot run this: .*$",
    ),
]


def test_messages():
    assert unlike(ERRORS) == []


def test_npid_of_several_batches_by_vmap():
    """Each batch's indices are looked at, and its own."""
    bank, features = torch.randn(7, 4), torch.randn(2, 3, 4)
    indices = torch.tensor([[0, 1, 2], [6, 5, 4]])
    losses = [npid_softmax(f, bank, i).loss for f, i in zip(features, indices, strict=True)]
    found = torch.vmap(lambda f, i: npid_softmax(f, bank, i).loss)(features, indices)
    torch.testing.assert_close(found, torch.stack(losses))
    with pytest.raises(ValueError, match=r"^indices: got 7, need 0 <= index < 7$"):
        torch.vmap(lambda f, i: npid_softmax(f, bank, i).loss)(features, indices + 1)
