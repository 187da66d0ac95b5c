"""CPC, NPID, DIM and the closed forms: golden values, identities, what has too little."""

from __future__ import annotations

import math

import pytest
import torch

from fused_nce import (
    MINELoss,
    amdim_mixture_nce,
    amdim_nce,
    binary_nce,
    club,
    cpc_nce,
    dim_mi,
    gaussian_kl,
    info_nce,
    mine_dv,
    npid_softmax,
)
from fused_nce.losses.amdim_mixture import mixture
from tests.losses.conftest import normal

SCORES = torch.tensor([[2, 0.5, -0.5], [1, 3, 0], [-1, 2, 1]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
DV, JSD = -1.1721420694806857, 1.1453844392115755
ROWS, BOTH = 0.5950753787105353, 0.4950243614767367  # InfoNCE of the rows, and its mean with the columns'


# ---- CPC --------------------------------------------------------------------------------------------------------


def test_golden_cpc(wide):
    """A step is InfoNCE at temperature 1; two are averaged, or weighted."""
    predictions, targets = torch.stack((EYE, EYE)), torch.stack((SCORES.T, SCORES))
    columns = 2 * BOTH - ROWS
    found = cpc_nce(predictions, targets, backend=wide)
    assert found.loss.item() == pytest.approx(BOTH, rel=1e-14)
    assert cpc_nce(predictions, targets, weights=(3, 1), backend=wide).loss.item() == pytest.approx(
        (3 * ROWS + columns) / 4, rel=1e-14
    )
    assert found.stats["step0/top1"].item() == pytest.approx(2 / 3)
    assert found.stats["top1"].item() == pytest.approx(
        (found.stats["step0/top1"] + found.stats["step1/top1"]).item() / 2
    )


def test_cpc_within_sequences_is_each_sequence_alone(wide):
    p, t, groups = normal(2, 7, 4), normal(2, 7, 4, seed=1), torch.tensor([9, -1, 9, 3, -1, 9, -1])  # 3 is alone
    found = cpc_nce(p, t, negatives="sequence", groups=groups, backend=wide).loss
    alone = [
        info_nce(p[s][groups == g], t[s][groups == g], temperature=1.0, reduction="sum", backend=wide).loss
        for s in range(2)
        for g in (9, -1)
    ]
    expected = torch.stack(alone).sum() / 14
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    grads, exact = torch.autograd.grad(found, (p, t)), torch.autograd.grad(expected, (p, t))
    for one, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)
        assert not one[:, 3].any()  # no negatives, no gradient


def test_cpc_of_one_group_is_the_batch(wide):
    p, t = normal(3, 5, 4), normal(3, 5, 4, seed=1)
    one = cpc_nce(p, t, negatives="sequence", groups=torch.zeros(5, dtype=torch.int64), backend=wide)
    batch = cpc_nce(p, t, backend=wide)
    torch.testing.assert_close(one.loss, batch.loss, rtol=1e-13, atol=0)
    assert one.stats["top1"] == batch.stats["top1"]


# ---- NPID -------------------------------------------------------------------------------------------------------


def test_golden_npid_softmax(wide):
    found = npid_softmax(EYE, SCORES.T, torch.arange(3), temperature=1.0, backend=wide)
    assert found.loss.item() == pytest.approx(ROWS, rel=1e-15)


def test_npid_bank_may_change_before_the_backward_and_have_its_own_dtype(wide):
    q, bank, indices = normal(4, 3), normal(9, 3, seed=1), torch.tensor([8, 0, 3, 0])
    found = npid_softmax(q, bank, indices, backend=wide)
    (expected,) = torch.autograd.grad(found.loss, q)
    loss = npid_softmax(q, bank, indices, backend=wide).loss
    bank.detach().zero_()
    (late,) = torch.autograd.grad(loss, q)
    assert torch.equal(late, expected)
    half = normal(9, 3, seed=2).detach().bfloat16()
    torch.testing.assert_close(
        npid_softmax(q, half, indices, backend=wide).loss, npid_softmax(q, half.double(), indices, backend=wide).loss
    )


# ---- DIM --------------------------------------------------------------------------------------------------------


def test_golden_dim(wide):
    """One location an image: the scores are the table of the golden values."""

    def value(**options):
        return dim_mi(SCORES.T[:, None], EYE, **options, backend=wide).loss.item()

    assert value() == pytest.approx(JSD, rel=1e-14)
    assert value(estimator="dv") == pytest.approx(DV, rel=1e-14)
    assert value(estimator="nce") == pytest.approx(ROWS, rel=1e-14)
    assert value(estimator="nce", anchor="local") == pytest.approx(2 * BOTH - ROWS, rel=1e-14)
    assert value(estimator="nce", anchor="both") == pytest.approx(BOTH, rel=1e-14)


@pytest.mark.parametrize("estimator", ["jsd", "dv", "nce"])
def test_one_global_vector_is_several_of_one(wide, estimator):
    local, global_ = normal(4, 6, 5), normal(4, 5, seed=1)
    flat = dim_mi(local, global_, estimator=estimator, backend=wide).loss
    assert torch.equal(flat, dim_mi(local, global_[:, None], estimator=estimator, backend=wide).loss)


def test_dim_bounds_are_what_they_are_called(wide):
    local, global_ = normal(4, 6, 5), normal(4, 5, seed=1)
    dv, jsd = (dim_mi(local, global_, estimator=name, backend=wide) for name in ("dv", "jsd"))
    assert dv.stats["mi_bound"].item() == -dv.loss.item()
    blind = dim_mi(0 * local, global_, backend=wide)  # a critic that knows nothing bounds the divergence by 0
    assert blind.stats["js_bound"].item() == pytest.approx(0, abs=1e-15)
    assert jsd.stats["js_bound"].item() == pytest.approx(math.log(2) - jsd.loss.item() / 2, rel=1e-14)


def test_one_image_alone(wide):
    local, global_ = normal(1, 3, 5), normal(1, 5, seed=1)
    for estimator in ("jsd", "dv"):
        with pytest.raises(ValueError, match=rf"^local: got B = 1, need B >= 2 for estimator='{estimator}'"):
            dim_mi(local, global_, estimator=estimator, backend=wide)
    with pytest.warns(UserWarning, match="no negatives"):
        found = dim_mi(local, global_, estimator="nce", backend=wide).loss
    assert found.item() == 0
    assert not torch.autograd.grad(found, local)[0].any()


# ---- closed forms -----------------------------------------------------------------------------------------------


def test_golden_mine():
    own = torch.eye(3, dtype=torch.bool)
    assert mine_dv(SCORES[own], SCORES[~own]).loss.item() == pytest.approx(DV, rel=1e-15)
    far = mine_dv(SCORES[own] + 2000, SCORES[~own] + 2000)  # a constant cancels, and overflows nothing
    assert far.loss.item() == pytest.approx(DV, rel=1e-12)


def test_mine_divides_by_the_moving_average():
    """The value is the batch's; the product's gradient is e^T / (Q·average)."""
    joint, product = normal(5), normal(8, seed=1)
    plain, moved = mine_dv(joint, product), mine_dv(joint, product, ema=torch.tensor(0.7, dtype=torch.float64))
    assert torch.equal(plain.loss, moved.loss)
    on_joint, on_product = torch.autograd.grad(moved.loss, (joint, product))
    torch.testing.assert_close(on_joint, torch.full_like(joint, -1 / 5))
    torch.testing.assert_close(on_product, product.detach().exp() / (8 * math.exp(0.7)), rtol=1e-13, atol=0)


def test_mine_module_keeps_the_average():
    loss = MINELoss(0.25).double()
    batches = [normal(6, seed=i).detach() for i in range(3)]
    average = batches[0].exp().mean()
    for i, product in enumerate(batches):
        loss(batches[0], product)
        average = average if i == 0 else 0.75 * average + 0.25 * product.exp().mean()
    assert loss.log_mean.item() == pytest.approx(average.log().item(), rel=1e-13)
    assert loss.updates.item() == 3
    state = loss.log_mean.clone()
    assert loss(batches[0], batches[1] * math.inf).loss.isfinite().logical_not()
    for joint in (batches[0].int(), batches[0].to("meta")):  # refused, and no part of the average
        with pytest.raises((TypeError, ValueError), match="got"):
            loss(joint, batches[1])
    loss.eval()
    loss(batches[0], batches[1])
    assert torch.equal(loss.log_mean, state)
    assert loss.updates.item() == 3


def test_mine_module_gradient_survives_the_next_update():
    loss, joint, products = MINELoss(0.5), normal(4), [normal(6, seed=i) for i in (1, 2)]
    first = loss(joint, products[0]).loss
    (expected,) = torch.autograd.grad(first, products[0], retain_graph=True)
    loss(joint, products[1])
    assert torch.equal(torch.autograd.grad(first, products[0])[0], expected)


def test_mines_value_is_the_batchs_beside_an_average_far_below():
    assert mine_dv(torch.zeros(2), torch.full((3,), 60.0), ema=-40.0).loss.item() == pytest.approx(60)


def test_golden_gaussian_kl():
    mu = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    logvar = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    expected = (1 + 4 + 3 - 1 - math.log(3)) / 2 / 2
    assert gaussian_kl(mu, logvar).loss.item() == pytest.approx(expected, rel=1e-15)
    tiny = gaussian_kl(torch.zeros(1, 1), torch.full((1, 1), 1e-3)).loss  # σ² − 1 − log σ² = v²/2 + v³/6
    assert tiny.item() == pytest.approx((1e-6 / 2 + 1e-9 / 6) / 2, rel=2e-4)


def test_golden_club():
    """y and μ 0 and 1, σ 1: matched pairs cost 0, and half of all pairs a distance of 1."""
    y = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    found = club(y, y, torch.zeros_like(y))
    assert found.loss.item() == pytest.approx(0.25, rel=1e-15)
    assert found.stats["log_likelihood"].item() == pytest.approx(-math.log(2 * math.pi) / 2, rel=1e-15)
    assert club(y + 1e6, y + 1e6, torch.zeros_like(y)).loss.item() == pytest.approx(0.25, rel=1e-9)


def test_club_far_from_zero_keeps_float32s_digits():
    y, noise = 1000 + 0.01 * normal(64, 8).detach(), 0.001 * normal(64, 8, seed=1).detach()
    exact = torch.stack([y, y + noise]).float().double().requires_grad_()
    found = exact.detach().float().requires_grad_()
    losses = [club(x[0], x[1], torch.full_like(x[0], -9.0)).loss for x in (found, exact)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    mine, theirs = (torch.autograd.grad(loss, x)[0] for loss, x in zip(losses, (found, exact), strict=True))
    assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_golden_club_of_any_scores():
    """⟨y_j, μ_i⟩ are the scores of a variance of 1, up to what is a row's or a column's alone, and cancels."""
    found = club(SCORES.T, EYE, torch.zeros_like(EYE))
    assert found.loss.item() == pytest.approx(1.1111111111111112, rel=1e-14)


def test_golden_binary_nce():
    """NPID's sampled loss of one row: n = 50, m = 4, Z = 60, temperature 0.1."""
    cosines = torch.tensor([0.3, 0.1, -0.05, 0.02, 0.0], dtype=torch.float64)
    scores = cosines / 0.1 - math.log(60)
    kq = torch.full((1, 5), math.log(4 / 50), dtype=torch.float64)
    found = binary_nce(scores[:1], scores[None, 1:], kq[0, :1], kq[:, 1:])
    assert found.loss.item() == pytest.approx(1.197946518518904, rel=1e-14)
    assert found.stats["noise_right"].item() == 1


# ---- mixtures ---------------------------------------------------------------------------------------------------


def test_golden_mixture():
    """Two components of three consequents; the gradient of each consequent is the posterior."""
    nce = torch.tensor([[[0.5, 2, 1], [1.5, 0.2, 3]]], dtype=torch.float64, requires_grad=True)
    loss = mixture(nce, 2.0)
    assert loss.item() == pytest.approx(0.5379941613385016, rel=1e-14)
    torch.testing.assert_close(torch.autograd.grad(loss, nce)[0], (-2 * nce).softmax(1) / 3)


def test_mixture_of_one_and_of_equals(wide):
    """m = 1 is `amdim_nce`; m equal components are that less log(m)/τ, posterior of full entropy."""
    a, c = normal(4, 1, 5), normal(4, 3, 5, seed=1)
    plain = amdim_nce(a[:, 0], c, clip=4.0, backend=wide)
    for m in (1, 3):
        found = amdim_mixture_nce(a.expand(4, m, 5), c, tau=2.0, clip=4.0, backend=wide)
        assert found.nce.item() == pytest.approx(plain.nce.item() - math.log(m) / 2, rel=1e-13)
        assert found.penalty.item() == pytest.approx(plain.penalty.item(), rel=1e-13)
        assert found.stats["entropy"].item() == pytest.approx(math.log(m), abs=1e-14)
        assert found.stats["best"].item() == pytest.approx(plain.nce.item(), rel=1e-13)
        ours, theirs = (torch.autograd.grad(x.loss, (a, c)) for x in (found, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
        plain = amdim_nce(a[:, 0], c, clip=4.0, backend=wide)
    far = amdim_mixture_nce(torch.cat((a, -9 * a), 1), c, tau=50.0, clip=None, penalty=0.0, backend=wide)
    assert far.nce.item() == pytest.approx(far.stats["best"].item(), abs=math.log(2) / 50)
    assert far.penalty.item() == 0


def test_mixture_of_one_image_costs_its_entropy_alone(wide):
    """No negatives: every nce is 0, and so is every gradient."""
    a, c = normal(1, 2, 5), normal(1, 3, 5, seed=1)
    found = amdim_mixture_nce(a, c, tau=2.0, penalty=0.0, backend=wide)
    assert found.loss.item() == pytest.approx(-math.log(2) / 2, rel=1e-14)
    assert not any(g.any() for g in torch.autograd.grad(found.loss, (a, c)))
