"""Pairs and triplets: golden values, every triplet by brute force, ties, and where there is too little of something."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fused_nce import PairContrastiveLoss, TripletMarginLoss, pair_contrastive, tile_stats, triplet_margin
from fused_nce.core.spec import Dist, Labels, Spec, SqDist
from fused_nce.losses import triplet
from tests.losses.conftest import normal
from tests.refusals import unlike

MININGS = ("hard", "semihard", "all")
LINE = torch.tensor([[0.0], [1.0], [1.5], [4.0]], dtype=torch.float64)  # distances 1, 1.5, 4, 0.5, 3, 2.5
TWO = torch.tensor([0, 0, 1, 1])


def slopes(loss, x):
    return torch.autograd.grad(loss, x)[0]


# ---- golden values ----------------------------------------------------------------------------------------------


def test_golden_pairs(wide):
    """Four points on a line, two labels, margin 2: d² of (0,1) and (2,3), (2 − d)² of the near others."""
    x = LINE.clone().requires_grad_()
    found = pair_contrastive(x, TWO, margin=2.0, backend=wide)
    positives, negatives = (1 + 2.5**2) / 2 / 6, (0.5**2 + 1.5**2) / 2 / 6  # (0,2): 2 − 1.5, (1,2): 2 − 0.5
    assert found.stats["positives"].item() == pytest.approx(positives, rel=1e-14)
    assert found.stats["negatives"].item() == pytest.approx(negatives, rel=1e-14)
    assert found.loss.item() == pytest.approx(positives + negatives, rel=1e-14)
    # d/dx of the row 0: −d of its positive, + (2 − d) of its near negative; they push the other way on the others.
    expected = torch.tensor([-1 + 0.5, 1 + 1.5, -2.5 - 0.5 - 1.5, 2.5], dtype=torch.float64) / 6
    torch.testing.assert_close(slopes(found.loss, x)[:, 0], expected, rtol=1e-13, atol=1e-15)


def test_golden_triplets(wide):
    """On the same line, plain distances and margin 1; of a 1, p 2.5 and n 0.5, 1.5, 3, 4."""
    options = {"margin": 1.0, "normalize": False, "squared": False, "backend": wide}
    hinges = {  # anchor: 1 + d(a,p) − d(a,n) of its two negatives
        0: (1 + 1 - 1.5, 1 + 1 - 4),
        1: (1 + 1 - 0.5, 1 + 1 - 3),
        2: (1 + 2.5 - 1.5, 1 + 2.5 - 0.5),
        3: (1 + 2.5 - 4, 1 + 2.5 - 3),
    }
    every = [max(0.0, h) for pair in hinges.values() for h in pair]
    hard = [max(0.0, *pair) for pair in hinges.values()]
    semihard = [hinges[0][0], 0, 0, hinges[3][1]]  # 1: nothing within (1, 2); 2: both negatives are nearer than 2.5
    expected = {"hard": sum(hard) / 4, "semihard": sum(semihard) / 4, "all": sum(every) / 8}
    active = {"hard": 4 / 4, "semihard": 2 / 4, "all": 5 / 8}
    for mining in MININGS:
        found = triplet_margin(LINE, TWO, mining=mining, **options)
        assert found.loss.item() == pytest.approx(expected[mining], rel=1e-13), mining
        assert found.stats["active"].item() == pytest.approx(active[mining], rel=1e-13), mining
    assert triplet_margin(LINE, TWO, mining="hard", **options).stats["violated"].item() == 0.5


def test_golden_similarity_and_squares(wide):
    """Unit vectors at 0, 60, 90°, the first two of one label: ⟨a,p⟩ = ½, ⟨a,n⟩ = 0 and √3/2; d² = 2 − 2⟨a,b⟩."""
    angles = torch.tensor([0, 60, 90], dtype=torch.float64).deg2rad()
    x, labels = 3 * torch.stack((angles.cos(), angles.sin()), 1), torch.tensor([7, 7, 1])
    hinge = 0.2 - 0.5 + math.sqrt(3) / 2
    for mining, triplets in (("hard", 3), ("all", 2), ("semihard", 2)):
        found = triplet_margin(x, labels, form="similarity", mining=mining, backend=wide).loss.item()
        assert found == pytest.approx(0 if mining == "semihard" else hinge / triplets, rel=1e-13, abs=1e-15), mining
    hinge = 0.2 + 1 - (2 - math.sqrt(3))
    assert triplet_margin(x, labels, mining="all", backend=wide).loss.item() == pytest.approx(hinge / 2, rel=1e-13)


# ---- against brute force ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("seed", range(6))
def test_rows_with_ties_and_without_partners(wide, mining, seed, monkeypatch):
    """Points of a small grid: equal distances, equal points and hinges at exactly 0 are the rule. Strips of one row."""
    g = torch.Generator().manual_seed(seed)
    n = 5 + 3 * seed
    x = torch.randint(-2, 3, (n, 2), generator=g).double().requires_grad_()
    labels = torch.randint(0, 1 + n // 3, (n,), generator=g)
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", str(26 * 8 * (n + 1) / 2**20 if mining != "hard" else 0.0004))
    options = {"margin": 2.0, "mining": mining, "normalize": False}
    found = triplet_margin(x, labels, **options, backend=wide)
    exact = triplet.oracle(x, labels, **options)
    assert found.loss.item() == pytest.approx(exact.item(), rel=1e-13, abs=1e-15)
    if mining != "semihard":  # which of two equally near negatives is taken is no one's business
        torch.testing.assert_close(slopes(found.loss, x), slopes(exact, x), rtol=1e-12, atol=1e-14)
    again = slopes(triplet_margin(x, labels, **options, backend=wide).loss, x)
    torch.testing.assert_close(again.sum(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-13)  # no net push


@pytest.mark.parametrize("mining", MININGS)
def test_many_strips_and_panels(mining, monkeypatch):
    x, labels = normal(150, 6), torch.randint(9, (150,), generator=torch.Generator().manual_seed(1))
    results = []
    for backend, workspace_mb in (("reference", "16"), ("chunked", "0.04"), ("chunked", "0.3")):
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
        found = [triplet_margin(x, labels, mining=mining, squared=s, backend=backend).loss for s in (True, False)]
        found.append(pair_contrastive(x, labels, margin=2.0, backend=backend).loss)
        results.append([*found, *(slopes(loss, x) for loss in found)])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-11, atol=1e-14)


def test_mean_over_the_active_ones(wide):
    """loss / active is what libraries call the mean over the non-zero triplets."""
    x, labels = normal(20, 4), torch.arange(20) % 4
    found = triplet_margin(x, labels, mining="all", squared=False, margin=0.3, backend=wide)
    z = torch.nn.functional.normalize(x, dim=1)
    d = (z[:, None] - z).norm(dim=2)
    same = labels[:, None] == labels
    hinges = [
        max(0.0, 0.3 + d[a, p].item() - d[a, n].item())
        for a, p, n in itertools.product(range(20), repeat=3)
        if a != p and same[a, p] and not same[a, n]
    ]
    positive = [h for h in hinges if h > 0]
    assert found.loss.item() == pytest.approx(sum(hinges) / len(hinges), rel=1e-12)
    assert found.stats["active"].item() == pytest.approx(len(positive) / len(hinges), rel=1e-12)
    assert (found.loss / found.stats["active"]).item() == pytest.approx(sum(positive) / len(positive), rel=1e-12)


@pytest.mark.parametrize("transform", [SqDist(), Dist()])
def test_distances_of_two_tensors(wide, transform):
    """q and k apart, a learnable scale: t = −scale·‖q − k‖² or its root, gradients against plain torch."""
    q, k, scale = normal(5, 3), normal(7, 3, seed=1), torch.tensor(1.7).double().requires_grad_()
    labels, others = torch.arange(5) % 2, torch.arange(7) % 3
    spec = Spec(Labels(), transform, ("pos_sum", "neg_hinge"))
    found = tile_stats(q, k, spec, scale=scale, row_ids=labels, column_ids=others, backend=wide)
    square = scale * (q[:, None] - k).square().sum(2)
    t = -square if isinstance(transform, SqDist) else -square.sqrt()
    own = labels[:, None] == others
    exact = {"pos_sum": (t * own).sum(1), "neg_hinge": (torch.relu(1 + t) * ~own).sum(1)}
    total, expected = ((x["pos_sum"] - 3 * x["neg_hinge"]).sum() for x in (found, exact))
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=1e-13)
    leaves = (q, k, scale)
    torch.testing.assert_close(
        torch.autograd.grad(total, leaves), torch.autograd.grad(expected, leaves), rtol=1e-11, atol=1e-12
    )


# ---- too little of something, bad numbers, refusals -------------------------------------------------------------


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1, 2], [4, 4, 4, 9]])
def test_nothing_to_compare_costs_nothing(wide, labels):
    """One row; no negatives; no positives: 0 and a gradient of 0. An odd one out has no positive, and no effect."""
    x, ids = normal(len(labels), 3), torch.tensor(labels)
    for mining in MININGS:
        found = triplet_margin(x, ids, mining=mining, backend=wide)
        if 9 not in labels:
            assert found.loss.item() == 0
            assert not slopes(found.loss, x).any()
        assert found.loss.isfinite()
        assert all(value.isfinite() for value in found.stats.values())
    pairs = pair_contrastive(x, ids, backend=wide)
    assert slopes(pairs.loss, x).isfinite().all()
    assert pairs.loss.item() >= 0


def test_equal_points_have_no_direction(wide):
    x = torch.ones(4, 3, dtype=torch.float64).requires_grad_()
    found = pair_contrastive(x, TWO, backend=wide)
    assert found.loss.item() == pytest.approx(4 / 6 / 2, rel=1e-14)
    assert not slopes(found.loss, x).any()
    for mining in MININGS:
        plain = triplet_margin(x, TWO, mining=mining, squared=False, backend=wide)
        assert plain.loss.item() == (0 if mining == "semihard" else pytest.approx(0.2, rel=1e-14))
        assert slopes(plain.loss, x).isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_is_never_hidden(wide, bad):
    """Neither by a hinge nor by a sort: it reaches the loss, and the gradients of its own row."""
    x = normal(6, 3)
    x.data[3, 1] = bad
    for labels in (torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 7, 1, 1])):
        losses = [pair_contrastive(x, labels, backend=wide).loss]
        losses += [triplet_margin(x, labels, mining=m, normalize=False, backend=wide).loss for m in MININGS]
        for loss in losses:
            assert not loss.isfinite()
            assert not slopes(loss, x)[3].isfinite().any()


def test_a_row_that_cannot_be_sorted_whole_is_refused(monkeypatch):
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.001")
    with pytest.raises(ValueError, match=r"^backend: .* the workspace of 1048 bytes is below the 4160 of one row's 40"):
        triplet_margin(torch.ones(40, 3), torch.arange(40), mining="all", backend="chunked")


X, T = torch.ones(4, 3), torch.arange(4)
ERRORS = [
    (lambda: triplet_margin(X[0], T), ValueError, r"^features: got shape \(3,\), need \(N, D\)$"),
    (lambda: triplet_margin(X, T[:2]), ValueError, r"^labels: got shape \(2,\), need \(N,\) = \(4,\)$"),
    (lambda: triplet_margin(X, T.int()), TypeError, r"^labels: got torch.int32, need int64$"),
    (lambda: triplet_margin(X, T, margin=0), ValueError, r"^margin: got 0, need a finite number > 0$"),
    (lambda: triplet_margin(X, T, mining="easy"), ValueError, r"^mining: got 'easy', need one of 'hard', .*$"),
    (lambda: TripletMarginLoss(form="cosine"), ValueError, r"^form: got 'cosine', need one of 'distance', .*$"),
    (lambda: TripletMarginLoss(form="similarity", squared=False), ValueError, r"^squared: got False with .*$"),
    (lambda: pair_contrastive(X, X), TypeError, r"^labels: got torch.float32, need int64$"),
    (lambda: PairContrastiveLoss(-1.0), ValueError, r"^margin: got -1.0, need a finite number > 0$"),
]


def test_messages():
    assert unlike(ERRORS) == []
