"""The GPU's layouts and column statistics, on the CPU that plays a GPU, in one panel and many, against `reference`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_nce import _extension, clip_loss, info_nce, tile_loss, tile_stats
from fused_nce.backends import cuda
from fused_nce.core.spec import Block, Identity, Index, Separate, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.backends.test_cpu_layouts import LOSSES, D, M, N, gradients

MODULE: Any
MODULE, REASON = _extension.status()
pytestmark = pytest.mark.skipif(MODULE is None, reason=REASON or "kernels built")

BOTH_WAYS = {
    "clip": lambda a, b, w: gradients(clip_loss(a, b, 0.7, backend=w).loss, [a, b]),
    "learned scale": lambda a, b, w: with_scale(a, b, w),
    "permuted, clipped both ways": lambda a, b, w: gradients(
        info_nce(a, b, torch.arange(N).flip(0), symmetric=True, clip=9.0, penalty=0.1, backend=w).loss, [a, b]
    ),
    "a wide clip": lambda a, b, w: gradients(info_nce(a, b, symmetric=True, clip=60.0, backend=w).loss, [a, b]),
}


def with_scale(a, b, backend):
    scale = torch.tensor(0.9).requires_grad_()
    return gradients(clip_loss(a, b, scale, backend=backend).loss, [a, b, scale])


@pytest.fixture(autouse=True)
def _play_a_gpu(monkeypatch):
    """CPU tensors count as a GPU's."""
    monkeypatch.setattr(cuda, "why_not", lambda spec, q, k: cuda._unable(MODULE, spec, q, k))


@pytest.mark.parametrize("workspace_mb", ["16", "0.1", "0.03"])
@pytest.mark.parametrize("name", [*LOSSES, *BOTH_WAYS])
def test_the_same_as_the_whole_matrix(name, workspace_mb, monkeypatch):
    """float32; `tests/losses/test_registry.py` has the 16-bit types."""
    torch.manual_seed(0)
    a, b = (torch.randn(rows, D).requires_grad_() for rows in (N, M))
    call = (LOSSES | BOTH_WAYS)[name]
    wanted = call(a, b, "reference")
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    for found, exact in zip(call(a, b, "cuda"), wanted, strict=True):
        assert (found - exact).abs().max() <= 5e-6 * exact.abs().max()


def test_every_statistic_of_columns_and_its_gradient(monkeypatch):
    """Of rows and columns at once, in strips of few rows; a block of columns that is several rows' positives."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.05")
    spec = Spec(Block(3, 2), TanhClip(6.0), ("square", "neg_lse"), ("neg_max", "square", "neg_lse"))
    torch.manual_seed(1)
    q, k = torch.randn(100, D), torch.randn(53 * 3, D)
    results = []
    for backend in ("reference", "cuda"):
        one, two = (x.clone().requires_grad_() for x in (q, k))
        found = tile_stats(one, two, spec, scale=0.6, offset=2, backend=backend)
        wanted = [x for x in found.values() if x.requires_grad]
        upstream = [torch.linspace(-1, 1, x.numel()).view_as(x) for x in wanted]
        results.append([*found.values(), *torch.autograd.grad(wanted, (one, two), upstream)])
    for exact, x in zip(*results, strict=True):
        assert (x - exact).abs().max() <= 5e-6 * exact.abs().max()


def test_column_statistics_of_a_number_that_is_bad_show_it():
    q, k = torch.randn(9, 4), torch.randn(9, 4)
    q[3, 1], k[5, 0] = float("nan"), float("inf")
    for transform in (Identity(), TanhClip(20.0)):
        spec = Spec(Block(1), transform, columns=("neg_lse",))
        assert tile_stats(q, k, spec, backend="cuda")["column_neg_lse"].isnan().sum() >= 8  # column 3 has no row 3


def test_where_an_index_points_nowhere_the_positive_is_no_number():
    """A GPU's targets are not read: a wrong one must show."""
    q, k, ids = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 7, -1, 4])
    pos, rows, _ = torch.ops.fused_nce.cuda_stats(q, k, 1.0, None, 1, 1, 0, 0.0, ids, -1, None, False, 1 << 20)
    assert pos.isnan().flatten().tolist() == [False, True, True, False]
    assert rows.isfinite().all()


def test_one_gradient_for_both_roles_is_one_buffer():
    x = torch.randn(20, 6)
    spec = Spec(Index(), drop_self=True)
    arguments = (x, None, 0.5, None, 1, 1, 0, 0.0, torch.arange(20).roll(1), 0, None)
    _, _, dq, dk, _ = torch.ops.fused_nce.cuda_loss(*arguments, 0.05, 0.0, True, True, False, 1 << 20)
    z = x.clone().requires_grad_()
    tile_loss(z, None, spec, Nce(), scale=0.5, row_ids=arguments[8], backend="reference").loss.backward()
    assert dk.numel() == 0
    torch.testing.assert_close(dq, z.grad)


def test_what_a_separate_positive_leaves_undone():
    """No column writes `pos`: it is handed on as it came."""
    spec, given = Spec(Separate(2)), torch.randn(5, 2)
    found = tile_stats(torch.randn(5, 3), torch.randn(7, 3), spec, positives=given, backend="cuda")
    assert torch.equal(found["pos"], given)
