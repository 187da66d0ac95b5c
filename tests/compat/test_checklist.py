"""What every adapter of two tensors of rows takes: any layout, width and dtype, few rows or none, one side frozen."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from torch import nn

from fused_nce.compat import bolts, dim, inf_cl, lightly, moco, open_clip, pml, solo, supcontrast
from tests.marks import nightly_but


def unit(x):
    return nn.functional.normalize(x, dim=1)


def moco_loss(a, b):
    """The builder's logits of given features."""
    bank = unit(torch.linspace(-1, 1, 9 * a.shape[1]).view(9, -1).sin())
    labels = torch.zeros(len(a), dtype=torch.int64)
    return moco.MoCoLogits(a, b.detach(), bank, 0.2, labels).cross_entropy()


def in_two_views(module):
    return lambda a, b: module(torch.stack((a, b), dim=1))


def maps(function):
    """Rows as (N, C, 1) locations and (N, C, 1) globals."""
    return lambda a, b: function(a[..., None], b[..., None])


def ids(a):
    return torch.arange(len(a)).repeat(2)


LOSSES = {
    "bolts.nt_xent_loss": lambda a, b: bolts.nt_xent_loss(a, b, 0.2),
    "bolts.SimCLR": lambda a, b: bolts.SimCLR().nt_xent_loss(a, b, 0.2),
    "bolts.AmdimNCELoss": lambda a, b: sum(bolts.AmdimNCELoss(7.0)(a, b.T, torch.eye(len(a)))),
    "dim.infonce_loss": maps(dim.infonce_loss),
    "dim.infonce_loss as upstream": maps(lambda l, m: dim.infonce_loss(l, m, mask="reference")),
    "dim.fenchel_dual_loss": maps(lambda l, m: dim.fenchel_dual_loss(l, m, "JSD")),
    "dim.donsker_varadhan_loss": maps(dim.donsker_varadhan_loss),
    "inf_cl.cal_flash_loss": lambda a, b: inf_cl.cal_flash_loss(a, b, scale=5.0).sum(),
    "inf_cl.cal_inf_loss": lambda a, b: inf_cl.cal_inf_loss(a, b, scale=5.0),
    "lightly.NTXentLoss": lightly.NTXentLoss(0.2),
    "lightly.DCLLoss": lightly.DCLLoss(0.2),
    "lightly.DCLWLoss": lightly.DCLWLoss(0.2),
    "moco": moco_loss,
    "open_clip.ClipLoss": lambda a, b: open_clip.ClipLoss()(a, b, 5.0),
    "open_clip.SigLipLoss": lambda a, b: open_clip.SigLipLoss()(a, b, 5.0, -2.0),
    "pml.NTXentLoss": pml.SelfSupervisedLoss(pml.NTXentLoss(0.2)),
    "pml.SupConLoss": pml.SelfSupervisedLoss(pml.SupConLoss(0.2)),
    "pml.ContrastiveLoss": pml.SelfSupervisedLoss(pml.ContrastiveLoss(0, 1.5)),
    "pml.TripletMarginLoss": pml.SelfSupervisedLoss(pml.TripletMarginLoss(1.0)),
    "solo.simclr_loss_func": lambda a, b: solo.simclr_loss_func(torch.cat((a, b)), ids(a), 0.2),
    "solo.mocov2plus_loss_func": lambda a, b: solo.mocov2plus_loss_func(a, b, torch.eye(a.shape[1], 9), 0.2),
    "solo.mocov3_loss_func": lambda a, b: solo.mocov3_loss_func(a, b, 0.2),
    "solo.nnclr_loss_func": lambda a, b: solo.nnclr_loss_func(a, b, 0.2),
    "supcontrast.SupConLoss": in_two_views(supcontrast.SupConLoss(0.2)),
}
every = pytest.mark.parametrize("name", LOSSES)


def rows(n=6, d=7, dtype=torch.float32):
    g = torch.Generator().manual_seed(n)
    return [unit(torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype) for _ in "ab"]


def result(name, *given):
    """Value and gradients."""
    leaves = [x.detach().requires_grad_() for x in given]
    value = LOSSES[name](*leaves)
    return [value, *torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)]


def strided(x, how):
    """The same rows in another layout."""
    if how == "columns first":
        return x.T.contiguous().T
    wide = torch.full((2 * len(x), 2 * x.shape[1]), 9.0, dtype=x.dtype)
    wide[::2, 1::2] = x
    return wide[::2, 1::2]


# Sizes of classes, and which images a mask means, are read on the host.
READ = ("pml.NTXentLoss", "pml.ContrastiveLoss", "bolts.AmdimNCELoss")


def masked(a, b):
    """SupContrast's loss of a mask."""
    mask = torch.eye(len(a)) + torch.eye(len(a)).roll(1, 0)
    return supcontrast.SupConLoss(0.2)(torch.stack((a, b), dim=1), mask=mask)


@pytest.mark.parametrize(
    "name", nightly_but(["open_clip.ClipLoss"], [name for name in [*LOSSES, "mask"] if name not in READ])
)
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    loss = LOSSES.get(name, masked)
    compiled, found = torch.compile(loss, fullgraph=True, backend="aot_eager"), []
    for function in (loss, compiled):
        leaves = [x.requires_grad_() for x in rows()]
        value = function(*leaves)
        found.append([value, *torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["columns first", "every second"])
@every
def test_any_layout(name, how):
    a, b = rows()
    for x, y in zip(result(name, strided(a, how), strided(b, how)), result(name, a, b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@every
def test_one_side_frozen(name):
    """The other's gradient is what it was."""
    a, b = rows()
    _, *both = result(name, a, b)
    for i in range(2):
        given = [x.clone().requires_grad_(j == i) for j, x in enumerate((a, b))]
        value = LOSSES[name](*given)
        if not value.requires_grad:  # keys of MoCo have none anyway
            assert not both[i].any()
            continue
        torch.testing.assert_close(torch.autograd.grad(value, given[i])[0], both[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every
def test_16_bits_in_float32_out(name, dtype):
    """Raw, and under autocast; gradients in the inputs' dtype, all finite."""
    exact = result(name, *rows(dtype=torch.float64))[0]
    for given, cast in ((rows(dtype=dtype), False), (rows(), True)):
        with torch.autocast("cpu", dtype=dtype, enabled=cast):
            value, *grads = result(name, *given)
        assert value.dtype == torch.float32
        assert [g.dtype for g in grads] == [x.dtype for x in given]
        assert all(bool(g.isfinite().all()) for g in grads)
        # Rounding both rows moves a score of at most 5 by 5 eps, and a row's loss by twice that; some sum six rows, and
        # DCLW's weights, six at most, move as far again.
        assert abs(value - exact) <= 2 * 6 * 10 * torch.finfo(dtype).eps


@every
def test_few_rows_and_any_width(name):
    """Finite, or one line that says what is missing; an uneven last batch is a batch."""
    for n, d in product((1, 2, 5), (1, 33)):
        found, refused = [], ""
        try:
            found = result(name, *rows(n, d))
        except ValueError as error:
            refused = str(error)
        assert all(bool(x.isfinite().all()) for x in found), (n, d)
        assert not refused or (n == 1 and re.match(r"\w+: got (N|B) = 1, need", refused)), (n, d)


@every
def test_no_rows_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"^[\w·]+: got .*0"):
        LOSSES[name](*rows(0))
