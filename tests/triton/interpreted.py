"""The Triton backend under its interpreter: `test_interpret.py` runs this file in a process of its own.

TRITON_INTERPRET must be set before Triton is imported, and torch itself imports it.
"""

from __future__ import annotations

import dataclasses
import os
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fused_nce import info_nce, tile_stats
from fused_nce.backends.triton import atoms, configs, kernels, memory, plan
from fused_nce.backends.triton.form import Form
from fused_nce.core import atoms as definition
from fused_nce.core import dispatch, workspace
from fused_nce.core.engine import tile_loss as engine_loss
from fused_nce.core.problem import Problem
from fused_nce.core.spec import Bias, Block, Hardness, Identity, Index, Labels, Spec, TanhClip
from fused_nce.core.statistics import softplus
from fused_nce.core.tails import LogOut, Nce
from tests.backends.test_atoms import SIZES, U, compare
from tests.cases import Case, can_run, draw, run
from tests.core.problems import features, grads_of
from tests.core.problems import run as tile_loss
from tests.layouts import LAYOUTS
from tests.marks import nightly_but
from tests.triton.heard import Heard

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_interpret.py"
FIXED = 20261124
MOST_TILES = 64  # the interpreter takes a millisecond a tile


# ---- random problems --------------------------------------------------------------------------------------------


def tiles_of(case: Case) -> int:
    """Tiles of scores that one pass walks through, chunks counted apart."""
    tile = configs.tile(configs.INTERPRETED, torch.float32, case.d)
    n, m = case.images * case.rows_per_image, case.n_k * case.n_c
    return -(-n // tile.x) * -(-m // tile.y) * -(-case.d // tile.chunk) * -(-case.d // tile.slice)


def sweep(dtype: str, seed: int | tuple[int, int], count: int) -> None:
    rng, failures = np.random.default_rng(seed), []
    for _ in range(count):
        case = draw(rng, "triton", dtype)
        while tiles_of(case) > MOST_TILES:
            case = draw(rng, "triton", dtype)
        assert can_run(case) is None
        name, worst = max(run(case).items(), key=lambda item: item[1])
        if not worst <= 1:
            failures.append(f"{name}: error is {worst:.3g} of its budget\n    TRITON_INTERPRET=1 {case.line}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fixed_cases(dtype):
    sweep(dtype, FIXED, 6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fresh_cases(dtype, fresh_seed):
    sweep(dtype, fresh_seed, 3)


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(10))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_many_cases(dtype, block, fresh_seed):
    sweep(dtype, (fresh_seed, block), 15)


# ---- each path on purpose ---------------------------------------------------------------------------------------

# Columns, then rows, of more than plan.STEP: splits in the pass for dq, then in the pass for dk.
WIDE = Case("triton", "float32", 1, images=3, n_k=190, n_c=5, d=9, offset=11)
TALL = Case("triton", "float32", 2, images=60, rows_per_image=5, n_k=60, n_c=1, d=9)


@pytest.mark.parametrize(
    ("penalty", "clip"), nightly_but([(0.04, 20.0), (0.0, 300.0)], product((0.0, 0.04), (None, 20.0, 300.0)))
)
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
def test_split_walks(shape, penalty, clip):
    n, m = shape.images * shape.rows_per_image, shape.n_k * shape.n_c
    assert max(plan.split(x, y, 1, shape.d, 1 << 28).splits for x, y in ((n, m), (m, n))) > 1
    assert max(run(dataclasses.replace(shape, penalty=penalty, clip=clip)).values()) <= 1


def test_more_splits_than_are_added_up_at_a_time():
    case = Case("triton", "float32", 6, images=2, n_k=461, n_c=5, d=65, penalty=0.0)
    assert plan.split(2, 461 * 5, 2, 65, 1 << 28).splits > configs.finish_tile(65, 5, 9)[1]
    assert max(run(case).values()) <= 1


@pytest.mark.parametrize(("images", "n_c", "d"), [(66, 16, 9), (17, 64, 9)])
def test_own_columns_that_end_with_a_tile(images, n_c, d):
    """The tile after them, and that before, have no masks."""
    assert max(run(Case("triton", "float32", 5, images=images, n_k=images, n_c=n_c, d=d, penalty=0.0)).values()) <= 1


@pytest.mark.parametrize("needs", ["q", "k", "s", "qs", "ks", "qks", ""])
@pytest.mark.parametrize("entry", ["loss", "stats"])
def test_wanted_gradients(needs, entry):
    """With a scale that is a tensor: its gradient comes from whichever of dq and dk there is."""
    penalty = 0.0 if "q" in needs else 0.04
    case = Case("triton", "float32", 3, n_c=17, tensor_scale=True, needs=needs, entry=entry, penalty=penalty)
    assert max(run(case).values()) <= 1


@pytest.mark.parametrize(("d", "clip"), nightly_but([(64, None), (130, 20.0)], product((64, 65, 130), (None, 20.0))))
def test_chunks_and_slices_of_the_width(d, clip):
    tile = configs.tile(configs.INTERPRETED, torch.float32, d)
    assert (tile.chunk < d) == (d > 64)
    case = Case("triton", "float32", 4, images=20, n_k=23, offset=2, n_c=3, d=d, clip=clip, scale=0.2, penalty=0.0)
    assert max(run(case).values()) <= 1
    assert max(run(dataclasses.replace(case, entry="stats")).values()) <= 1


@pytest.mark.parametrize(
    "stats", [("neg_lse",), ("neg_max", "square"), ("square", "neg_lse"), ("neg_count", "neg_sum")]
)
def test_some_statistics(stats):
    """In the order asked for; without neg_lse no negative has a weight."""
    q, k = features()
    found = {}
    for backend in ("triton", "reference"):
        out = tile_stats(q, k, Spec(Block(3), Identity(), stats), scale=0.2, backend=backend)
        total = out["pos"].sum() + sum(out[name].sum() for name in stats if name not in ("neg_max", "neg_count"))
        found[backend] = [*out.values(), *grads_of(total, q, k)]
    for ours, exact in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "m", "penalty"), [(20, 300, 0.0), (300, 20, 0.04), (70, 70, 0.0)])
def test_a_ceiling_takes_columns_out(n, m, penalty):
    """Of rows and of columns in several tiles and splits; where they are as many, of one tensor in both roles."""
    g, one = torch.Generator().manual_seed(0), n == m
    x, y, ceilings = torch.randn(n, 9, generator=g), torch.randn(m, 9, generator=g), torch.randn(1, n, generator=g)
    spec = Spec(Index(), TanhClip(20.0), Nce(penalty).stats, drop_self=one, filters=("ceiling",))
    every = dataclasses.replace(spec, stats=("neg_lse", "neg_sum", "neg_count"))
    found = []
    for backend in ("triton", "reference"):
        leaves = [z.clone().requires_grad_() for z in (x, y)[: 2 - one]]
        q, k = (leaves[0], None if one else leaves[1])
        given = {"scale": 0.3, "row_ids": torch.arange(1, n + 1) % m, "ceilings": ceilings, "backend": backend}
        rows = tile_stats(q, k, every, **given)
        loss = engine_loss(q, k, spec, Nce(penalty), **given).loss + (rows["neg_sum"] / m).sum()
        found.append([rows["neg_count"], loss, *torch.autograd.grad(loss, leaves)])
    assert (found[0][0] < m - 1 - one).any()
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n", "m", "penalty"), [(20, 300, 0.0), (300, 20, 0.04), (70, 70, 0.0)])
def test_hardness_is_of_negatives_and_has_no_slope(n, m, penalty):
    """Of two tensors, of one in both roles, by a learned scale."""
    g, one = torch.Generator().manual_seed(0), n == m
    x, y = torch.randn(n, 9, generator=g), torch.randn(m, 9, generator=g)
    spec, found = Spec(Index(), Hardness(0.4), Nce(penalty).stats, drop_self=one), []
    for backend in ("triton", "reference"):
        scale = torch.tensor(0.3).requires_grad_()
        leaves = [z.clone().requires_grad_() for z in (x, y)[: 2 - one]]
        q, k = (leaves[0], None if one else leaves[1])
        given = {"scale": scale, "row_ids": torch.arange(1, n + 1) % m, "backend": backend}
        loss = engine_loss(q, k, spec, Nce(penalty), **given).loss
        found.append([loss, *torch.autograd.grad(loss, [*leaves, scale])])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_float16_weights_have_float32s_range():
    """At an upstream of 10^7 a weight is beyond float16, the gradient of small inputs is not."""
    q, k = ((0.01 * x.detach()).requires_grad_() for x in features(dtype=torch.float16))
    found = [tile_stats(q, k, Spec(Block(3)), backend=name)["neg_lse"] for name in ("triton", "reference")]
    ours, exact = (grads_of(1e7 * x.sum(), q, k) for x in found)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1.0)


def test_a_bias_sums_over_every_tile():
    q, k = features(3, 50, 8)
    assert k.shape[0] > configs.tile(configs.INTERPRETED, torch.float32, 8).y
    bias, found = torch.tensor(-0.7, requires_grad=True), []
    spec = Spec(Block(k.shape[0] // q.shape[0]), Bias(), Nce().stats)
    for backend in ("triton", "reference"):
        loss = engine_loss(q, k, spec, Nce(), bias=bias, backend=backend).loss
        found.append(torch.autograd.grad(loss, bias)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("temperature", [0.07, 1 / 42])
def test_rows_of_norm_one_need_no_shift(temperature):
    found = []
    for backend, unit in (("triton", True), ("reference", False)):
        spec = Spec(Block(5), Identity(), ("neg_lse", "neg_max"), unit_norm=unit)
        q, k = (torch.nn.functional.normalize(x.detach(), dim=1).requires_grad_() for x in features(40, 5, 20))
        loss = engine_loss(q, k, spec, Nce(), scale=1 / temperature, backend=backend).loss
        found.append((loss, *grads_of(loss, q, k)))
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("once", "alpha"), nightly_but([(True, 0.6)], product([True, False], [0.0, 0.6])))
def test_symmetric_scores_are_seen_once(once, alpha, monkeypatch):
    """In 11 blocks, the last a ragged one, and two splits; more than there is room for are seen twice."""
    monkeypatch.setattr(plan, "MIRROR", 32)
    monkeypatch.setattr(plan, "MIRROR_FROM", 1)
    if not once:
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.02")
    assert (plan.mirrored_bytes(334, 2, workspace.limit_bytes("cpu")) > 0) == once
    fold, transform = Heard(monkeypatch, kernels, "fold_kernel"), Hardness(alpha) if alpha else Identity()
    spec, found = Spec(Block(2, 2), transform, Nce().stats, drop_self=True, unit_norm=True), []
    x = torch.nn.functional.normalize(torch.randn(334, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    for backend in ("triton", "reference"):
        z = x.clone().requires_grad_()
        out = engine_loss(z, None, spec, Nce(), scale=2.0, backend=backend)
        found.append([*out.rows.values(), *torch.autograd.grad(out.loss, z)])
    assert [launch["MIRRORED"] for launch in fold.launches] == [once]
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("penalty", nightly_but([0.04], [0.0, 0.04]))
@pytest.mark.parametrize("layout", [Block(1), Block(3, 3), Labels()], ids=str)
def test_hardness_of_one_tensor(layout, penalty):
    """Neither the row itself nor the others of its image or label are weighed."""
    tail, ids = (LogOut(penalty), torch.arange(150) % 40) if isinstance(layout, Labels) else (Nce(penalty), None)
    spec, found = Spec(layout, Hardness(0.4), tail.stats, drop_self=layout != Block(1)), []
    x = torch.randn(150, 9, generator=torch.Generator().manual_seed(0))
    for backend in ("triton", "reference"):
        q, scale = x.clone().requires_grad_(), torch.tensor(0.3).requires_grad_()
        k = None if spec.drop_self else x.flip(0)
        loss = engine_loss(q, k, spec, tail, scale=scale, row_ids=ids, column_ids=ids, backend=backend).loss
        found.append([loss, *torch.autograd.grad(loss, (q, scale))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_shared_hard_negatives_with_hardness():
    """Blocks of keys, of every row's hard negatives and, both ways, of rows among themselves."""
    g, found = torch.Generator().manual_seed(0), []
    drawn = [torch.randn(*shape, 9, generator=g) for shape in ((70,), (70,), (70, 2))]
    for backend in ("triton", "reference"):
        q, k, h = (x.clone().requires_grad_() for x in drawn)
        options: dict[str, Any] = {"directions": ("q2k", "k2q", "q2q"), "backend": backend}
        out = info_nce(q, k, hard_negatives=h, share_hard_negatives=True, hardness=0.8, normalize=True, **options)
        found.append([out.loss, *torch.autograd.grad(out.loss, (q, k, h))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def test_what_bounds_a_score():
    x, unit = torch.empty(0, 8), Spec(Block(1), unit_norm=True)
    assert Form.of(Problem(x, x, 1 / 0.07, unit, 0)).shiftless
    assert Form.of(Problem(x, x, -20.0, unit, 0)).shiftless
    assert not Form.of(Problem(x, x, 1 / 0.07, Spec(Block(1)), 0)).shiftless
    assert not Form.of(Problem(x, x, 1 / 0.07, Spec(Block(1), Hardness(40.0), unit_norm=True), 0)).shiftless
    assert not Form.of(Problem(x, x, 1 / 0.02, unit, 0)).shiftless
    assert not Form.of(Problem(x, x, torch.tensor(1.0), unit, 0)).shiftless
    assert not Form.of(Problem(x, x, 1.0, Spec(Block(1), Bias(), unit_norm=True), 0)).shiftless


def test_padding_stays_out_of_very_negative_rows():
    """Beyond the last column s is 0, and e^(0 + 200) is infinite."""
    q, k = torch.ones(3, 8).requires_grad_(), torch.full((6, 8), -25.0).requires_grad_()
    found = [tile_stats(q, k, Spec(Block(2), Identity()), backend=name)["neg_lse"] for name in ("triton", "reference")]
    ours, exact = (grads_of(x.sum(), q, k) for x in found)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(layout):
    q, k = features()
    plain = tile_loss("triton", q, k)
    laid_q, laid_k = (LAYOUTS[layout](x.detach().clone()).requires_grad_() for x in (q, k))
    laid = tile_loss("triton", laid_q, laid_k)
    for a, b in zip(grads_of(plain.loss, q, k), grads_of(laid.loss, laid_q, laid_k), strict=True):
        assert torch.equal(a, b)


def test_runs_are_equal():
    q, k = features(40, 3, 20)
    runs = []
    for _ in range(3):
        out = tile_loss("triton", q, k, penalty=0.0)
        runs.append((out.loss, *grads_of(out.loss, q, k)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_the_interpreters_bfloat16_is_refused():
    q, k = features(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="which cannot run this: Triton's interpreter multiplies bfloat16 wrongly"):
        tile_loss("triton", q, k)
    assert "triton" not in dispatch.AUTOMATIC


# ---- atoms ------------------------------------------------------------------------------------------------------


@triton.jit
def _transform_probe(x, value, slope, again, clip, inverse_clip, FORM: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t, dt = atoms.transform(tl.load(x + i), clip, inverse_clip, x, FORM)
    tl.store(value + i, t)
    tl.store(slope + i, dt)
    tl.store(again + i, atoms.slope_of(t, inverse_clip, FORM))


def form_of(spec):
    """Its atoms, as a kernel is given them."""
    x = torch.empty(0, 8)
    return Form.of(Problem(x, x, 1.0, spec, 0))


def pad(x):
    return torch.nn.functional.pad(x, (0, -len(x) % 1024))


X = pad(torch.cat([-SIZES.flip(0), SIZES]).float())


@pytest.mark.parametrize("clip", [4.0, 20.0, 43.0, 300.0])
def test_transform(clip):
    """Relative: small scores keep their digits."""
    form = form_of(Spec(Block(1), TanhClip(clip)))
    value, slope, again = (torch.empty_like(X) for _ in range(3))
    _transform_probe[(len(X) // 1024,)](X, value, slope, again, clip, 1 / clip, FORM=form, BLOCK=1024)
    exact = definition.transform_value(TanhClip(clip), X.double())
    sech = torch.cosh(X.double() / clip).reciprocal().square()
    compare(value, exact, 8 * U, 0)
    compare(slope, sech, 8 * U, 4 * U)
    compare(again, definition.transform_slope(TanhClip(clip), value.double()), 4 * U, 4 * U)


def test_transform_of_bad_scores():
    x = pad(torch.tensor([float("inf"), -float("inf"), float("nan")]))
    form = form_of(Spec(Block(1), TanhClip(20.0)))
    value, slope, again = (torch.empty_like(x) for _ in range(3))
    _transform_probe[(1,)](x, value, slope, again, 20.0, 0.05, FORM=form, BLOCK=1024)
    assert value[:2].tolist() == [20, -20]
    assert slope[:2].tolist() == [0, 0]
    assert value[2].isnan()


@triton.jit
def _softplus_probe(x, value, slope, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(x + i)
    tl.store(value + i, atoms.softplus(t))
    tl.store(slope + i, atoms.sigmoid(t))


def test_softplus():
    """Relative, where it is small too: the argument of an exponential is rounded once, which costs |t| U of e^t."""
    x = X.clamp(-80, 80)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    _softplus_probe[(len(x) // 1024,)](x, value, slope, BLOCK=1024)
    budget = (8 + 2 * x.double().abs()) * U
    for found, exact in ((value, softplus(x.double())), (slope, torch.sigmoid(x.double()))):
        assert bool(((found - exact).abs() <= budget * exact).all())


@triton.jit
def _sum_probe(x, out, kahan, count, BLOCK: tl.constexpr):
    plain = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    value = tl.load(x + tl.arange(0, BLOCK))
    for _ in range(count):
        plain += value
        total, lost = atoms.add_exactly(total, lost, value)
    tl.store(out + tl.arange(0, BLOCK), plain)
    tl.store(kahan + tl.arange(0, BLOCK), total)


def test_many_equal_terms():
    x = torch.full((16,), 0.1)
    plain, kahan = torch.empty(16), torch.empty(16)
    _sum_probe[(1,)](x, plain, kahan, 1000, BLOCK=16)
    exact = 1000 * x.double()
    assert ((plain - exact).abs() > 8 * U * exact).all()
    compare(kahan, exact, 2 * U, 0)


# ---- more than 2^31 elements ------------------------------------------------------------------------------------


@triton.jit
def _offset_probe(out, wrapped, first, stride, BLOCK: tl.constexpr):
    rows = first + tl.arange(0, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), memory.offsets(rows, stride))
    tl.store(wrapped + tl.arange(0, BLOCK), (rows * stride).to(tl.int64))


@pytest.mark.parametrize(("first", "stride"), [(2**20, 4096), (2**31 - 2**16, 2**31 - 1), (0, 2**31 - 1)])
def test_offsets_are_64_bit(first, stride):
    out, wrapped = torch.empty(16, dtype=torch.int64), torch.empty(16, dtype=torch.int64)
    with np.errstate(over="ignore"):
        _offset_probe[(1,)](out, wrapped, first, stride, BLOCK=16)
    exact = torch.tensor([(first + i) * stride for i in range(16)])
    assert torch.equal(out, exact)
    assert not torch.equal(wrapped, exact)  # the probe would show a product in 32 bits


@pytest.mark.nightly
def test_rows_beyond_two_to_the_31_elements():
    """Three rows, 2^30 elements apart: 4 GiB, which the interpreter touches."""
    apart, d = 2**30, 40
    buffer = torch.empty(2 * apart + d, dtype=torch.float16)
    q, k = features(3, 3, d, torch.float16)
    far = buffer.as_strided((3, d), (apart, 1))
    far.copy_(q.detach())
    near = tile_loss("triton", q, k)
    out = tile_loss("triton", far.requires_grad_(), k)
    assert torch.equal(out.nce, near.nce)
    assert torch.equal(grads_of(out.loss, far, k)[1], grads_of(near.loss, q, k)[1])


def test_splits_of_the_most_rows_stay_in_32_bits():
    from fused_nce.backends.triton import MOST_ROWS

    for n_x in (1, 64, 10**6):
        split = plan.split(n_x, MOST_ROWS, 1, 64, 1 << 28)
        assert (split.splits - 1) * split.walk < MOST_ROWS <= split.splits * split.walk
        assert (split.splits - 1) * split.walk + 2 * plan.STEP < 2**31
