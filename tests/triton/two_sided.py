"""Statistics of rows and of columns, and wide rows, on the Triton backend, under the interpreter: stored weights.

`test_interpret.py` runs this file in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fused_nce import tile_stats
from fused_nce.backends.triton import kernels, plan, stored
from fused_nce.backends.triton.configs import gather_tile
from fused_nce.core import workspace
from fused_nce.core.engine import tile_loss
from fused_nce.core.spec import Bias, Block, Hardness, Identity, Index, Labels, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.marks import nightly_but
from tests.triton.heard import Heard

PLAIN = Spec(Block(1), Identity(), Nce().stats, ("neg_lse",))
SMALL = "0.2"  # MiB: strips of 128 rows for 140 columns


class Launched:
    """How many products cuBLAS is asked for, passes over the scores for statistics, and those for gradients."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.products = self.passes = self.strips = self.weighed = 0
        multiply, fold = stored.multiply, type(kernels.fold_kernel).__getitem__

        def counting(*given: Any, **options: Any) -> None:
            self.products += 1
            multiply(*given, **options)

        def getting(kernel: Any, grid: Any) -> Any:
            self.passes += kernel is kernels.fold_kernel or kernel is stored.both_kernel
            self.strips += kernel is stored.strip_kernel
            self.weighed += kernel is kernels.weights_kernel
            return fold(kernel, grid)

        patch.setattr(stored, "multiply", counting)
        patch.setattr(type(kernels.fold_kernel), "__getitem__", getting)


@pytest.fixture
def launched(monkeypatch):
    return Launched(monkeypatch)


def draw(seed: int, n: int, d: int = 9) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def hold(spec: Spec, q: torch.Tensor, k: torch.Tensor | None, wanted: str = "qks", **given: Any) -> None:
    """Statistics, loss and gradients beside the reference's, with a learned scale."""
    found = []
    for backend in ("triton", "reference"):
        scale = torch.tensor(given.get("scale", 0.3)).requires_grad_("s" in wanted)
        leaves = [x.clone().requires_grad_(name in wanted) for name, x in (("q", q), ("k", k)) if x is not None]
        tail = Nce(0.04 if "square" in spec.stats else 0.0)
        call = {**given, "scale": scale, "backend": backend}
        out = tile_loss(leaves[0], leaves[1] if k is not None else None, spec, tail, **call)
        stats = tile_stats(leaves[0].detach(), leaves[1].detach() if k is not None else None, spec, **call)
        grads = torch.autograd.grad(out.loss, [x for x in (*leaves, scale) if x.requires_grad])
        found.append([out.loss, *out.rows.values(), *stats.values(), *grads])
    narrow = q.dtype == torch.float16
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-3 if narrow else 1e-4, atol=2e-4 if narrow else 1e-5)


SPECS = {
    "plain": PLAIN,
    "images, a clip and a penalty": replace(PLAIN, layout=Block(3, 2), transform=TanhClip(20.0), stats=Nce(0.1).stats),
    "the row itself": replace(PLAIN, layout=Block(2, 2), drop_self=True),
    "rows of an image": replace(PLAIN, layout=Block(1, 3)),
    "hardness": replace(PLAIN, transform=Hardness(0.4)),
    "targets": replace(PLAIN, layout=Index()),
}


@pytest.mark.parametrize("name", nightly_but(["images, a clip and a penalty", "targets"], SPECS))
def test_both_sides_at_once_and_strips_of_weights(name, launched, monkeypatch):
    """In two strips, the last a ragged one; blocks and tiles that end within."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", SMALL)
    spec = SPECS[name]
    n = 140 if spec.layout == Block(1) else 144
    block = spec.layout if isinstance(spec.layout, Block) else Block(1)
    m = n // block.rows_per_image * block.n_c
    given: dict[str, Any] = {"row_ids": torch.arange(3, n + 3) % 40} if name == "targets" else {}
    d = 40 if name == "targets" else 9  # more than a tile multiplies at a time
    rows = plan.strip_rows(n, m, d, 4, workspace.limit_bytes("cpu"))
    assert 0 < rows < n
    hold(spec, draw(0, n, d), draw(1, m, d), **given)
    assert launched.products == 2 * -(-n // rows)
    assert launched.passes == 2  # of the loss and of the statistics


ROWS = {name: replace(spec, columns=()) for name, spec in SPECS.items()}
ROWS |= {
    "a margin": Spec(Index(), stats=(*Nce().stats, "neg_sum", "neg_count"), filters=("ceiling",)),
    "no shift": replace(ROWS["plain"], unit_norm=True),
}


@pytest.mark.parametrize("name", nightly_but(["plain", "images, a clip and a penalty", "a margin"], ROWS))
def test_wide_rows_store_their_weights(name, launched, monkeypatch):
    """Without statistics of columns; in two strips, the last a ragged one."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", SMALL)
    monkeypatch.setattr(plan, "WIDE", 8)
    spec = ROWS[name]
    n = 140 if spec.layout == Block(1) else 144
    block = spec.layout if isinstance(spec.layout, Block) else Block(1)
    m = n // block.rows_per_image * block.n_c
    given: dict[str, Any] = {"row_ids": torch.arange(3, n + 3) % 40} if isinstance(spec.layout, Index) else {}
    d = 40 if name == "targets" else 9
    q, k = draw(0, n, d), draw(1, m, d)
    if spec.unit_norm:
        q, k = (torch.nn.functional.normalize(x, dim=1) for x in (q, k))
    if spec.filters:
        given["ceilings"] = (q @ k.T).sort(dim=1).values[:, m // 2][None] + 1e-3
    fold = Heard(monkeypatch, kernels, "fold_kernel")
    hold(spec, q, k, scale=3.0 if spec.unit_norm else 0.3, **given)
    rows = plan.strip_rows(n, m, d, 4, workspace.limit_bytes("cpu"))
    assert launched.products == 2 * -(-n // rows) > 2
    assert (launched.passes + len(fold.launches), launched.weighed) == (2, 0)  # of the loss and of the statistics
    assert {x["X"] for x in fold.launches} == ({64} if spec.filters else set())  # else the pass that has no sums


@pytest.mark.parametrize("wanted", nightly_but(["k"], ["q", "k", "s", "qs"]))
def test_wanted_gradients_of_wide_rows(wanted, launched, monkeypatch):
    monkeypatch.setattr(plan, "WIDE", 8)
    hold(ROWS["plain"], draw(0, 70), draw(1, 75), wanted)
    assert (launched.products, launched.strips) == (1, 1)


def test_one_strip_of_an_offset():
    hold(replace(PLAIN, layout=Block(2)), draw(0, 37), draw(1, 600), offset=200)


def test_more_rows_of_an_image_than_a_turn_takes():
    assert gather_tile(9, 18).partners < 18
    hold(replace(PLAIN, layout=Block(2, 18)), draw(0, 72), draw(1, 8))


@pytest.mark.parametrize("wanted", nightly_but(["q", "ks", "s"], ["q", "k", "s", "qs", "ks", "qk"]))
def test_wanted_gradients(wanted, launched):
    hold(PLAIN, draw(0, 70), draw(1, 75), wanted)
    assert launched.products == len(set(wanted) & {"q", "k"}) + (wanted == "s")


@pytest.mark.parametrize(
    ("spec", "passes"),
    [
        (replace(PLAIN, transform=Bias()), 1),
        (replace(PLAIN, columns=("neg_lse", "neg_max")), 1),
        (replace(PLAIN, columns=("neg_lse", "square"), stats=Nce(0.1).stats), 2),
    ],
    ids=["a bias", "a maximum", "a square"],
)
def test_what_is_done_side_by_side(spec, passes, launched):
    """Weights are not stored beside a bias; columns take a pass of their own for more than a maximum and a sum."""
    hold(spec, draw(0, 70), draw(1, 75), bias=0.3 if spec.transform == Bias() else None)
    assert launched.passes == 2 * passes
    assert launched.products == 2 * (spec.transform != Bias())


def test_float16_and_one_tensor_in_both_roles(launched):
    hold(PLAIN, draw(0, 70).half(), draw(1, 75).half())
    hold(replace(PLAIN, layout=Block(2, 2), drop_self=True), draw(0, 70), None)
    assert launched.products == 0
    assert launched.passes == 4


def test_no_room(launched, monkeypatch):
    """For a strip, nor for what blocks leave of their columns: the passes of each side."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.001")
    hold(PLAIN, draw(0, 70), draw(1, 75))
    assert launched.products == 0
    assert launched.passes == 4


def test_flop_are_those_that_run(launched, monkeypatch):
    """Of statistics and both gradients: one pass or two, stored weights or a product beside the scores of each side."""
    labels = Spec(Labels(), stats=("neg_lse", "pos_lse"), columns=("neg_lse",))
    n, d = 40, 9
    q, k = draw(0, n), draw(1, n)
    for spec, k_given, mb, units in (
        (PLAIN, k, "16", 1 + 3),
        (labels, k, "16", 2 + 3),
        (replace(PLAIN, columns=("square",)), k, "16", 2 + 3),
        (replace(PLAIN, transform=Bias()), k, "16", 1 + 4),
        (PLAIN, k, "0.001", 1 + 4),
        (PLAIN, k, "0.0005", 2 + 4),
        (ROWS["plain"], k, "16", 1 + 3),
        (replace(ROWS["plain"], transform=Bias()), k, "16", 1 + 4),
    ):
        monkeypatch.setattr(plan, "WIDE", 256 if spec.columns else 8)
        monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", mb)
        launched.passes = launched.strips = launched.products = launched.weighed = 0
        ids: Any = {"row_ids": torch.arange(n) % 7, "column_ids": torch.arange(n) % 5} if spec is labels else {}
        leaves = q.clone().requires_grad_(), k_given.clone().requires_grad_()
        bias = 0.3 if spec.transform == Bias() else None
        with FlopCounterMode(display=False) as counter:
            found = tile_stats(*leaves, spec, scale=0.3, bias=bias, backend="triton", **ids)
            torch.stack([x.sum() for name, x in found.items() if not name.endswith("max")]).sum().backward()
        ran = launched.passes + launched.strips + launched.products + 2 * launched.weighed
        assert (ran, counter.get_total_flops()) == (units, 2 * n * n * d * units), (spec, mb)


def test_labels_and_statistics_of_any_tail(launched):
    n, m = 150, 140
    ids: dict[str, Any] = {"row_ids": torch.arange(n) % 7, "column_ids": torch.arange(m) % 11}
    spec, found = Spec(Labels(), stats=("neg_lse", "pos_lse"), columns=("neg_lse",)), []
    for backend in ("triton", "reference"):
        q, k = draw(0, n).requires_grad_(), draw(1, m).requires_grad_()
        rows = tile_stats(q, k, spec, scale=0.3, backend=backend, **ids)
        rows = {name: rows[name].nan_to_num(neginf=0.0) for name in ("neg_lse", "pos_lse", "column_neg_lse")}
        total = torch.stack([(x * draw(i, len(x), 1).squeeze(1)).sum() for i, x in enumerate(rows.values())]).sum()
        found.append([*rows.values(), *torch.autograd.grad(total, (q, k))])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    assert launched.products == 2


def test_a_column_has_a_shift_of_its_own():
    """Its scores are 300 below those of the others: e to that is no float, beside their maximum."""
    q, k = torch.full((70, 8), 1.0) + 0.01 * draw(0, 70, 8), 0.01 * draw(1, 75, 8) + 20.0
    k[3] -= 40.0
    hold(PLAIN, q, k, scale=1.0)
    q, k = (torch.nn.functional.normalize(x, dim=1) for x in (q, k))
    found = [tile_stats(q, k, replace(PLAIN, unit_norm=True), scale=20.0, backend=x) for x in ("triton", "reference")]
    for ours, exact in zip(*(x.values() for x in found), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_sums_of_16_bits_are_float32():
    """Wherever the product runs."""
    w, y = draw(0, 5, 300).bfloat16(), draw(1, 300, 7).bfloat16()
    out = torch.full((5, 7), float("nan"))
    for add in (False, True):
        stored.multiply(w, y, out, add)
    torch.testing.assert_close(out, 2 * (w.float() @ y.float()))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_score_shows_in_its_row_and_in_its_columns(bad):
    """Of −∞ too, whose exponential is 0."""
    q, k = draw(0, 20), draw(1, 30).abs()
    q[5, 0] = -bad
    found = [tile_stats(q, k, PLAIN, scale=0.3, backend=x) for x in ("triton", "reference")]
    for name, ours in found[0].items():
        if not name.endswith("max"):
            assert torch.equal(ours.isfinite(), found[1][name].isfinite()), name
