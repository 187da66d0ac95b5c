"""What the GPU's kernels know beyond blocks of columns, on a CPU emulation of the GPU, in one panel and many."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_nce import clip_loss, info_nce, siglip_loss, sup_con, tile_loss, tile_stats
from fused_nce.backends.cuda import NAMES, OPTIONAL_ROW_STATISTICS
from fused_nce.core.spec import Bias, Block, Hardness, Identity, Index, Labels, Separate, Spec, TanhClip
from fused_nce.core.tails import LogIn, LogOut, Nce, Sigmoid
from tests.backends.test_cpu_layouts import LOSSES, D, M, N, gradients
from tests.backends.test_cuda_on_host import UNMARKED
from tests.conftest import MODULE, needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("play_gpu")]

BOTH_WAYS = {
    "clip": lambda a, b, w: gradients(clip_loss(a, b, 0.7, backend=w).loss, [a, b]),
    "learned scale": lambda a, b, w: with_scale(a, b, w),
    "permuted, clipped both ways": lambda a, b, w: gradients(
        info_nce(a, b, torch.arange(N).flip(0), symmetric=True, clip=9.0, penalty=0.1, backend=w).loss, [a, b]
    ),
    "a wide clip": lambda a, b, w: gradients(info_nce(a, b, symmetric=True, clip=60.0, backend=w).loss, [a, b]),
}


# Of rows 3, 10, … a row is the one of its label; labels of neither side meet some of the other's.
ROW_LABELS = torch.where(torch.arange(N) % 7 == 3, -torch.arange(N), torch.arange(N) % 11 << 40)
COLUMN_LABELS = torch.arange(M) % 13 << 40
MANY = {
    "labels, out": lambda a, b, w: supervised(a, "out", w),
    "labels, in": lambda a, b, w: supervised(a, "in", w),
    "labels of two sides": lambda a, b, w: labelled(LogOut(0.1), Identity(), a, b, w),
    "labels of two sides, clipped": lambda a, b, w: labelled(LogIn(0.1), TanhClip(4.0), a, b, w),
    "labels, a wide clip": lambda a, b, w: labelled(LogOut(), TanhClip(60.0), a, b, w),
    "labels and a bias": lambda a, b, w: labelled(LogOut(), Bias(), a, b, w, bias=torch.tensor(-0.7)),
    "a bias": lambda a, b, w: with_bias(a, b, w),
    "a bias beside a penalty": lambda a, b, w: penalised(a, b, w),
    "hardness": lambda a, b, w: hardened(a, b, w),
    "hardness of labels": lambda a, b, w: labelled(LogOut(0.1), Hardness(0.4), a, b, w),
    "binary, several positives": lambda a, b, w: gradients(
        tile_loss(a, b, Spec(Block(3, 3), stats=Sigmoid.READS), Sigmoid(), scale=0.4, backend=w).loss, [a, b]
    ),
}


def supervised(a, variant, backend):
    temperature = torch.tensor(0.3).requires_grad_()
    return gradients(
        sup_con(a, ROW_LABELS.to(a.device), temperature=temperature, variant=variant, backend=backend).loss, [a]
    )


def labelled(tail, transform, a, b, backend, **bias: Any):
    spec, ids = Spec(Labels(), transform, tail.stats), [x.to(a.device) for x in (ROW_LABELS, COLUMN_LABELS)]
    out = tile_loss(a, b, spec, tail, scale=0.5, row_ids=ids[0], column_ids=ids[1], backend=backend, **bias)
    return gradients(out.loss, [a, b])


def with_bias(a, b, backend):
    scale, bias = (torch.tensor(x).requires_grad_() for x in (0.8, -2.0))
    return gradients(siglip_loss(a, b, scale, bias, backend=backend).loss, [a, b, scale, bias])


def penalised(a, b, backend):
    """The penalty is of scores without the bias."""
    bias, tail = torch.tensor(-2.0).requires_grad_(), Sigmoid(0.1)
    out = tile_loss(a, b, Spec(Block(1), Bias(), stats=tail.stats), tail, scale=0.8, bias=bias, backend=backend)
    return gradients(out.loss, [a, b, bias])


def hardened(a, b, backend):
    scale = torch.tensor(0.4).requires_grad_()
    out = tile_loss(a, b, Spec(Block(3, 3), Hardness(0.3)), Nce(0.1), scale=scale, backend=backend)
    return gradients(out.loss, [a, b, scale])


def with_scale(a, b, backend):
    scale = torch.tensor(0.9).requires_grad_()
    return gradients(clip_loss(a, b, scale, backend=backend).loss, [a, b, scale])


@pytest.mark.parametrize("workspace_mb", ["16", "0.1", "0.03"])
@pytest.mark.parametrize("name", [*LOSSES, *BOTH_WAYS, *MANY])
def test_the_same_as_the_whole_matrix(name, workspace_mb, monkeypatch):
    """float32; `tests/losses/test_registry.py` has the 16-bit types."""
    torch.manual_seed(0)
    a, b = (torch.randn(rows, D).requires_grad_() for rows in (N, M))
    call = (LOSSES | BOTH_WAYS | MANY)[name]
    wanted = call(a, b, "reference")
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    for found, exact in zip(call(a, b, "cuda"), wanted, strict=True):
        assert (found - exact).abs().max() <= 5e-6 * exact.abs().max()


def test_labels_in_panels_and_in_parts_of_a_row(monkeypatch):
    """Each has the labels of its own columns."""
    for n, m, limit, wanted in ((60, 2100, 0.1, {"panels": 3}), (3, 7500, 16, {"ctas_per_row": 3})):
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", str(limit))
        plan = MODULE.cuda_plan(n, m, D, 1, 4, int(limit * (1 << 20)), optional=True)
        assert {name: plan[name] for name in wanted} == wanted
        torch.manual_seed(0)
        q, k = (torch.randn(rows, D).requires_grad_() for rows in (n, m))
        ids = torch.arange(n) % 11, torch.arange(m) % 13
        results = []
        for backend in ("reference", "cuda"):
            out = tile_loss(q, k, Spec(Labels(), stats=LogOut.READS), LogOut(), row_ids=ids[0], column_ids=ids[1],
                            scale=0.5, backend=backend)  # fmt: skip
            results.append(gradients(out.loss, [q, k]))
        for exact, found in zip(*results, strict=True):
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


@pytest.mark.parametrize("workspace_mb", ["16", "0.05"])
@pytest.mark.parametrize(
    "transform", [Identity(), TanhClip(6.0), TanhClip(60.0), Bias(), Hardness(0.3)], ids=lambda t: t.code
)
def test_every_statistic_of_rows_and_its_gradient(transform, workspace_mb, monkeypatch):
    """Beside those of columns, in another order than the kernels'; upstream gradients of either sign."""
    columns = () if isinstance(transform, Hardness) else ("square", "neg_lse")
    spec = Spec(Labels(), transform, tuple(reversed((*NAMES, *OPTIONAL_ROW_STATISTICS))), columns)
    torch.manual_seed(1)
    q, k = torch.randn(N, D), torch.randn(M, D)
    numbers = {"scale": torch.tensor(0.6)}
    if transform == Bias():
        numbers["bias"] = torch.tensor(0.3)
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    results = []
    for backend, dtype in (("reference", torch.float64), ("cuda", torch.float32)):
        one, two = (x.to(dtype).requires_grad_() for x in (q, k))
        given: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in numbers.items()}
        found = tile_stats(one, two, spec, row_ids=ROW_LABELS, column_ids=COLUMN_LABELS, backend=backend, **given)
        del found["pos"]  # labels have none
        has_positives = found["pos_count"] > 0
        wanted = {name: x for name, x in found.items() if x.requires_grad}
        upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype) for x in wanted.values()]
        # A log-sum over no positives is −∞: no loss gives it a gradient.
        upstream = [g * has_positives if "pos_" in name else g for name, g in zip(wanted, upstream, strict=True)]
        leaves = (one, two, *given.values())
        results.append([*found.values(), *torch.autograd.grad([*wanted.values()], leaves, upstream)])
    for exact, x in zip(*results, strict=True):
        finite = exact.isfinite()
        assert torch.equal(x[~finite].double(), exact[~finite].double())
        assert ((x - exact)[finite].abs() <= 5e-6 * exact[finite].abs().max()).all()


def test_a_lone_positive_has_no_gap():
    """However the columns are cut: e^(t − pos_lse) − 1 of a score that is computed again would be a rounding."""
    spec = Spec(Labels(), stats=LogOut.READS)
    q, k, ids = torch.randn(9, 4), torch.randn(9, 4), torch.arange(9)
    assert not tile_stats(q, k, spec, row_ids=ids, column_ids=ids, backend="cuda")["pos_gap"].any()


def test_what_the_kernels_have_not_of_columns_is_said():
    spec = Spec(Labels(), columns=("neg_lse", "pos_lse"))
    with pytest.raises(ValueError, match=r"'cuda', which cannot run this: it has no pos_lse of columns$"):
        tile_stats(
            torch.ones(2, 2),
            torch.ones(2, 2),
            spec,
            row_ids=torch.arange(2),
            column_ids=torch.arange(2),
            backend="cuda",
        )


def test_column_statistics_of_a_number_that_is_bad_show_it():
    q, k = torch.randn(9, 4), torch.randn(9, 4)
    for transform in (Identity(), TanhClip(20.0)):  # a clip takes infinity for its own limit
        spec = Spec(Block(1), transform, columns=("neg_lse",))
        for bad in (float("nan"), float("inf")):
            of_row, of_column = q.clone(), k.clone()
            of_row[3, 1] = of_column[5, 0] = bad
            assert tile_stats(of_row, k, spec, backend="cuda")["column_neg_lse"].isnan().all(), (transform, bad)
            found = tile_stats(q, of_column, spec, backend="cuda")["column_neg_lse"].isnan()
            assert found.nonzero().flatten().tolist() == [5], (transform, bad)


def test_softplus_of_an_infinite_score_shows_it():
    """That of -infinity would be 0."""
    q, k = torch.randn(9, 4).abs(), torch.randn(9, 4)
    for bad in (float("-inf"), float("inf"), float("nan")):
        k[5, 0] = bad
        found = tile_stats(q, k, Spec(Block(1), Bias(), stats=Sigmoid().stats), backend="cuda")["neg_softplus"]
        assert found.isnan().sum() >= 8, bad  # row 5 has it as its positive


def test_an_infinite_score_of_finite_rows_spoils_their_gradients():
    """Its sigmoid is 1 or 0, which would look sound."""
    for sign in (1.0, -1.0):
        q, k = torch.randn(9, 4), torch.randn(9, 4)
        q[2], k[5] = sign * 1e20, 1e20
        q.requires_grad_()
        out = tile_loss(q, k, Spec(Block(1), Bias(), stats=Sigmoid().stats), Sigmoid(), backend="cuda")
        assert torch.autograd.grad(out.loss, q)[0][2].isnan().all(), sign


def test_where_an_index_points_nowhere_the_positive_is_no_number():
    """A GPU's targets are not read: a wrong one must show."""
    q, k, ids = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 7, -1, 4])
    pos, rows, _ = torch.ops.fused_nce.cuda_stats(
        *(q, k, 1.0, None, 1, 1, 0, 0.0, ids, -1, None, None, None), *UNMARKED, False, False, 1 << 20
    )
    assert pos.isnan().flatten().tolist() == [False, True, True, False]
    assert rows.isfinite().all()


def test_one_gradient_for_both_roles_is_one_buffer():
    x = torch.randn(20, 6)
    spec = Spec(Index(), drop_self=True)
    arguments = (x, None, 0.5, None, 1, 1, 0, 0.0, torch.arange(20).roll(1), 0, None, None, None, *UNMARKED)
    _, _, dq, dk, *_ = torch.ops.fused_nce.cuda_loss(*arguments, False, "nce", 0.05, 0.0, True, True, False, 1 << 20)
    z = x.clone().requires_grad_()
    tile_loss(z, None, spec, Nce(), scale=0.5, row_ids=arguments[8], backend="reference").loss.backward()
    assert dk.numel() == 0
    torch.testing.assert_close(dq, z.grad)


def test_what_a_separate_positive_leaves_undone():
    """No column writes `pos`: it is handed on as it came."""
    spec, given = Spec(Separate(2)), torch.randn(5, 2)
    found = tile_stats(torch.randn(5, 3), torch.randn(7, 3), spec, positives=given, backend="cuda")
    assert torch.equal(found["pos"], given)


def test_a_small_softplus_keeps_its_digits():
    """e^-20 is below the rounding of 1: log(1 + e) would be 0."""
    torch.manual_seed(2)
    q, k = torch.randn(9, D), torch.randn(9, D)
    spec = Spec(Block(1), Bias(), stats=("neg_softplus",))
    exact, found = (
        tile_stats(x, y, spec, scale=0.05, bias=-20.0, backend=backend)["neg_softplus"]
        for x, y, backend in ((q.double(), k.double(), "reference"), (q, k, "cuda"))
    )
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("statistic", [("neg_softplus",), ("neg_sum",), ("pos_sum",), LogOut.READS[1:], ("square",)])
@pytest.mark.parametrize("transform", [Identity(), TanhClip(200.0), Bias()], ids=lambda t: t.code)
def test_a_log_sum_that_is_not_wanted_weighs_nothing_where_its_exponential_overflows(transform, statistic, dtype):
    """e^t is infinite from t = 88.8 on, and infinity times a coefficient of 0 would be NaN."""
    torch.manual_seed(4)
    spec = Spec(Block(3, 3), transform, statistic)
    bias = torch.tensor(0.3) if transform == Bias() else None
    q, k = ((30 * torch.randn(rows, D) / D**0.25).to(dtype) for rows in (12, 21))
    assert (q.double() @ k.double().T).max() > 89
    results = []
    for backend, x, y in (("reference", q.double(), k.double()), ("cuda", q, k)):
        one, two = x.clone().requires_grad_(), y.clone().requires_grad_()
        found = tile_stats(one, two, spec, scale=0.5, bias=bias, backend=backend)
        total = torch.stack([found[name].sum() for name in statistic if found[name].requires_grad]).sum()
        results.append(torch.autograd.grad(1e-3 * total, (one, two)))
    step = max(5e-5, 4 * torch.finfo(dtype).eps)
    for exact, x in zip(*results, strict=True):
        assert ((x.double() - exact).abs() <= step * exact.abs().max()).all()


def test_float16_gradients_of_the_square_of_columns_keep_small_coefficients():
    """A log-sum that is not wanted among the columns' statistics has no say in what brings the weights into range.

    Columns of thousands, so that a gradient made of weights below float16's range is within it.
    """
    torch.manual_seed(5)
    q, k = (torch.randn(12, D) / 8192).half(), (torch.randn(21, D) * 8192).half()
    results = []
    for backend, x, y in (("reference", q.double(), k.double()), ("cuda", q, k)):
        one = x.clone().requires_grad_()
        found = tile_stats(one, y, Spec(Block(1), columns=("square",)), backend=backend)["column_square"]
        results.append(torch.autograd.grad(found, one, torch.full_like(found, 1e-10))[0].double())
    exact, found = results
    assert (found - exact).abs().max() <= 4e-3 * exact.abs().max()
