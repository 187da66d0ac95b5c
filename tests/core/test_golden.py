"""Golden vectors, to 16 digits, and the identities that hold for any scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fused_nce import amdim_nce, tile_loss, tile_stats
from fused_nce.core.spec import Block, Identity, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.budget import Budget, eta, precision
from tests.oracle import Oracle

SCORES = torch.tensor(
    [[2, -1, 0.5, 0, -0.5, 1], [1, 0, 3, 1.5, 0, -2], [-1, 0.5, 2, -0.5, 1, 4]], dtype=torch.float64
)  # (n_a, n_k·n_c), n_c = 2
# clip, penalty: nce, penalty, neg_lse, R = Σ_p (1 − p)
GOLDEN = {
    (10.0, 0.05): (
        1.0248359573942916,
        0.12569444444444444,
        (1.7857565318, 1.5786088178, 2.2845800934),
        (1.3948580805, 0.7308376984, 0.9640038958),
    ),
    (20.0, 0.04): (
        1.0189668562732115,
        0.10055555555555555,
        (1.7869417504, 1.5794438983, 2.2989267840),
        (1.3904984816, 0.7186438175, 0.9470954786),
    ),
    (4.0, 0.04): (
        1.065836229695703,
        0.10055555555555555,
        (1.7776862036, 1.5729954057, 2.1947864138),
        (1.4226394976, 0.8101939776, 1.0703015480),
    ),
}
SLOPES = torch.tensor(  # d nce / ds at clip 4
    [
        [-0.0632188341, -0.1473203365, 0.0648872457, 0.0400778396, 0.0239945583, 0.1003474432],
        [0.0701288220, 0.0280088021, -0.0273792170, -0.0776919020, 0.0280088021, 0.0034688432],
        [0.0070119481, 0.0321681668, 0.0992249446, 0.0118954187, -0.1208235814, -0.0209356776],
    ],
    dtype=torch.float64,
)
F64 = ("reference", "chunked")


@pytest.mark.parametrize(("clip", "penalty"), GOLDEN)
@pytest.mark.parametrize("backend", F64)
def test_golden_vector(backend, clip, penalty):
    """Identity queries make the keys the scores, and dL/dk the dL/ds."""
    nce, square, lse, missed = GOLDEN[clip, penalty]
    q, k = torch.eye(3, dtype=torch.float64), SCORES.T.clone().requires_grad_()
    out = amdim_nce(q, k.view(3, 2, 3), scale=1.0, clip=clip, penalty=penalty, backend=backend)
    assert out.nce.item() == pytest.approx(nce, rel=1e-15)
    assert out.penalty.item() == pytest.approx(square, rel=1e-15)
    assert out.loss.item() == pytest.approx(nce + square, rel=1e-15)
    found = tile_stats(q, k, Spec(Block(2), TanhClip(clip)), backend=backend)
    np.testing.assert_allclose(found["neg_lse"].detach(), lse, atol=6e-11)
    slopes = torch.autograd.grad(out.nce, k, retain_graph=True)[0].T
    # Row i's positives carry −(1 − p)·t' / (n_a·n_c): divided by t', they add up to R.
    t = clip * torch.tanh(SCORES / clip)
    own = (slopes / (1 - (t / clip) ** 2)).view(3, 3, 2)[torch.arange(3), torch.arange(3)]
    np.testing.assert_allclose(-6 * own.sum(1), missed, atol=6e-10)
    if clip == 4.0:
        np.testing.assert_allclose(slopes, SLOPES, atol=6e-11)
        whole = torch.autograd.grad(out.loss, k)[0].T
        assert whole[0, 0].item() == pytest.approx(-0.0543299452, abs=6e-11)
        assert whole[2, 5].item() == pytest.approx(-0.0031578998, abs=6e-11)


@pytest.mark.parametrize(("clip", "penalty"), GOLDEN)
def test_oracle_has_the_golden_vector(clip, penalty):
    nce, square, lse, missed = GOLDEN[clip, penalty]
    exact = Oracle(np.eye(3), SCORES.T.numpy(), scale=1.0, n_c=2, clip=clip)
    assert exact.nce.mean() == pytest.approx(nce, rel=1e-15)
    assert exact.penalty(penalty) == pytest.approx(square, rel=1e-15)
    np.testing.assert_allclose(exact.neg_lse, lse, atol=6e-11)
    np.testing.assert_allclose(exact.miss.sum(1), missed, atol=6e-11)


def test_golden_vector_in_float32(backend):
    """The same numbers within the float32 budget, on every backend."""
    for (clip, penalty), (nce, square, *_) in GOLDEN.items():
        exact = Oracle(np.eye(3), SCORES.T.numpy(), scale=1.0, n_c=2, clip=clip)
        budget = Budget(exact, precision(torch.float32, backend))
        out = amdim_nce(
            torch.eye(3), SCORES.T.float().reshape(3, 2, 3), scale=1.0, clip=clip, penalty=penalty, backend=backend
        )
        assert eta(out.nce, nce, budget.mean(budget.nce, exact.nce)) <= 1
        assert eta(out.penalty, square, budget.penalty(penalty)) <= 1


def scores_of(backend, s, *, n_c, clip=None, penalty=0.0, g_nce=1.0, g_penalty=0.0):
    """nce, dL/ds and neg_lse of a score matrix, through identity queries."""
    q, k = torch.eye(s.shape[0], dtype=s.dtype), s.T.clone().requires_grad_()
    spec = Spec(Block(n_c), TanhClip(clip) if clip else Identity())
    out = tile_loss(q, k, spec, Nce(penalty), backend=backend)
    (g,) = torch.autograd.grad(g_nce * out.nce + g_penalty * out.penalty, k)
    return out, g.T


def random_scores(n=5, n_c=3, seed=0, spread=3.0):
    """(n, n·n_c) float64."""
    return spread * torch.randn(n, n * n_c, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", F64)
class TestIdentities:
    def test_rows_of_dnce_dt_add_up_to_zero(self, backend):
        _, g = scores_of(backend, random_scores(), n_c=3)
        np.testing.assert_allclose(g.sum(1), 0, atol=1e-15)
        assert g.abs().max() > 1e-3

    def test_penalty_is_linear_in_s(self, backend):
        s = random_scores()
        _, one = scores_of(backend, s, n_c=3, clip=4.0, penalty=0.04, g_nce=0.0, g_penalty=1.0)
        _, two = scores_of(backend, 2 * s, n_c=3, clip=4.0, penalty=0.04, g_nce=0.0, g_penalty=1.0)
        torch.testing.assert_close(two, 2 * one, rtol=1e-15, atol=0)
        torch.testing.assert_close(one, 0.08 * s / s.numel(), rtol=1e-14, atol=0)

    def test_one_location_is_plain_info_nce(self, backend):
        s = random_scores(n=6, n_c=1).requires_grad_()
        out, g = scores_of(backend, s.detach(), n_c=1)
        dense = torch.nn.functional.cross_entropy(s, torch.arange(6))
        assert out.nce.item() == pytest.approx(dense.item(), rel=1e-14)
        torch.testing.assert_close(g, torch.autograd.grad(dense, s)[0], rtol=1e-12, atol=1e-16)

    def test_wide_clip_tends_to_none(self, backend):
        s = random_scores(spread=1.0)
        free, _ = scores_of(backend, s, n_c=3)
        errors = [abs(scores_of(backend, s, n_c=3, clip=c)[0].nce - free.nce).item() for c in (100.0, 1000.0)]
        assert 0 < errors[1] < errors[0] / 90 < 1e-4  # O(s³ / c²)

    def test_permuting_images(self, backend):
        s, order = random_scores().view(5, 5, 3), torch.tensor([3, 0, 4, 1, 2])
        out, g = scores_of(backend, s.reshape(5, 15), n_c=3, clip=20.0)
        moved, h = scores_of(backend, s[order][:, order].reshape(5, 15), n_c=3, clip=20.0)
        assert moved.nce.item() == pytest.approx(out.nce.item(), rel=1e-14)
        torch.testing.assert_close(h.view(5, 5, 3), g.view(5, 5, 3)[order][:, order], rtol=1e-12, atol=1e-17)

    def test_permuting_locations_of_one_image(self, backend):
        s, order = random_scores().view(5, 5, 3), torch.tensor([2, 0, 1])
        out, g = scores_of(backend, s.reshape(5, 15), n_c=3)
        turned = s.clone()
        turned[:, 2] = s[:, 2, order]
        moved, h = scores_of(backend, turned.reshape(5, 15), n_c=3)
        assert moved.nce.item() == pytest.approx(out.nce.item(), rel=1e-14)
        expected = g.view(5, 5, 3).clone()
        expected[:, 2] = expected[:, 2, order]
        torch.testing.assert_close(h.view(5, 5, 3), expected, rtol=1e-12, atol=1e-17)

    def test_a_second_copy_of_the_only_negative_adds_log_2(self, backend):
        s = random_scores(n=2, n_c=3)[:1]
        q = torch.eye(1, dtype=torch.float64)
        twice = torch.cat([s, s[:, 3:]], 1)
        once, two = (tile_stats(q, x.T, Spec(Block(3)), backend=backend)["neg_lse"] for x in (s, twice))
        assert (two - once).item() == pytest.approx(math.log(2), abs=1e-15)

    def test_siblings_do_not_count(self, backend):
        """The loss of one positive depends on no other positive of its image."""
        s = random_scores().view(5, 5, 3)
        spec, eye = Spec(Block(3)), torch.eye(5, dtype=torch.float64)
        before = tile_loss(eye, s.reshape(5, 15).T, spec, Nce(reduction="none"), backend=backend).nce
        s[1, 1, 2] += 30
        after = tile_loss(eye, s.reshape(5, 15).T, spec, Nce(reduction="none"), backend=backend).nce
        changed = before != after
        assert changed[1, 2]
        assert changed.sum() == 1

    @pytest.mark.parametrize("world", [2, 4])
    def test_sharded_rows_average_to_the_whole(self, backend, world):
        g = torch.Generator().manual_seed(5)
        a, c = (torch.randn(*shape, 6, dtype=torch.float64, generator=g) for shape in ((8,), (8, 3)))
        whole = amdim_nce(a, c, backend=backend)
        size = 8 // world
        parts = [amdim_nce(a[i : i + size], c, offset=i, backend=backend) for i in range(0, 8, size)]
        for name in ("loss", "nce", "penalty"):
            mean = sum(getattr(part, name).item() for part in parts) / world
            assert mean == pytest.approx(getattr(whole, name).item(), rel=1e-14)

    def test_bounds(self, backend):
        for seed in range(5):
            out, _ = scores_of(backend, random_scores(seed=seed, spread=100.0), n_c=3, clip=20.0)
            assert 0 <= out.nce <= math.log1p(4 * 3 * math.exp(40))

    def test_parts_are_separate(self, backend):
        s = random_scores()
        _, nce = scores_of(backend, s, n_c=3, clip=20.0, penalty=0.04)
        _, square = scores_of(backend, s, n_c=3, clip=20.0, penalty=0.04, g_nce=0.0, g_penalty=1.0)
        _, without = scores_of(backend, s, n_c=3, clip=20.0, penalty=0.0)
        torch.testing.assert_close(nce, without, rtol=1e-13, atol=1e-18)
        torch.testing.assert_close(square, 0.08 * s / s.numel(), rtol=1e-13, atol=0)
        _, both = scores_of(backend, s, n_c=3, clip=20.0, penalty=0.04, g_nce=0.3, g_penalty=-2.0)
        torch.testing.assert_close(both, 0.3 * nce - 2 * square, rtol=1e-12, atol=1e-17)

    def test_equal_rows(self, backend):
        """All scores equal: the loss is its chance level and the gradient is symmetric."""
        s = torch.full((8, 8 * 49), 1.5, dtype=torch.float64)
        out, g = scores_of(backend, s, n_c=49)
        assert out.nce.item() == pytest.approx(math.log1p(7 * 49), rel=1e-14)
        own = torch.block_diag(*[torch.ones(1, 49)] * 8).bool()
        assert g[own].unique().numel() == 1
        assert g[~own].unique().numel() == 1

    def test_mutual_information_is_not_overstated(self, backend):
        """64 images of 49 equal locations, x uniform over 1000 ids: chance − nce claims more than there is."""
        true = math.log(1000)
        # Optimal scores log p(y|x)/p(y): log 1000 for the same id, −∞ (here −40) for another.
        s = torch.full((64, 64, 49), -40.0, dtype=torch.float64)
        s[torch.arange(64), torch.arange(64)] = true
        out, _ = scores_of(backend, s.reshape(64, -1), n_c=49)
        claimed = math.log1p(63 * 49) - out.nce.item()
        assert claimed > true + 0.8
        assert out.report["mi_bound"].item() <= true
        # With the collisions that chance brings: E over batches, 7.78 against 6.91 and 4.11.
        generator = torch.Generator().manual_seed(0)
        losses, bounds = [], []
        for _ in range(40):
            ids = torch.randint(1000, (64,), generator=generator)
            s = torch.where((ids[:, None] == ids[None, :]), true, -40.0).double()[:, :, None].expand(64, 64, 49)
            out, _ = scores_of(backend, s.reshape(64, -1), n_c=49)
            losses.append(out.nce.item())
            bounds.append(out.report["mi_bound"].item())
        assert math.log1p(63 * 49) - np.mean(losses) > true
        assert np.mean(bounds) == pytest.approx(4.11, abs=0.03)
