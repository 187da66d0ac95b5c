"""Weights that a row and a column share: both ways of a matrix, and symmetric scores, seen above the diagonal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_nce import tile_loss, tile_stats
from fused_nce.core.spec import Bias, Block, Index, Labels, Spec, TanhClip
from fused_nce.core.tails import LogIn, LogOut, Nce, Tail
from tests.conftest import MODULE, needs_kernels

pytestmark = needs_kernels

NCE, SUPERVISED = Nce(0.1), LogOut().stats
LABELS = Labels()
# name: (N, M, spec, tail, arguments); M 0: k is q.
CASES: dict[str, tuple[int, int, Spec, Tail, dict[str, Any]]] = {
    "both ways": (150, 150, Spec(Block(1), stats=NCE.stats, columns=("neg_lse",)), NCE, {}),
    "both ways of images": (78, 210, Spec(Block(5, 2), columns=("neg_lse", "neg_max")), NCE, {"offset": 2}),
    "both ways, by target": (
        70,
        150,
        Spec(Index(), columns=("neg_lse", "square")),
        NCE,
        {"row_ids": torch.arange(70) // 3},
    ),
    "both ways, clipped": (90, 101, Spec(Block(1), TanhClip(5.0), columns=("neg_lse",)), Nce(), {}),
    "both ways, itself left out": (65, 0, Spec(Block(5, 5), columns=("neg_lse",), drop_self=True), Nce(), {}),
    "twins": (150, 0, Spec(Block(2, 2), drop_self=True), NCE, {}),
    "many strips": (700, 0, Spec(Block(7, 7), drop_self=True), Nce(), {}),
    "itself kept": (75, 0, Spec(Block(5, 5)), NCE, {}),
    "clipped": (98, 0, Spec(Block(7, 7), TanhClip(9.0), drop_self=True), NCE, {}),
    "bias": (120, 0, Spec(Block(3, 3), Bias(), stats=Nce().stats, drop_self=True), Nce(), {"bias": -0.7}),
    "no penalty": (129, 0, Spec(Block(3, 3), stats=Nce().stats, drop_self=True), Nce(), {}),
    "labels": (131, 0, Spec(LABELS, stats=SUPERVISED, drop_self=True), LogOut(), {"row_ids": torch.arange(131) % 9}),
    "labels, inside": (
        300,
        0,
        Spec(LABELS, stats=(*SUPERVISED, "square"), drop_self=True),
        LogIn(0.1),
        {"row_ids": torch.arange(300) // 7 * (1 << 33)},  # beyond 32 bits
    ),
    "labels of its own": (64, 0, Spec(LABELS, stats=SUPERVISED), LogOut(), {"row_ids": torch.arange(64) % 5}),
    "labels that differ": (
        80,
        0,
        Spec(LABELS, stats=SUPERVISED, drop_self=True),
        LogOut(),
        {"row_ids": torch.arange(80) % 5, "column_ids": torch.arange(80) % 4},
    ),
    "targets": (96, 0, Spec(Index(), drop_self=True), NCE, {"row_ids": torch.arange(96).roll(1)}),
    "images elsewhere": (90, 0, Spec(Block(3, 5)), NCE, {}),
}
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def features(n: int, m: int, d: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, d, generator=g).to(dtype).requires_grad_() for size in (n, m) if size]


def run(case: str, leaves: list[torch.Tensor], backend: str, scale: float, wide: bool = False) -> list[torch.Tensor]:
    """The loss, its positives and statistics, and the gradients of the features and of the scale."""
    _, m, spec, tail, arguments = CASES[case]
    leaves = [x.detach().double().requires_grad_() for x in leaves] if wide else leaves
    factor = torch.tensor(scale, dtype=torch.float64 if wide else torch.float32, requires_grad=True)
    if not spec.columns:
        spec = replace(spec, stats=tuple(dict.fromkeys((*spec.stats, *tail.stats))))
    keys = leaves[1] if m else None
    out = tile_loss(leaves[0], keys, spec, tail, scale=factor, backend=backend, **arguments)
    return [out.loss, out.pos, *out.rows.values(), *torch.autograd.grad(out.loss, [*leaves, factor])]


def assert_close(found, exact, tolerance):
    for x, y in zip(found, exact, strict=True):
        if not y.numel():
            continue
        assert torch.equal(x.isinf(), y.isinf())
        x, y = (torch.where(z.isfinite(), z.double(), 0.0) for z in (x, y))
        assert (x - y).abs().max() <= tolerance * y.abs().max().clamp(min=1e-3)


# Of rows of norm √D: at the first two scales the bound of the scores is below 64 and no exponential has a shift.
@pytest.mark.parametrize("scale", [0.4, 2.0, 7.0])
@pytest.mark.parametrize("workspace_mb", ["16", "0.2", "0.09"])
def test_as_the_whole_matrix(workspace_mb, scale, monkeypatch):
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    for case, (n, m, *_) in CASES.items():
        for dtype, tolerance in TOLERANCE.items():
            leaves = features(n, m, 10, dtype)
            exact = run(case, leaves, "reference", scale, wide=True)
            more = 20 if scale > 1 else 1  # scores of 200, with as many more roundings
            assert_close(run(case, leaves, "cpu", scale), exact, tolerance * more), case


def flop(function) -> int:
    before = MODULE.gemm_flop()
    function()
    return MODULE.gemm_flop() - before


@pytest.mark.parametrize(
    ("case", "n", "workspace_mb", "units"),
    [
        # Four strips of 256 rows, ten of whose sixteen blocks are on or above the diagonal, four of them on it.
        ("twins", 1024, "16", 10 / 16 + 10 / 16 + 6 / 16),
        ("labels", 1024, "16", 10 / 16 + 10 / 16 + 6 / 16),
        # The scores of the last two strips are kept, three blocks, and of none.
        ("twins", 1024, "2", (10 + 7) / 16 + 1),
        ("twins", 1024, "1", (10 + 10) / 16 + 1),
        ("both ways", 1024, "16", 3),
        ("both ways", 1024, "4", 3),  # all scores, and beside them what an eighth more holds
        ("both ways", 1024, "3", 3 + 3 / 4),
        ("both ways", 1024, "2", 4),
    ],
)
def test_the_gemms_are_counted(case, n, workspace_mb, units, monkeypatch):
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    _, m, spec, tail, arguments = CASES[case]
    spec = replace(spec, stats=tail.stats)
    if arguments:
        arguments = {"row_ids": torch.arange(n) % 9}
    leaves = features(n, n if m else 0, 8, torch.float32)
    keys = leaves[1] if m else None

    def step():
        torch.autograd.grad(tile_loss(leaves[0], keys, spec, tail, backend="cpu", **arguments).loss, leaves)

    assert flop(step) == units * 2 * n * n * 8
    with FlopCounterMode(display=False) as counter:  # and the formulas say what was computed
        step()
    assert counter.get_total_flops() == flop(step)


def test_scores_that_are_the_workspace_itself_are_kept():
    """2048 × 2048 of float32 in 16 MiB, with an eighth more for all else; where that is not enough, within 16."""
    for n, d, most, kept in (
        (2048, 64, 18, True),
        (2048, 512, 18, True),
        (2048, 2048, 16, False),
        (2049, 64, 16, False),
    ):
        plan = MODULE.plan(n, n, d, torch.float32, 16 << 20, column_stats=[0])
        assert plan["total_bytes"] <= most << 20
        assert (plan["strips_kept"] == plan["strips"]) == kept


@pytest.mark.parametrize("scale", [0.4, 7.0])
def test_the_bits_do_not_depend_on_threads(scale):
    for case in ("both ways of images", "many strips", "labels, inside"):
        leaves = features(*CASES[case][:2], 12, torch.float32)
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(case, leaves, "cpu", scale))
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True)), case


@pytest.mark.parametrize("case", ["both ways", "twins", "labels"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_bad_number_shows(case, bad):
    leaves = features(*CASES[case][:2], 10, torch.float32)
    with torch.no_grad():
        leaves[0][-1, 3] = bad
    loss, *_, dq, dscale = run(case, leaves, "cpu", 0.4)
    assert loss.isnan()
    assert dq.isnan().any()
    assert dscale.isnan()


def test_scores_that_range_widely():
    """Far beyond the range of exp, and so small that all are equal: the norms decide which have shifts."""
    for case in ("both ways", "twins", "labels"):
        for scale in (1e-30, 1e-3, 30.0):
            leaves = features(*CASES[case][:2], 10, torch.float32)
            exact = run(case, leaves, "reference", scale, wide=True)
            assert_close(run(case, leaves, "cpu", scale)[:2], exact[:2], 3e-6)


def test_statistics_alone_are_of_the_whole_matrix():
    """`stats` and `grads` know no upstream of a tail: they go over all of the matrix, and agree."""
    (q,) = features(150, 0, 10, torch.float32)
    spec = replace(CASES["twins"][2], stats=NCE.stats)
    out = tile_loss(q, None, spec, NCE, scale=0.4, backend="cpu")
    alone = tile_stats(q, None, spec, scale=0.4, backend="cpu")
    for name, x in out.rows.items():
        torch.testing.assert_close(x, alone[name], rtol=2e-6, atol=1e-6)
    parts = torch.autograd.grad(out.nce + out.penalty, q, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out.loss, q)[0], parts, rtol=1e-4, atol=1e-7)
