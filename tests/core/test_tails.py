"""The tail's hand-written derivative against autograd; specs and tails through their codes; atoms that merge."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fused_nce.core import atoms, tails
from fused_nce.core.spec import (
    STATISTICS,
    WHOLE_ROW,
    Bias,
    Block,
    Dist,
    Identity,
    Index,
    Labels,
    Separate,
    Spec,
    SqDist,
    TanhClip,
    parse,
)
from fused_nce.core.statistics import STATISTIC, Scores, Sets, softplus
from fused_nce.core.tails import MARGIN_TAILS, LogIn, LogOut, Nce, Sigmoid

SPEC = Spec(Block(3))


def statistics(n=5, p=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    pos, rows = (4 * torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((n, p), (3, n)))
    return pos.requires_grad_(), rows.requires_grad_()


@pytest.mark.parametrize("reduction", tails.REDUCTIONS)
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_derivative_equals_autograd(reduction, penalty):
    pos, rows = statistics()
    tail, m = Nce(penalty, reduction), 15
    loss, nce, value = tail.values(SPEC, pos, rows, None, m)
    up_loss, up_penalty = 1.7, -0.6
    up_nce = torch.randn(nce.shape, dtype=torch.float64)
    total = up_loss * loss + (up_nce * nce).sum() + up_penalty * value
    d_pos, d_rows = torch.autograd.grad(total, (pos, rows))
    share = 1 / pos.numel() if reduction == "mean" else 1.0
    found = tail.coefficients(
        SPEC,
        pos,
        rows,
        None,
        up_loss * tail.unit(pos.numel()) + up_nce * share,
        torch.tensor(up_loss + up_penalty, dtype=torch.float64),
        5 * m,
    )
    torch.testing.assert_close(found.d_pos, d_pos, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.d_rows, d_rows, rtol=1e-12, atol=1e-15)


POSED = {  # tail: spec
    "nce": SPEC,
    "nce both ways": Spec(Block(3), columns=("neg_lse",)),
    "log_out": Spec(Labels(), stats=(*LogOut.READS, "square")),
    "log_in": Spec(Labels(), stats=(*LogIn.READS, "square")),
    "sigmoid": Spec(Block(3), stats=(*Sigmoid.READS, "square")),
    **{tail.NAME: Spec(Labels(), SqDist(), (*tail.READS, "square")) for tail in MARGIN_TAILS},
}


@pytest.mark.parametrize("reduction", tails.REDUCTIONS)
@pytest.mark.parametrize("name", POSED)
def test_every_tails_derivative_equals_autograd(name, reduction):
    """By hand against autograd, statistics taken as free: weight, penalty and all reductions."""
    spec, g = POSED[name], torch.Generator().manual_seed(1)
    tail = tails.TAILS[name.split()[0]](0.3, reduction, 0.7)
    n, m = 6, 15

    def draw(*shape):
        return (3 * torch.randn(*shape, dtype=torch.float64, generator=g)).requires_grad_()

    pos, rows = draw(n, spec.n_pos), draw(len(spec.stats), n)
    columns = draw(1, n, spec.n_pos) if spec.columns else None
    if "pos_count" in spec.stats:
        with torch.no_grad():
            rows[spec.stats.index("pos_count")] = torch.tensor([0.0, 1, 2, 3, 2, 7])
    loss, nce, value = tail.values(spec, pos, rows, columns, m)
    up_nce = torch.randn(nce.shape, dtype=torch.float64, generator=g)
    total = 1.7 * loss + (up_nce * nce).sum() - 0.6 * value
    leaves = [x for x in (pos, rows, columns) if x is not None]
    exact = torch.autograd.grad(total, leaves, allow_unused=True)
    elements = n * tail.per_row(spec)
    share = (1 / elements if reduction == "mean" else 1.0) * tail.weight
    up = torch.tensor(1.7 - 0.6, dtype=torch.float64)
    found = tail.coefficients(spec, pos, rows, columns, 1.7 * tail.unit(elements) + up_nce * share, up, n * m)
    for stat, given, value in zip(spec.stats, found.d_rows, exact[1], strict=True):
        # A count is a number, and the gap of a lone positive is 0 whatever its score.
        if stat == "pos_gap":
            given = torch.where(rows[spec.stats.index("pos_count")] == 1, value, given)
        if stat != "pos_count":
            torch.testing.assert_close(given, value, rtol=1e-12, atol=1e-15, msg=stat)
    if exact[0] is not None:
        torch.testing.assert_close(found.d_pos, exact[0], rtol=1e-12, atol=1e-15)
    if columns is not None:
        torch.testing.assert_close(found.d_columns, exact[2], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("z", [-800.0, -40.0, -20.0, -1e-3, 0.0, 1e-3, 19.9, 20.1, 25.0, 40.0, 800.0])
def test_softplus_is_never_linear(z):
    """`F.softplus` returns its argument above 20, 2e-9 too little; the relative error counts, for tiny losses too."""
    exact = max(z, 0.0) + math.log1p(math.exp(-abs(z)))
    assert softplus(torch.tensor(z, dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-15, abs=0)


def test_positive_gradient_does_not_cancel():
    """1 − p at p = 1 − 1e-30: p − 1 would be 0."""
    pos, rows = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    rows[0] = math.log(1e-30)
    d = Nce().coefficients(SPEC, pos, rows, None, 1.0, 1.0, 1)
    assert d.d_pos.item() == pytest.approx(-1e-30, rel=1e-12)
    assert d.d_rows[0].item() == pytest.approx(1e-30, rel=1e-12)


@pytest.mark.parametrize("n", [1, 5, 1023, 1024, 1025, 70_000])
def test_fixed_sum(n):
    x = torch.rand(n, dtype=torch.float64)
    assert tails.fixed_sum(x).item() == pytest.approx(math.fsum(x.tolist()), rel=1e-14)


def test_fixed_sum_does_not_depend_on_threads():
    x = torch.rand(3_000_001)
    sums = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.append(tails.fixed_sum(x))
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def scores(t, own=None):
    """As statistics see them: t in every set, or its positives where `own`, s something else."""
    everywhere = torch.ones_like(t, dtype=torch.bool)
    of = Sets(everywhere, everywhere, everywhere) if own is None else Sets(own, ~own, everywhere)
    return Scores(t, t, of)


MERGED = [name for name, stat in STATISTIC.items() if stat.merge is not None]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", MERGED)
def test_partial_results_merge(name, dim):
    """A fold over two parts, merged, is the fold over both; an empty part changes nothing. Of rows and of columns."""
    names = (*STATISTIC[name].reads, name)
    x = torch.randint(-9, 9, (4, 10)).double() / 2  # with ties, across the parts too
    x[:, 0] = x[:, 5]
    x = x if dim else x.T

    def fold(t):
        return atoms.fold_tile(names, scores(t), dim)

    left, right = (x[:, :3], x[:, 3:]) if dim else (x[:3], x[3:])
    whole = atoms.merge_tiles(names, [fold(x)])
    torch.testing.assert_close(atoms.merge_tiles(names, [fold(left), fold(right)]), whole, rtol=1e-14, atol=1e-14)
    nothing = torch.zeros_like(x, dtype=torch.bool)
    empty = atoms.fold_tile(names, Scores(x, x, Sets(nothing, nothing, nothing)), dim)
    merged = [
        atoms.merge_tiles(names, [atoms.merge_two(names, *parts)]) for parts in ((fold(x), empty), (empty, fold(x)))
    ]
    assert torch.equal(merged[0], whole)
    assert torch.equal(merged[1], whole)


def test_what_needs_whole_rows_says_so():
    assert [name for name in STATISTIC if name not in MERGED] == list(WHOLE_ROW)
    x = atoms.fold_tile(WHOLE_ROW, scores(torch.randn(3, 4), torch.rand(3, 4) < 0.5))
    with pytest.raises(TypeError, match=r"^statistics: got two parts of triplets_all, need whole rows$"):
        atoms.merge_two(WHOLE_ROW, x, x)


def test_derived_statistics_are_finished_after_the_merge():
    names = ("pos_lse", "pos_sum", "pos_count", "pos_gap")
    x = torch.randn(4, 10, dtype=torch.float64)
    own = torch.rand(4, 10) < 0.4
    own[0], own[1] = False, torch.arange(10) == 3  # no positive; one
    of = [Sets(part, ~part, torch.ones_like(part)) for part in (own[:, :3], own[:, 3:])]
    found = atoms.merge_tiles(
        names, [atoms.fold_tile(names, Scores(y, y, o)) for y, o in zip((x[:, :3], x[:, 3:]), of, strict=True)]
    )
    for i in range(4):
        exact = (x[i][own[i]].logsumexp(0) - x[i][own[i]].mean()).item() if own[i].any() else 0.0
        assert found[3, i].item() == pytest.approx(exact, abs=1e-14)
    assert found[3, 1].item() == 0  # exactly: a lone positive has no gap


@pytest.mark.parametrize("name", STATISTIC)
def test_statistic_weight_is_its_derivative(name):
    """Each weight against autograd of its fold, or of its definition where it is derived."""
    stat = STATISTIC[name]
    names = (*stat.reads, name)
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    own = torch.rand(4, 10) < 0.5
    found = atoms.merge_tiles(names, [atoms.fold_tile(names, scores(x, own))])
    if stat.weight is None:  # a number, of which there is no slope; or an extreme, undefined at ties
        assert name in ("neg_max", "pos_max", "pos_min") or torch.equal(found[-1], found[-1].round())
        return
    (exact,) = torch.autograd.grad(found[-1].sum(), x)
    named = {key: row.detach()[:, None] for key, row in zip(names, found, strict=True)}
    slope = stat.slope(scores(x.detach(), own), named)
    assert slope is not None
    torch.testing.assert_close(slope, exact)
    assert slope.any()


@pytest.mark.parametrize("transform", [Identity(), TanhClip(4.0), SqDist(), Dist()])
def test_transform_slope_is_its_derivative(transform):
    top = -0.01 if isinstance(transform, (SqDist, Dist)) else 30
    s = torch.linspace(-30, top, 101, dtype=torch.float64, requires_grad=True)
    t = atoms.transform_value(transform, s)
    torch.testing.assert_close(
        atoms.transform_slope(transform, t), torch.autograd.grad(t.sum(), s)[0], rtol=1e-9, atol=1e-15
    )


def test_a_distance_of_zero_has_no_slope():
    t = torch.tensor([-2.0, 0.0, -0.0, math.nan])
    assert atoms.transform_slope(Dist(), t)[:3].tolist() == [0.5, 0.0, 0.0]
    assert atoms.transform_slope(Dist(), t)[3].isnan()


def test_codes_round_trip():
    transforms: tuple[Identity | TanhClip, ...] = (Identity(), TanhClip(20.0), TanhClip(1 / 3), TanhClip(1e-30))
    for n_c, rows, transform in itertools.product((1, 49), (1, 7), transforms):
        for stats in (STATISTICS, ("square",), ("neg_max", "neg_lse")):
            spec = Spec(Block(n_c, rows), transform, stats)
            assert parse(spec.code) == spec
    for layout in (Index(), Labels(), Separate(), Separate(3), Block(2, 2)):
        for columns, drop_self in itertools.product(((), ("neg_lse",), ("neg_lse", "neg_max")), (False, True)):
            for other in (Bias(), SqDist(), Dist()):
                spec = Spec(layout, other, LogOut.READS, columns, drop_self)
                assert parse(spec.code) == spec
    for penalty, reduction in itertools.product((0.0, 0.04, 1 / 3, 1e-30), tails.REDUCTIONS):
        for tail in tails.TAILS.values():
            assert tails.parse(tail(penalty, reduction, 0.5).code) == tail(penalty, reduction, 0.5)


def test_parity_of_the_report():
    """`mi_bound` and the rest, from their definitions."""
    pos, rows = (x.detach() for x in statistics(4, 3))
    found = dict(zip(tails.REPORT, Nce().report(SPEC, pos, rows, None, 12).tolist(), strict=True))
    lse, top = rows[0], rows[1]
    losses = [math.log1p(math.exp(lse[i] - pos[i, j])) for i in range(4) for j in range(3)]
    shifted = [math.log1p(math.exp(lse[i] - math.log(3) - pos[i, j])) for i in range(4) for j in range(3)]
    assert found["top1"] == pytest.approx((pos > top[:, None]).double().mean().item())
    assert found["pos_mean"] == pytest.approx(pos.mean().item())
    assert found["neg_lse_mean"] == pytest.approx(lse.mean().item())
    assert found["nce_minus_chance"] == pytest.approx(sum(losses) / 12 - math.log(10))
    assert found["mi_bound"] == pytest.approx(math.log(4) - sum(shifted) / 12)
