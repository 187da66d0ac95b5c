"""Scores of chosen columns, and the losses of sampled negatives that are made of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

import fused_nce
from fused_nce import NPIDNCELoss, cpc_nce, gathered_scores, npid_nce, npid_softmax
from fused_nce.backends import gathered
from tests.losses.conftest import normal
from tests.refusals import unlike


def sample(n, m, columns, seed=0):
    return torch.randint(n, (m, columns), generator=torch.Generator().manual_seed(seed))


# ---- the op -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace_mb", ["16", "0.0004"], ids=["whole", "pieces"])
def test_scores_and_gradients(wide, workspace_mb, monkeypatch):
    """Against the gathered rows themselves: columns that come twice, or never, and a learnable scale."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    q, k, scale = normal(5, 4), normal(7, 4, seed=1), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    indices = sample(6, 5, 9)
    found, exact = gathered_scores(q, k, indices, scale=scale, backend=wide), torch.einsum("nd,nmd->nm", q, k[indices])
    torch.testing.assert_close(found, scale * exact, rtol=1e-13, atol=1e-14)
    upstream = torch.linspace(-1, 1, 45, dtype=torch.float64).view(5, 9)
    leaves = (q, k, scale)
    ours, theirs = (torch.autograd.grad(x, leaves, upstream) for x in (found, scale * exact))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    assert not ours[1][6].any()


def test_double_backward_and_opcheck():
    q, k, scale = normal(3, 4), normal(5, 4, seed=1), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    indices = sample(5, 3, 2)

    def f(q, k, scale):
        return gathered_scores(q, k, indices, scale=scale, backend="chunked")

    assert torch.autograd.gradgradcheck(f, (q, k, scale))
    (first,) = torch.autograd.grad(gathered_scores(q, k, indices, backend="reference").sum(), q)
    assert not first.requires_grad
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gathered_scores(q, k, indices, backend="reference").sum(), q, create_graph=True)
    half = q.detach().half().requires_grad_()
    for arguments in ((q, k, indices, scale, 1.0, "chunked"), (half, k.detach().half(), indices, None, 2.0, "chunked")):
        torch.library.opcheck(torch.ops.fused_nce.gathered_scores, arguments)


def test_blocks_keep_to_the_workspace():
    """Whole rows where one fits, parts of one where not; each pair once."""
    k, indices = torch.randn(11, 16), sample(11, 13, 7)
    for limit in (1, 500, 3000, 10_000, 1 << 20):
        seen = torch.zeros(13, 7, dtype=torch.int64)
        for block in gathered.blocks(k, indices, torch.float32, limit):
            seen[block.rows, block.columns] += 1
            assert block.k.numel() == 16 or 2 * block.k.nbytes + 9 * len(block.at) <= limit
            assert torch.equal(block.k, k[indices[block.rows, block.columns]])
        assert (seen == 1).all()


def test_16_bits_are_summed_in_32():
    q, k = (torch.full((1, 4096), 1.0, dtype=torch.bfloat16) for _ in range(2))
    found = gathered_scores(q, k, torch.zeros(1, 3, dtype=torch.int64))
    assert found.dtype == torch.float32
    assert found.tolist() == [[4096.0] * 3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = gathered_scores(q.float(), k.float(), torch.zeros(1, 3, dtype=torch.int64))
    assert torch.equal(found, again)


def test_out_of_range_is_refused_or_shows():
    q, k, indices = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([[0, 3], [1, 2]])
    for bad in (4, -1):
        wrong = indices.clone()
        wrong[1, 0] = bad
        with pytest.raises(ValueError, match=rf"^indices: got {bad}, need 0 <= index < 4$"):
            gathered_scores(q, k, wrong)
        for limit in (None, 1):
            assert gathered.scores(q, k, wrong, limit).isnan().tolist() == [[False, False], [True, False]]
            found = gathered.grads(q, k, wrong, torch.zeros(2, 2), True, True, True, limit)
            assert found.dq.isnan().any(dim=1).tolist() == [False, True]
            assert found.dk.isnan().any()
            assert found.dscale.isnan()


# ---- NPID -------------------------------------------------------------------------------------------------------


def posed():
    """A feature and a bank with the cosines 0.3 (its own), 0.1, −0.05, 0.02, 0 among 50 rows."""
    cosines = torch.tensor([0.3, 0.1, -0.05, 0.02, 0.0], dtype=torch.float64)
    bank = functional.normalize(normal(50, 3, seed=5).detach(), dim=1)
    bank[:5] = torch.stack((cosines, (1 - cosines.square()).sqrt(), torch.zeros(5)), 1)
    feature = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    return feature, bank, torch.tensor([0]), torch.tensor([[1, 2, 3, 4]])


def test_golden_npid_nce(wide):
    found = npid_nce(*posed(), z=60.0, temperature=0.1, backend=wide)
    assert found.loss.item() == pytest.approx(1.197946518518904, rel=1e-14)
    assert npid_nce(*posed(), z=torch.tensor(60.0), temperature=0.1, backend=wide).loss.item() == pytest.approx(
        1.197946518518904, rel=1e-6
    )
    # At odds of 1 to 1 for the data, 1 to m for the noise: chance.
    feature, bank, indices, noise = posed()
    n, m = 50, 4
    chance = npid_nce(0 * feature, bank, indices, noise, z=float(n), backend=wide).loss.item()
    assert chance == pytest.approx(math.log(1 + m) + m * math.log(1 + 1 / m), rel=1e-14)


@pytest.mark.parametrize("loss", [npid_softmax, npid_nce])
def test_proximal_term(wide, loss):
    """2λ − 2λ⟨v, f⟩ of unit vectors, in `penalty`; its gradient 2λ(f − v) beside the rest's."""
    feature, bank, indices, noise = posed()
    rest = (noise,) if loss is npid_nce else ()
    options = {"temperature": 0.1, "backend": wide, **({"z": 60.0} if rest else {})}
    plain = loss(feature, bank, indices, *rest, **options)
    held = loss(feature, bank, indices, *rest, **options, proximal=0.4)
    assert held.penalty.item() == pytest.approx(0.8 - 0.8 * 0.3, rel=1e-14)
    assert held.loss.item() == pytest.approx(plain.loss.item() + held.penalty.item(), rel=1e-14)
    a, b = (torch.autograd.grad(out.loss, feature)[0] for out in (plain, held))
    torch.testing.assert_close(b - a, 0.8 * (feature - bank[:1]).detach(), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"^proximal: got -1, need a finite number >= 0$"):
        loss(feature, bank, indices, *rest, **options, proximal=-1)


def test_z_is_of_the_first_batch_alone():
    """n·mean e^s over all its scores, kept in the state; not in evaluation, nor of a batch that is not finite."""
    torch.manual_seed(0)
    bank = functional.normalize(torch.randn(40, 8), dim=1)
    features, indices = functional.normalize(torch.randn(6, 8), dim=1), torch.arange(6)
    noise = sample(40, 6, 5)
    loss = NPIDNCELoss(0.5, m=5)
    columns = torch.cat((indices[:, None], noise), 1)
    z = 40 * ((features[:, None] * bank[columns]).sum(2) / 0.5).exp().mean()
    expected = npid_nce(features, bank, indices, noise, z=z, temperature=0.5).loss
    torch.testing.assert_close(loss.eval()(features, bank, indices, noise).loss, expected)
    loss.train()(features * math.nan, bank, indices, noise)
    assert loss.log_z.isnan()
    torch.testing.assert_close(loss(features, bank, indices, noise).loss, expected)
    torch.testing.assert_close(loss.log_z, z.log())
    loss(features.flip(0), bank, indices)
    torch.testing.assert_close(loss.log_z, z.log())
    other = NPIDNCELoss(0.5, m=5)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(-features, bank, indices, noise).loss, loss(-features, bank, indices, noise).loss)


def test_noise_of_its_own():
    """Drawn from torch's generator; the mean over many draws is that over the bank."""
    features, bank = functional.normalize(torch.randn(2, 8), dim=1), functional.normalize(torch.randn(30, 8), dim=1)
    loss = NPIDNCELoss(0.5, m=30_000, z=45.0)
    torch.manual_seed(1)
    first = loss(features, bank, torch.tensor([3, 4])).loss
    torch.manual_seed(1)
    assert torch.equal(loss(features, bank, torch.tensor([3, 4])).loss, first)
    every = torch.arange(30).repeat(2, 1000)
    expected = npid_nce(features, bank, torch.tensor([3, 4]), every, z=45.0, temperature=0.5).loss
    torch.testing.assert_close(first, expected, rtol=0.01, atol=0)


# ---- CPC --------------------------------------------------------------------------------------------------------


def test_every_other_target_as_a_sample_is_the_batch(wide):
    p, t = normal(2, 5, 4), normal(2, 5, 4, seed=1)
    others = torch.stack([torch.cat((torch.arange(i), torch.arange(i + 1, 5))) for i in range(5)])
    batch, sampled = (cpc_nce(p, t, negatives=x, weights=(1, 3), backend=wide) for x in ("batch", others))
    torch.testing.assert_close(sampled.loss, batch.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(sampled.stats["top1"], batch.stats["top1"])
    torch.testing.assert_close(
        torch.autograd.grad(sampled.loss, (p, t)), torch.autograd.grad(batch.loss, (p, t)), rtol=1e-11, atol=1e-13
    )


ONES, IDS = torch.ones(2, 3), torch.tensor([0, 1])
ERRORS = [
    (lambda: gathered_scores(ONES, ONES, IDS), ValueError, r"^indices: got shape \(2,\), need \(N, m\) = \(2, m\) .*$"),
    (lambda: gathered_scores(ONES, ONES, IDS[:, None].int()), TypeError, r"^indices: got torch.int32, need int64$"),
    (lambda: gathered_scores(ONES, ONES[:, :2], IDS[:, None]), ValueError, r"^k: got width D = 2, need q's 3$"),
    (lambda: npid_nce(ONES, ONES, IDS, IDS[:, None], z=0), ValueError, r"^z: got 0, need a finite number > 0$"),
    (lambda: npid_nce(ONES, ONES, IDS + 1, IDS[:, None], z=1), ValueError, r"^indices: got 2, need 0 <= index < 2$"),
    (lambda: npid_nce(ONES, ONES, IDS, IDS[:, None] - 1, z=1), ValueError, r"^noise: got -1, need 0 <= index < 2$"),
    (lambda: NPIDNCELoss(m=0), ValueError, r"^m: got 0, need >= 1$"),
    (lambda: NPIDNCELoss(z=-1.0), ValueError, r"^z: got -1.0, need a finite number > 0$"),
]


def test_messages():
    assert unlike(ERRORS) == []


def test_a_backend_that_gathers_nothing_says_so():
    with pytest.raises(ValueError, match=r"^backend: got 'triton', which cannot run this: it gathers no columns$"):
        gathered_scores(ONES, ONES, IDS[:, None], backend="triton")
    gathered_scores(ONES, ONES, IDS[:, None])
    assert fused_nce.last_path() is not None
