"""The C++ kernels' layouts beyond blocks of columns, in many strips and few, against the whole matrix."""

from __future__ import annotations

import itertools

import pytest
import torch

from fused_nce import amdim_nce, info_nce, moco_nce, nt_xent, tile_loss
from fused_nce.core.spec import Block, Identity, Index, Separate, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.conftest import needs_kernels

N, M, D = 150, 150, 10


def gradients(loss, leaves):
    return [loss, *torch.autograd.grad(loss, leaves)]


def of_spec(spec, q, k, backend, **arguments):
    return gradients(tile_loss(q, k, spec, Nce(0.1), scale=0.4, backend=backend, **arguments).loss, [q])


LOSSES = {
    "targets": lambda a, b, w: gradients(info_nce(a, b, torch.arange(N).roll(7), clip=9.0, backend=w).loss, [a, b]),
    "repeated targets": lambda a, b, w: gradients(info_nce(a, b, torch.arange(N) // 3, backend=w).loss, [a, b]),
    "views": lambda a, b, w: gradients(nt_xent(a, b, backend=w).loss, [a, b]),
    "queue": lambda a, b, w: gradients(moco_nce(a, b, b.detach(), backend=w).loss, [a]),
    "itself left out, by target": lambda a, b, w: of_spec(
        Spec(Index(), TanhClip(5.0), drop_self=True), a, None, w, row_ids=torch.arange(N).roll(1)
    ),
    "itself left out, of a block": lambda a, b, w: of_spec(Spec(Block(5, 5), drop_self=True), a, None, w),
    "many separate": lambda a, b, w: of_spec(
        Spec(Separate(70), Identity()), a, b.detach(), w, positives=(a.detach() @ b.detach().T)[:, :70]
    ),
}


@needs_kernels
@pytest.mark.parametrize("workspace_mb", ["16", "0.25", "0.12"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_same_as_the_whole_matrix(name, workspace_mb, monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(N, D).requires_grad_(), torch.randn(M, D).requires_grad_()
    wanted = LOSSES[name](a, b, "reference")
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    for found, exact in zip(LOSSES[name](a, b, "cpu"), wanted, strict=True):
        assert (found - exact).abs().max() <= 5e-6 * exact.abs().max()


def test_a_row_is_no_target_of_its_own_where_it_is_left_out():
    q, targets = torch.randn(4, 3), torch.tensor([1, 0, 2, 0])
    with pytest.raises(
        ValueError, match=r"^targets: got row 2 itself, which drop_self leaves out, need another column$"
    ):
        tile_loss(q, None, Spec(Index(), drop_self=True), Nce(), row_ids=targets)


def test_a_layout_without_a_positive_is_no_loss():
    with pytest.raises(ValueError, match=r"^spec: got block\(1,1\) .*, which leaves a row no positive"):
        tile_loss(torch.randn(4, 3), None, Spec(Block(1), drop_self=True), Nce())


@pytest.mark.parametrize("call", [amdim_nce, info_nce])
def test_widths_are_compared_under_autocast_too(call):
    k = torch.randn(3, 8, 4) if call is amdim_nce else torch.randn(4, 4)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"^(consequents|keys): got width D = 4, need (antecedents|queries)'s 8$"),
    ):
        call(torch.randn(3 if call is amdim_nce else 4, 8), k)


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_shows(backend, scale):
    out = amdim_nce(torch.randn(3, 4), torch.randn(3, 2, 4), scale=torch.tensor(scale), penalty=0.0, backend=backend)
    assert out.loss.isnan()


@needs_kernels
def test_the_plan_of_a_batch_with_itself_is_what_is_asked_for(monkeypatch):
    """k = q needs a share of dq more: what `why_not` allows must run, at the very least workspace."""
    x = torch.randn(17, 24).requires_grad_()
    refusals = []
    for half_kib in range(4, 60):
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", str(half_kib / 2048))
        try:
            nt_xent(x[:8], x[8:16], backend="cpu").loss.backward()
            break
        except ValueError as error:
            refusals.append("which cannot run this: the workspace" in str(error))
    assert 0 < len(refusals) < 56
    assert all(refusals)


# docs/numerics.md: bytes an element of both sides, at most, beside gradients and workspace, which torch does not count.
ON_TOP = [(info_nce, False, 0, 4), (info_nce, True, 4, 11), (nt_xent, False, 8, 8), (nt_xent, True, 12, 14)]


@needs_kernels
@pytest.mark.parametrize(("loss", "normalize", "of_float32", "of_bfloat16"), ON_TOP)
def test_bytes_beside_the_workspace(loss, normalize, of_float32, of_bfloat16):
    for dtype, wanted in ((torch.float32, of_float32), (torch.bfloat16, of_bfloat16)):
        q, k = (torch.randn(256, 512).to(dtype).requires_grad_() for _ in "qk")
        loss(q, k, normalize=normalize, backend="cpu").loss.backward()
        q.grad = k.grad = None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss(q, k, normalize=normalize, backend="cpu").loss.backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        steps = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        found = max(itertools.accumulate(steps)) / (q.numel() + k.numel()) - dtype.itemsize
        assert wanted - 2.5 < found < wanted + 0.1
