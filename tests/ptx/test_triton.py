"""Triton's kernels as compiled for a card, run by the interpreter and held to the error budget."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch

from fused_nce import nt_xent, tile_loss
from fused_nce.backends.triton import plan
from fused_nce.core.spec import Block, Identity, Spec
from fused_nce.core.tails import Nce
from tests.cases import Case
from tests.cases import run as run_case
from tests.losses.test_registry import OPEN
from tests.ptx import machine, memory
from tests.ptx.held import hold
from tests.triton.heard import Heard

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DTYPES = ("bfloat16", "float16", "float32")
UNITS = {"bfloat16": 2**-8, "float16": 2**-11}  # of rounding


def test_a_few_losses(monkeypatch, record_eta):
    """What they compile, as a first call on a card would: sets of positives and one tensor in both roles; a learnable
    bias and gathered positives; a ceiling; the negatives' sum. And what that computes.
    """
    from tests.ptx.compiled import pose

    compiled = pose(monkeypatch, "sm_90")
    assert hold(("sup_con", "siglip_loss"), "bfloat16", "triton", record_eta) == 2
    assert len(compiled) == 12
    assert hold(("amdim_nce",), "float32", "triton", record_eta) == 1
    assert hold(("moco_nce",), "bfloat16", "triton", record_eta) == 1  # with norms, an own key and the way back
    assert hold(("clip_loss",), "bfloat16", "triton", record_eta) == 1  # both sides at once, and stored weights
    filtered = ("info_nce/margin", "info_nce/own hard negatives, row weights")  # the second smooths its labels
    assert hold(filtered, "bfloat16", "triton", record_eta) == 2
    monkeypatch.setattr(plan, "WIDE", 8)  # statistics by a pass without sums, and stored weights
    assert hold(("amdim_nce", "info_nce"), "bfloat16", "triton", record_eta) == 2


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_every_loss(architecture, dtype, monkeypatch, record_eta):
    from tests.ptx.compiled import pose

    pose(monkeypatch, architecture)
    assert hold(OPEN, dtype, "triton", record_eta) >= 28


# Wide rows; a last tile of one row, column or word; several tiles, splits, slices; rows that lie apart; no clip.
WIDE: tuple[dict[str, Any], ...] = (
    {"images": 20, "n_k": 20, "n_c": 5, "d": 1024},
    {"images": 20, "n_k": 24, "n_c": 5, "d": 600, "offset": 2, "penalty": 0.0},
    {"images": 17, "n_k": 17, "n_c": 3, "d": 65, "layouts": ("sliced", "stepped_rows")},
    {"images": 3, "n_k": 60, "n_c": 9, "d": 129, "clip": None},
    {"images": 140, "n_k": 140, "n_c": 2, "d": 33, "clip": None, "tensor_scale": True},
    {"images": 5, "n_k": 9, "n_c": 31, "d": 257, "rows_per_image": 3, "offset": 4, "entry": "stats"},
    {"images": 40, "n_k": 300, "n_c": 9, "d": 16, "clip": 60.0, "workspace_mb": 0.5},
)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(len(WIDE)))
def test_a_case(number, dtype, monkeypatch, record_eta):
    from tests.ptx.compiled import pose

    pose(monkeypatch, "sm_90")
    case = Case("triton", dtype, 0, scale=0.1, **WIDE[number])
    etas = run_case(case)
    record_eta("triton ptx", dtype, etas)
    assert max(etas.values()) <= 1, (case.line, etas)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", UNITS)
def test_symmetric_scores_are_seen_once(dtype, monkeypatch):
    """Of three blocks and a ragged one, beside the reference of the same rows."""
    from fused_nce.backends.triton import kernels
    from tests.ptx.compiled import pose

    pose(monkeypatch, "sm_90")
    monkeypatch.setattr(plan, "MIRROR", 64)
    monkeypatch.setattr(plan, "MIRROR_FROM", 1)
    fold = Heard(monkeypatch, kernels, "fold_kernel")
    spec, found = Spec(Block(2, 2), Identity(), Nce().stats, drop_self=True, unit_norm=True), []
    x = torch.nn.functional.normalize(torch.randn(230, 40, generator=torch.Generator().manual_seed(0)), dim=1)
    for backend, wide in (("triton", getattr(torch, dtype)), ("reference", torch.float64)):
        z = x.to(getattr(torch, dtype)).to(wide).requires_grad_()
        out = tile_loss(z, None, spec, Nce(), scale=10.0, backend=backend)
        found.append([*(y.double() for y in out.rows.values()), torch.autograd.grad(out.loss, z)[0].double()])
    assert [launch["MIRRORED"] for launch in fold.launches] == [True]
    for ours, exact in zip(found[0][:-1], found[1][:-1], strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-6)
    z = x.to(getattr(torch, dtype)).double()  # a weight is rounded before it meets a row, and their sum at the end
    p = (10 * z @ z.T).fill_diagonal_(float("-inf")).softmax(dim=1)
    budget = UNITS[dtype] * ((p + p.T) * 10 / len(z) @ z.abs() + found[1][-1].abs())
    assert bool(((found[0][-1] - found[1][-1]).abs() <= budget).all())


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_sides_at_once_and_strips_of_weights(dtype, monkeypatch):
    """Of two strips, beside the reference of the same rows."""
    from tests.ptx.compiled import pose

    pose(monkeypatch, "sm_90")
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "0.2")
    narrow, found = getattr(torch, dtype), []
    assert dtype == "float16" or 0 < plan.strip_rows(150, 150, 72, narrow.itemsize, 2**20 // 5) < 150
    given = [torch.randn(150, 72, generator=torch.Generator().manual_seed(seed)).to(narrow) for seed in (0, 1)]
    spec = Spec(Block(1), Identity(), Nce().stats, ("neg_lse",))
    for backend, wide in (("triton", narrow), ("reference", torch.float64)):
        q, k = (x.to(wide).requires_grad_() for x in given)
        out = tile_loss(q, k, spec, Nce(), scale=torch.tensor(0.3, dtype=torch.float32), backend=backend)
        found.append([*(y.double() for y in (*out.rows.values(), *torch.autograd.grad(out.loss, (q, k))))])
    for ours, exact, error in zip(*found, (1e-6, 1e-6, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(ours, exact, rtol=8e-3 if error == 1e-5 else 2e-6, atol=error)


WRITES = ("will_write", "will_copy")
# Kernels with barriers that order nothing: Triton puts one before each use of shared memory, whoever used it before.
APART = {"fold_kernel", "weights_kernel", "both_kernel", "strip_kernel", "merge_kernel", "finish_kernel", "unit_kernel"}
OWN = {"merge_kernel", "finish_kernel"}  # sums of one warp's columns


class Epochs:
    """Which shared memory each warp reads and writes between the barriers of a launch."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.barriers: list[int] = []  # in the order in which they were met
        self.met: list[dict[str, set[tuple[int, int]]]] = []  # before the first of them, and after each
        for name in ("will_read", "will_write"):
            patch.setattr(memory.Shared, name, self.noting(name, getattr(memory.Shared, name)))
        release, begin = machine.Machine._release, machine.Machine.__init__

        def released(x: machine.Machine) -> None:
            self.began(min(x.waiting) - 1)
            release(x)

        def begun(x: machine.Machine, *given: Any) -> None:
            self.began(-1)
            begin(x, *given)

        patch.setattr(machine.Machine, "_release", released)
        patch.setattr(machine.Machine, "__init__", begun)

    def began(self, place: int) -> None:
        self.barriers.append(place)
        self.met.append({"will_read": set(), "will_write": set(), "will_copy": set()})

    def noting(self, name: str, call: Any) -> Any:
        def noted(x: memory.Shared, cells: Any, warps: Any, note: bool = True) -> None:
            call(x, cells, warps, *([] if note else [False]))
            self.met[-1][name if note else "will_copy"].update(zip(cells.tolist(), warps.tolist(), strict=True))

        return noted

    def why_none(self, place: int) -> str:
        """Why a barrier orders nothing: "" where it does order what one warp writes and another one meets."""
        found = "apart"  # nothing, or other places, on its two sides
        for n in (n for n, barrier in enumerate(self.barriers) if barrier == place):
            before, after = self.met[n - 1], self.met[n]
            # A copy is written where it is waited for; from its launch on nobody may meet its place.
            for one, other in (("will_write", "will_read"), *product(("will_read", "will_write"), WRITES)):
                mine = dict[int, set[int]]()
                for cell, warp in before[one]:
                    mine.setdefault(cell, set()).add(warp)
                for cell, warp in after[other]:
                    if mine.get(cell, {warp}) != {warp}:
                        return ""
                    found = "own" if cell in mine else found  # places that a warp has to itself
        return found


@pytest.mark.nightly
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_barrier_less_is_a_hazard(mirrored, monkeypatch):
    """Each barrier of each kernel is taken out in turn: that is reported, or it orders nothing, by what was noted."""
    from tests.ptx import compiled
    from tests.ptx.parse import Fault

    reported, needless = dict[str, int](), dict[str, set[str]]()
    known: set[str] = set()

    def run(found: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        kernel, text = compiled.kernel_of(found), found.asm["ptx"]
        if text in known:
            return compiled.execute(found, grid, arguments)
        known.add(text)
        given = {key: x.clone() for key, x in arguments.items() if isinstance(x, torch.Tensor)}  # some work in place

        def execute() -> None:
            for key, x in given.items():
                arguments[key].copy_(x)
            compiled.execute(found, grid, arguments)

        with pytest.MonkeyPatch.context() as patch:
            epochs = Epochs(patch)
            execute()
        for at, whole in enumerate(kernel.code):
            if whole.name != "bar" or at not in epochs.barriers:  # a loop of no turn
                continue
            kernel.code[at] = whole._replace(name="membar", flags=("cta",), operands=())
            why = epochs.why_none(at)
            with pytest.raises(Fault, match="hazard") if not why else nullcontext():
                execute()
            kernel.code[at] = whole
            reported[kernel.name] = reported.get(kernel.name, 0) + (not why)
            needless.setdefault(kernel.name, set()).update({why} - {""})
        execute()

    compiled.pose(monkeypatch, "sm_90", run)
    if mirrored:
        monkeypatch.setattr(plan, "MIRROR", 64)
        monkeypatch.setattr(plan, "MIRROR_FROM", 1)
        x, y = (torch.randn(70, 24, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
        nt_xent(x.requires_grad_(), y.requires_grad_(), backend="triton").loss.backward()
    else:
        names = ("sup_con", "siglip_loss", "amdim_nce", "clip_loss", "moco_nce")
        assert hold(names, "bfloat16", "triton", lambda *_: None) == len(names)
    met = (
        {"unit_kernel", "close_kernel"}
        if mirrored
        else {"both_kernel", "strip_kernel", "close_both_kernel", "merge_kernel"}
    )
    assert reported.keys() >= {"fold_kernel", "weights_kernel", "finish_kernel"} | met
    assert all(reported.values())
    assert {name for name, why in needless.items() if "apart" in why} <= APART
    assert {name for name, why in needless.items() if "own" in why} <= OWN
