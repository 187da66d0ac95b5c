"""`csrc/cuda/rows.cu` as nvcc compiled it, run by the interpreter under the package's own driver."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from bench import static_cuda
from fused_nce import _nvcc, info_nce, moco_nce, tile_loss
from fused_nce.backends import cuda
from fused_nce.core.spec import Block, Identity, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.backends.test_cuda_on_host import ROUTES, statistics, summarize
from tests.backends.test_cuda_static import MOST_ISSUED, NVCC, judge
from tests.cases import Case, draw
from tests.cases import run as run_case
from tests.conftest import MODULE, REASON
from tests.losses.test_registry import OPEN, etas_of
from tests.ptx import rows as ptx_rows
from tests.ptx.held import hold
from tests.ptx.machine import launch

EMULATES = hasattr(MODULE, "cuda_emulate_by")
pytestmark = [
    pytest.mark.skipif(not EMULATES, reason=REASON or "built without the emulation of a GPU"),
    pytest.mark.skipif(_nvcc.find() is None, reason="no nvcc on this machine"),
]
DTYPES = ("bfloat16", "float16", "float32")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Compiled once."""
    return ptx_rows.Rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def launched(library, play_gpu):
    """The kernels that were launched."""
    with library.in_place() as names:
        yield names


def test_the_dearest_loops_neither_spill_nor_issue_more_than_before(library):
    """Of the machine code that ptxas makes of them for sm_90."""
    assert NVCC is not None
    names = {static_cuda.label(entry): entry for entry in re.findall(r"\.entry (\w+)\(", library.text)}
    dearest = {name for passed in MOST_ISSUED for name in passed}
    kernels = static_cuda.compile_for(NVCC, library.ptx, "sm_90", [names[name] for name in dearest])
    assert {kernel.name for kernel in kernels} == dearest
    judge(kernels)


OPTIONS = ("margin", "guide, smoothing", "several positives, hard negatives", "prefixes")
KINDS = ("amdim_nce", "clip_loss", "sup_con", "siglip_loss", *(f"info_nce/{each}" for each in OPTIONS))


def test_a_loss_of_each_kind(launched, record_eta, monkeypatch):
    """In one kernel, by operators; both ways; optional statistics; a bias; marks of each kind; prefixes."""
    for dtype in DTYPES:
        assert hold(KINDS, dtype, "cuda", record_eta) == len(KINDS)
    monkeypatch.setattr(cuda, "whole_loss", None)
    assert hold(("amdim_nce",), "bfloat16", "cuda", record_eta) == 1
    kernels = "mark loss loss_summary summary multiply fold finish weigh fold_columns finish_columns fold_optional "
    assert set((kernels + "finish_optional cosines weigh_prefix").split()) == set(launched)


def test_rows_of_norm_1(launched):
    """What the examples, whose rows are, do not launch: norms, own scores, and the way back."""
    draw = torch.Generator().manual_seed(0)
    for dtype, ulp in zip(DTYPES, (2**-7, 2**-10, 2e-6), strict=True):
        q, k, queue = (torch.randn(n, 41, generator=draw).to(getattr(torch, dtype)) for n in (6, 6, 10))
        leaves = [q.requires_grad_(), k.requires_grad_()]
        for loss in (
            lambda backend: info_nce(q, k, normalize=True, backend=backend).loss,  # noqa: B023
            lambda backend: moco_nce(q, k.detach(), queue, backend=backend).loss,  # noqa: B023
        ):
            ours, theirs = (loss(name) for name in ("cuda", "reference"))
            torch.testing.assert_close(ours, theirs, rtol=10 * ulp, atol=0)
            found, exact = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (ours, theirs))
            for x, y in zip(found, exact, strict=True):
                if y is not None:
                    assert (x.double() - y.double()).abs().max() <= ulp * y.double().abs().max()
    assert {"unit", "through"} < set(launched)


def test_a_summary_of_many_and_a_product(launched):
    """What no example launches: a summary by several CTAs, and the upstream gradient's product."""
    pos, rows = statistics(9000, 4)
    loss, nce, penalty, report = summarize(pos, rows, 4, 9000, 0.05, reports=3)
    tail, spec = Nce(0.05), Spec(Block(4), TanhClip(20.0))
    values = tail.values(spec, pos.double(), rows.double(), None, 36000)
    for x, y in zip((loss, nce, penalty), values, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)
    wanted = tail.reports(spec, pos.double(), rows.double(), None, 36000, 3)
    torch.testing.assert_close(report.double(), wanted, rtol=2e-6, atol=2e-6)
    for dtype in DTYPES:
        x = torch.linspace(-3, 3, 1000).to(getattr(torch, dtype))
        for factor in (1.0, 0.7):
            out = x.clone()
            torch.ops.fused_nce.cuda_multiply_(out, torch.tensor(factor))
            assert torch.equal(out, (x.float() * torch.tensor(factor)).to(x.dtype))
    assert launched == ["summary", "last_summary", *["multiply"] * 6]


@pytest.mark.parametrize(
    "columns", [72, pytest.param(12544, marks=pytest.mark.nightly)], ids=["few", "more than 48 KB of them"]
)
def test_scores_that_a_cta_keeps_give_the_bits_of_those_it_reads_again(columns, library, launched, monkeypatch):
    """Of a card that lets a CTA have the room, and of one that does not."""
    bytes_of: list[int] = []

    def start(*arguments: Any) -> None:
        bytes_of.append(arguments[-1])
        launch(*arguments)

    monkeypatch.setattr(ptx_rows, "launch", start)
    q, k = (torch.linspace(-2, 3, n * 6).sin().reshape(n, 6).bfloat16() for n in (64, columns))
    found = []
    for room in (library.most.value, 1 << 10):
        monkeypatch.setattr(library.most, "value", room)
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        for clip in (20.0, None):
            spec = Spec(Block(1), TanhClip(clip) if clip else Identity())
            tile_loss(leaves[0], leaves[1], spec, Nce(0.05), backend="cuda").loss.backward()
        found.append([x.grad for x in leaves])
    assert set(bytes_of) == {0, 4 * columns}
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def test_a_launch_takes_nothing_back_that_another_is_allowed(library, launched, monkeypatch):
    """Of shared memory beyond 48 KB: a kernel has all that there is, whichever rows it was launched with before."""
    monkeypatch.setattr(ptx_rows, "launch", lambda *arguments: None)
    for columns in (12_320, 50_000, 12_320):
        q, k = torch.zeros(64, 2).bfloat16().requires_grad_(), torch.zeros(columns, 2).bfloat16()
        tile_loss(q, k, Spec(Block(1), TanhClip(20.0)), Nce(0.05), backend="cuda").loss.backward()
    (allowed,) = (each for name, each in library.allowed.items() if "loss" in name)
    assert allowed == {library.most.value}


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss(dtype, launched, record_eta):
    assert hold(OPEN, dtype, "cuda", record_eta) >= 28


WIDE: tuple[dict[str, Any], ...] = (
    {"images": 20, "n_k": 20, "n_c": 5, "d": 1024},
    {"images": 20, "n_k": 24, "n_c": 5, "d": 600, "offset": 2, "penalty": 0.0},
    {"images": 17, "n_k": 17, "n_c": 3, "d": 65, "layouts": ("sliced", "stepped_rows")},
    {"images": 5, "n_k": 9, "n_c": 31, "d": 257, "rows_per_image": 3, "offset": 4, "entry": "stats"},
)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_route(dtype, launched, record_eta):
    """Each way through the driver: strips, blocks, panels, parts of a row; wide rows; rows that lie apart; clips."""
    for case in [*(case for case, _ in ROUTES.values()), *(Case("cuda", "", 7, scale=0.1, **wide) for wide in WIDE)]:
        for clip in (20.0, 60.0, None):
            one = dataclasses.replace(case, dtype=dtype, clip=clip)
            etas = run_case(one)
            record_eta("cuda ptx", dtype, etas)
            assert max(etas.values()) <= 1, one.line


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
def test_fresh_cases(dtype, launched, fresh_seed, record_eta):
    rng = np.random.default_rng(fresh_seed)
    for _ in range(40):
        case = draw(rng, "cuda", dtype)
        case = dataclasses.replace(case, penalty=0.0) if case.plant == "huge_row" else case
        etas = run_case(case)
        record_eta("cuda ptx", dtype, etas)
        assert max(etas.values()) <= 1, case.line


# Barriers whose removal no test may see, and why: nothing is wrong without them.
NOT_NEEDED = {
    # The last of a `reduce` whose result only the thread that wrote it takes.
    "fold": {1},
    "fold_optional": {1},
    "loss": {4},
    "loss_summary": {4},
    # One warp, whose lanes go together.
    "finish": {0, 1, 2, 3, 4, 5},
    "finish_optional": {0, 1},
}


def name_of(entry: str) -> str:
    """A kernel's, without its template's."""
    return re.search(r"\d+([a-z_]+)_kernel", entry)[1]  # type: ignore[index]


def normalised(loss: Any, *options: Any, **names: Any) -> None:
    """Forward and backward of rows that are to have norm 1."""
    q, k = torch.linspace(-3, 3, 2 * 6 * 41).reshape(2, 6, 41).bfloat16().requires_grad_()
    loss(q, k, *options, backend="cuda", **names).loss.backward()


@pytest.mark.nightly
def test_a_barrier_less_is_a_hazard(library, launched, monkeypatch):
    """Each barrier of each kernel is taken out in turn: the interpreter reports all but those that are not needed."""
    removed: tuple[str, int] = ("", 0)
    kernels: dict[str, int] = {}

    def start(kernel: Any, *arguments: Any) -> None:
        name = name_of(kernel.name)
        barriers = [n for n, i in enumerate(kernel.code) if i.name == "bar"]
        kernels[name] = len(barriers)
        if removed[0] != name:
            return launch(kernel, *arguments)
        at = barriers[removed[1]]
        whole = kernel.code[at]
        kernel.code[at] = whole._replace(name="membar", flags=("cta",), operands=())
        try:
            launch(kernel, *arguments)
        finally:
            kernel.code[at] = whole

    monkeypatch.setattr(ptx_rows, "launch", start)
    wide = Case("cuda", "bfloat16", 1, images=3, n_k=6, n_c=300, d=8, scale=0.3)
    runs: list[partial[Any]] = [partial(run_case, wide)]
    names = ("clip_loss", "sup_con", "amdim_nce", "info_nce/prefixes")
    runs += [partial(etas_of, n, "cpu", "cuda", torch.bfloat16) for n in names]
    pos, rows = statistics(9000, 4)
    runs.append(partial(summarize, pos, rows, 4, 9000, 0.05, reports=3))
    queue = torch.linspace(-1, 2, 10 * 41).reshape(10, 41).bfloat16()
    at_once: list[partial[Any]] = [runs[0], partial(normalised, info_nce, normalize=True)]
    runs.append(at_once[1])
    at_once.append(partial(normalised, lambda q, k, **names: moco_nce(q, k.detach(), queue, **names)))
    seen: dict[str, set[int]] = defaultdict(set)
    # By operators, then as one function.
    for run, whole in [*((run, None) for run in runs), *((run, cuda.whole_loss) for run in at_once)]:
        monkeypatch.setattr(cuda, "whole_loss", whole)
        removed = ("", 0)
        kernels.clear()
        run()
        for name, count in dict(kernels).items():
            for number in set(range(count)) - seen[name]:
                removed = (name, number)
                try:
                    run()
                except RuntimeError as error:
                    if "hazard" not in str(error):
                        raise
                    seen[name].add(number)
    every = {entry: sum(i.name == "bar" for i in library.code[entry].code) for entry in library.code.heads}
    unseen = {name_of(entry): set(range(count)) - seen[name_of(entry)] for entry, count in every.items()}
    assert {name: numbers for name, numbers in unseen.items() if numbers} == NOT_NEEDED
