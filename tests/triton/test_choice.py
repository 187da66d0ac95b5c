"""When the Triton backend runs, what it says when it cannot, and what it allocates; no kernel is launched."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fused_nce import tile_loss, tile_stats, workspace_bytes
from fused_nce.backends import triton
from fused_nce.backends.triton import configs, plan
from fused_nce.core import dispatch, first_contact
from fused_nce.core.spec import Bias, Block, Spec, TanhClip
from fused_nce.core.tails import Nce
from tests.triton.heard import take_down

SPEC = Spec(Block(3), TanhClip(20.0))


def posed(n=6, m=6, d=8, dtype=torch.float32, device="cuda") -> Any:
    """(q, k) as far as why_not reads them: shape, dtype and device."""
    return tuple(SimpleNamespace(shape=(rows, d), dtype=dtype, device=torch.device(device)) for rows in (n, m))


@pytest.fixture
def capability(monkeypatch):
    """Poses as a card of any capability."""

    def pose(*found: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)

    pose(9, 0)
    return pose


def test_a_cpu_tensor_is_refused_by_name():
    q = torch.ones(3, 4)
    assert triton.why_not(SPEC, q, q) == "needs a GPU, not cpu"
    with pytest.raises(ValueError, match=r"^backend: got 'triton', which cannot run this: needs a GPU, not cpu$"):
        tile_stats(q, q, Spec(Block(1)), backend="triton")


def test_cpu_tensors_never_choose_it(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.ones(3, 4)
    name, _ = dispatch.choose(SPEC, q, q, "")
    assert name in dispatch.AUTOMATIC
    assert "triton" not in dispatch.AUTOMATIC
    assert "triton" not in dispatch.last_path().reason  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", configs.DTYPES)
def test_a_gpu_tensor_is_taken(capability, dtype):
    assert triton.why_not(SPEC, *posed(dtype=dtype)) is None


@pytest.mark.parametrize(
    ("found", "able"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 6), True),
        ((9, 0), True),
        ((10, 3), True),
        ((12, 1), True),
        ((11, 0), False),
    ],
)
def test_the_card_must_be_in_the_table(capability, found, able):
    capability(*found)
    reason = triton.why_not(SPEC, *posed())
    assert (reason is None) == able
    assert able or str(reason).startswith("has no tiles for cuda")


def test_reasons(capability, monkeypatch):
    assert "not float64" in str(triton.why_not(SPEC, *posed(dtype=torch.float64)))
    assert "rows" in str(triton.why_not(SPEC, *posed(m=2**31 - 1, d=1)))
    q, k = posed()[0], posed(dtype=torch.float64)[1]
    assert "not float64" in str(triton.why_not(SPEC, q, k))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for name, able in (("gfx942:sramecc+:xnack-", True), ("gfx90a", True), ("gfx1100", False)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, n=name: SimpleNamespace(gcnArchName=n))
        assert (triton.why_not(SPEC, *posed()) is None) == able, name
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(gcnArchName="gfx90a"))
    assert triton.why_not(SPEC, *posed(dtype=torch.float16)) == "has no tiles for float16 on gfx90a"
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert triton.why_not(SPEC, *posed()) == "triton is not installed"


def test_asking_imports_no_triton():
    """Nor does the formula: the core needs torch alone."""
    code = """
import sys, json, torch
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import fused_nce
from fused_nce.core.spec import Block, Spec
size = fused_nce.workspace_bytes(Spec(Block(3)), 9, 9, 9, backend="triton")
print(json.dumps([fused_nce.backends()["triton"], size]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0, done.stderr
    reason, size = json.loads(done.stdout)
    assert reason == "needs a GPU, not cpu"
    assert size > 0


SHAPES = [(1, 3, 1), (128, 128 * 49, 1024), (256, 65536, 128), (65536, 65536, 128), (64, 1 << 20, 2048), (7, 21, 5000)]


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
@pytest.mark.parametrize("limit", [1, 1 << 20, 256 << 20])
def test_splits(n, m, d, limit):
    """They cover the walk, none is empty, each starts at a tile, and their sums stay within the limit."""
    slices = -(-d // plan.SLICE)
    for n_x, n_y in itertools.permutations((n, m)):
        split = plan.split(n_x, n_y, slices, d, limit)
        assert (split.splits - 1) * split.walk < n_y <= split.splits * split.walk
        assert split.walk % plan.STEP == 0
        assert split.splits == 1 or 4 * split.splits * n_x * d <= limit
        assert split.splits == 1 or split.splits * slices * -(-n_x // plan.BLOCK) <= plan.PROGRAMS


@pytest.mark.parametrize(("n", "m", "d"), [*SHAPES, (32768, 32768, 512), (32768, 32768, 1024), (300, 1 << 26, 8)])
@pytest.mark.parametrize("limit", [1, 1 << 20, 256 << 20, 1 << 40])
@pytest.mark.parametrize("size", [2, 4])
def test_strips(n, m, d, limit, size):
    """They cover the rows, none is empty, each is whole tiles within the limit."""
    rows = plan.strip_rows(n, m, d, size, limit)
    assert rows % plan.STRIP == 0
    assert plan.strip_bytes(rows, m, d, size) <= limit
    if rows:
        strips = -(-n // rows)
        assert (strips - 1) * rows < n
        assert -(-m // plan.STRIP_WALK) <= 65535
        assert n <= plan.STRIP or rows < 2 * n
        sums = 4 * m * d if size < 4 else 0  # of columns, beside a strip's weights and sums where they have room
        assert plan.strip_bytes(rows, m, d, size) + sums * (sums <= limit // 2) <= limit - limit // 16
        wide = plan.workspace_bytes(Spec(Block(1)), n, m, d, size, limit) >= plan.strip_bytes(rows, m, d, size)
        assert wide or d <= plan.WIDE
    if back := plan.back_bytes(n, m, 2, size, limit):
        parts = plan.both_split(n, m, 2, back, limit).splits
        assert parts == 1 or back + 8 * n * parts <= limit
        spec = Spec(Block(1), stats=("neg_lse", "neg_max"), columns=("neg_lse",))
        assert plan.workspace_bytes(spec, n, m, d, size, limit) >= back + 8 * n * parts


def test_a_trial_has_several_strips():
    """Also one that ends within a program."""
    sizes = *first_contact.LARGE, 16, 4, 256 << 20
    assert plan.strip_rows(*sizes) > first_contact.LARGE[0]
    with first_contact.believing(as_large=True):
        assert plan.strip_rows(*sizes) == plan.STRIP


def test_what_is_stored_and_what_is_not():
    spec = Spec(Block(1), stats=("neg_lse", "neg_max"), columns=("neg_lse",))
    half, brain, wide = torch.float16, torch.bfloat16, torch.float32
    for given, dtypes, shared, found in (
        (spec, (brain, brain), False, (True, True)),
        (spec, (half, half), False, (True, False)),
        (spec, (brain, brain), True, (True, False)),
        (spec, (wide, brain), False, (False, False)),
        (replace(spec, transform=Bias()), (wide, wide), False, (True, False)),
        (replace(spec, columns=("square",)), (wide, wide), False, (False, True)),
    ):
        at_once, strip = plan.ways(given, 300, 400, 64, dtypes, shared, 256 << 20)
        assert (at_once, strip > 0) == found, (given, dtypes, shared)
    rows = replace(spec, columns=())
    for given, d, dtype, shared, found in (
        (rows, plan.WIDE, wide, False, (False, False)),
        (rows, plan.WIDE + 1, wide, False, (True, True)),
        (rows, 300, half, False, (True, False)),
        (rows, 300, brain, True, (True, False)),
        (replace(rows, stats=("neg_softplus",)), 300, brain, False, (False, True)),
    ):
        at_once, strip = plan.ways(given, 300, 400, d, (dtype, dtype), shared, 256 << 20)
        assert (at_once, strip > 0) == found, (given, d, dtype, shared)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_strips_memory_is_free_before_the_gradients_end(monkeypatch):
    """Its weights and their sums; nothing is launched."""
    from fused_nce.backends.triton import launch, stored

    take_down(monkeypatch)
    held: list[StorageWeakRef] = []
    alive: list[int] = []
    total = launch.Sweep.total
    hear = lambda *given, **options: held.extend(StorageWeakRef(x.untyped_storage()) for x in (given[0], given[2]))  # noqa: E731
    monkeypatch.setattr(stored, "multiply", hear)  # (w, k, sums), then (w, q, dk)

    def totalled(*given):
        alive.append(sum(not storage.expired() for storage in held[:3]))
        return total(*given)

    monkeypatch.setattr(launch.Sweep, "total", totalled)
    q, k = (torch.randn(n, 16, requires_grad=True) for n in (70, 75))
    spec = Spec(Block(1), stats=Nce().stats, columns=("neg_lse",))
    torch.autograd.grad(tile_loss(q, k, spec, Nce(), backend="triton").loss, (q, k))
    assert (len(held), alive) == (4, [0, 0])


def test_clips_strips():
    """Of bfloat16 in 256 MiB, with the sums of the columns: what docs/performance.md counts."""
    found = {d: -(-32768 // plan.strip_rows(32768, 32768, d, 2, 256 << 20)) for d in (512, 1024)}
    assert found == {512: 13, 1024: 20}


def test_a_queue_fills_the_card():
    """256 queries against 65536 keys: 4 blocks of rows alone would leave 128 of 132 multiprocessors idle."""
    assert 4 * plan.split(256, 65536, 1, 128, 256 << 20).splits > 200


@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_workspace_is_partial_sums_and_statistics(n, m, d):
    size = workspace_bytes(Spec(Block(1)), n, m, d, torch.bfloat16, "triton", "cuda")
    assert size <= (256 << 20) + 4 * max(n, m) * (d / 8 + 1) + 4 * n * (3 * plan.PROGRAMS + 16)
    if n == m:
        assert size < n * m / 8  # of 4 n m bytes that the scores would take
