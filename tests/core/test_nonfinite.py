"""NaN, Inf, overflow and a row without negatives: never hidden, never more than they must spoil."""

from __future__ import annotations

import pytest
import torch

from fused_nce import tile_loss, tile_stats
from fused_nce.core.spec import Block, Identity, Separate, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.core.problems import N_C, N, features, grads_of, run

SPECS: dict[str, Identity | TanhClip] = {"clip": TanhClip(20.0), "wide clip": TanhClip(300.0), "no clip": Identity()}


@pytest.mark.parametrize("transform", SPECS)
@pytest.mark.parametrize("penalty", [0.0, 0.04])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
class TestNonFinite:
    def test_bad_query(self, backend, transform, penalty, bad):
        """Its row's loss, its own gradient and all of dk; no other row."""
        q, k = features()
        with torch.no_grad():
            q[2, 5] = bad
        out = run(backend, q, k, "none", Spec(Block(N_C), SPECS[transform]), penalty=penalty)
        rows = out.nce.isfinite().all(1)
        assert rows.tolist() == [i != 2 for i in range(N)]
        assert not out.nce[2].isfinite().any()
        assert not out.loss.isfinite()
        for dq, dk in (grads_of(out.nce.sum(), q, k, retain_graph=True), grads_of(out.loss, q, k)):
            assert dq.isfinite().all(1).tolist() == [i != 2 for i in range(N)]
            assert not dq[2].isfinite().any()
            assert not dk.isfinite().any()

    @pytest.mark.parametrize("column", [0, 3 * N_C + 1])
    def test_bad_key(self, backend, transform, penalty, bad, column):
        """Every row has it as a positive or a negative: nothing stays finite."""
        q, k = features()
        with torch.no_grad():
            k[column, 5] = bad
        out = run(backend, q, k, "none", Spec(Block(N_C), SPECS[transform]), penalty=penalty)
        assert not out.nce.isfinite().any()
        assert not out.loss.isfinite()
        dq, dk = grads_of(out.loss, q, k)
        assert not dq.isfinite().any()
        assert not dk.isfinite().any()

    def test_bad_query_through_statistics(self, backend, transform, penalty, bad):
        q, k = features()
        with torch.no_grad():
            q[2, 5] = bad
        out = tile_stats(q, k, Spec(Block(N_C), SPECS[transform]), backend=backend)
        assert out["neg_lse"].isfinite().tolist() == [i != 2 for i in range(N)]
        dq, dk = grads_of(out["neg_lse"].sum(), q, k)
        assert not dq[2].isfinite().any()
        assert not dk.isfinite().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e38])
def test_positive_that_is_no_column(backend, bad):
    """Row by row what a dense softmax in float32 gives: +∞ is NaN, and −∞ is a loss of ∞; a clip shows both as NaN."""
    q, k = features()
    q, k = q.detach().float().requires_grad_(), k.detach().float()
    at = torch.randn(N, 1)
    at[2] = bad
    at.requires_grad_()
    dense = torch.nn.functional.cross_entropy(
        torch.cat([10 * at, 10 * q @ k.T], dim=1), torch.zeros(N, dtype=torch.int64), reduction="none"
    )
    for transform in (Identity(), TanhClip(20.0)):
        spec = Spec(Separate(1), transform, Nce().stats)
        out = tile_loss(q, k, spec, Nce(reduction="none"), scale=10.0, positives=10 * at, backend=backend)
        assert out.nce.isfinite().flatten().tolist() == [i != 2 for i in range(N)]
        assert not out.loss.isfinite()
        if isinstance(transform, TanhClip):
            continue
        torch.testing.assert_close(out.nce.squeeze(1), dense, equal_nan=True)
        for mine, theirs in zip(grads_of(out.nce.sum(), q, at), grads_of(dense.sum(), q, at), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_overflowing_penalty_is_left_out_at_strength_0(backend):
    """0·inf must not turn a finite loss into NaN."""
    q, k = features()
    q, k = ((1e10 * x.detach()).requires_grad_() for x in (q, k))
    out = run(backend, q, k, scale=1.0, penalty=0.0)
    assert not out.rows["square"].isfinite().any()
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in grads_of(out.loss, q, k))


@pytest.mark.parametrize("transform", SPECS)
def test_one_image_has_no_loss(backend, transform):
    q, k = features(1)
    with pytest.warns(UserWarning, match="one image has no negatives"):
        out = run(backend, q, k, spec=Spec(Block(N_C), SPECS[transform]), penalty=0.0)
    assert torch.equal(out.loss, torch.tensor(0.0))
    for g in grads_of(out.loss, q, k, retain_graph=True) + grads_of(out.nce, q, k):
        assert torch.equal(g, torch.zeros_like(g))
