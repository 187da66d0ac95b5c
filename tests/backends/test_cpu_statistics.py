"""Every statistic of rows and of columns in the C++ kernels, each layout and transform, against the whole matrix."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fused_nce import info_nce, tile_stats
from fused_nce.backends import cpu
from fused_nce.core.spec import (
    FILTERS,
    Bias,
    Block,
    Hardness,
    Identity,
    Index,
    Labels,
    Separate,
    Several,
    Spec,
    TanhClip,
)
from fused_nce.core.statistics import STATISTIC
from tests.backends import test_cpu_kernel
from tests.conftest import MODULE, needs_kernels

pytestmark = needs_kernels

ISAS = MODULE.build_info()["isa_compiled"] if MODULE else []  # from the oldest on
N, M, D = 70, 150, 10
ALL = tuple(name for name in STATISTIC if name in cpu.ATOMS)
# Scores are off by u·(4 + √D)·Σ|q·k|·scale ≤ 8u·10 and sums pile up as many again: relative to the largest element.
TOLERANCE = 200 * 2.0**-24

TRANSFORMS: dict[str, Any] = {"none": Identity(), "clip": TanhClip(6.0), "wide clip": TanhClip(60.0), "bias": Bias()}
TRANSFORMS |= {"hardness": Hardness(0.2)}
LAYOUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "block": (Block(3, 2), {"offset": 4}),
    "targets": (Index(), {"row_ids": torch.arange(N) * 2 % M}),
    "repeated targets": (Index(), {"row_ids": torch.arange(N) // 9}),
    "labels": (Labels(), {"row_ids": torch.arange(N) % 7 - 3, "column_ids": torch.arange(M) % 11}),
    "separate": (Separate(2), {"positives": torch.linspace(-2, 2, 2 * N).view(N, 2)}),
}
ITSELF: dict[str, tuple[Any, dict[str, Any]]] = {  # one matrix is both, its diagonal left out
    "block": (Block(5, 5), {}),
    "labels": (Labels(), {"row_ids": torch.arange(N) // 3 * (1 << 33)}),
}


MARKED = LAYOUTS | {"several": (Several(4), {"row_ids": torch.arange(4 * N).view(N, 4) * 37 % (M + 9) % M - 1})}


def found(backend, layout, transform, arguments, itself, dtype=torch.float32, filters=None):
    """Statistics, and the gradients of all of them at once, each at an upstream of its own."""
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(rows, D, generator=g).to(dtype).requires_grad_() for rows in (N, M))
    scale = torch.tensor(0.4, dtype=dtype, requires_grad=True)
    bias = torch.tensor(-0.7, dtype=dtype, requires_grad=True) if isinstance(transform, Bias) else None
    if "positives" in arguments:
        arguments = {"positives": arguments["positives"].to(dtype)}
    downwards = () if isinstance(transform, Hardness) else ALL
    spec, keys = Spec(layout, transform, ALL, downwards, drop_self=itself), None if itself else k
    if filters is not None:
        spec, columns = replace(spec, columns=(), filters=filters), N if itself else M
        guide = tuple(torch.randn(rows, 131, generator=g).to(dtype) for rows in (N, columns))
        lines = {"ceiling": torch.linspace(-3, 9, N), "guide": torch.linspace(20, -8, N)}
        arguments = arguments | {"guide": guide if "guide" in filters else None}
        if filters:
            arguments |= {"ceilings": torch.stack([lines[name] for name in filters]).to(dtype)}
    out = tile_stats(q, keys, spec, scale=scale, bias=bias, backend=backend, **arguments)
    total = torch.zeros((), dtype=dtype)
    for x in out.values():
        if x.requires_grad:  # an empty set's −inf is no loss
            total = total + torch.where(x.isfinite(), x * torch.randn(x.shape, generator=g), 0.0).sum()
    every = {"dq": q, "dk": keys, "dscale": scale, "dbias": bias}
    leaves = {name: x for name, x in every.items() if x is not None}
    return {**out, **dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))}


def compare(ours, exact):
    """Within the tolerance; infinite where the oracle is."""
    assert ours.keys() == exact.keys()
    for name, y in exact.items():
        x, finite = ours[name], y.isfinite()
        if not y.numel():  # labels hold no scores of positives
            continue
        assert torch.equal(x.isinf(), y.isinf()), name
        error, least = torch.where(finite, x - y, 0.0).abs().max(), 300.0 if name == "dscale" else 1.0
        # of dscale, terms of 18,000 in all may cancel
        assert error <= TOLERANCE * torch.where(finite, y, 0.0).abs().max().clamp(min=least), name


def filtered(backend, workspace_mb, monkeypatch):
    """Each layout and transform with its filters, held to the oracle: the call, and what it gave."""
    every = [(x, False) for x in MARKED.values()] + [(x, True) for x in ITSELF.values()]
    for (place, arguments), itself in every:
        for i, transform in enumerate(TRANSFORMS.values()):
            options = [FILTERS, FILTERS[: i % 2 + 1], FILTERS[1:]][i % 3 :: 2]
            for filters in [()] if isinstance(place, Several) else options:
                given = (place, transform, arguments, itself)
                monkeypatch.delenv("FUSED_NCE_WORKSPACE_MB", raising=False)
                exact = found("reference", *given, torch.float64, filters)
                monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
                call = partial(found, backend, *given, filters=filters)
                ours = call()
                compare(ours, exact)
                if filters:
                    assert (ours["neg_count"] < found(backend, *given, filters=())["neg_count"]).any()
                yield call, ours


@pytest.mark.parametrize("workspace_mb", ["16", "0.6"])
def test_what_filters_leave(workspace_mb, monkeypatch):
    """Every statistic, each layout and transform: by the dot product, a guide's, both, or as one of several positives.

    The bits are those of any number of threads.
    """
    threads = torch.get_num_threads()
    for call, ours in filtered("cpu", workspace_mb, monkeypatch):
        torch.set_num_threads(3)
        again = call()
        torch.set_num_threads(threads)
        for name, x in again.items():
            assert torch.equal(x.isnan() | (x == ours[name]), torch.ones_like(x, dtype=torch.bool)), name


@pytest.mark.parametrize("workspace_mb", ["16", "0.2"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("layout", "itself"), [*((x, False) for x in LAYOUTS), *((x, True) for x in ITSELF)])
def test_every_statistic(layout, itself, transform, workspace_mb, monkeypatch):
    place, arguments = (ITSELF if itself else LAYOUTS)[layout]
    exact = found("reference", place, TRANSFORMS[transform], arguments, itself, torch.float64)
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    compare(found("cpu", place, TRANSFORMS[transform], arguments, itself), exact)


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(MODULE.build_info()["isa_active"])] if MODULE else [])
def test_older_instruction_sets_agree(isa, tmp_path):
    """Of filters and of losses, in a process that first asks for an unknown one."""
    code = (
        "import os, torch; from fused_nce import _C\n"
        "try: said = str(_C.build_info())\n"
        "except ValueError as error: said = str(error)\n"
        f"os.environ['FUSED_NCE_ISA'] = {isa!r}; _C.build_info()\n"  # from here on: the tests forget the variable
        "from tests.backends.test_cpu_statistics import *\n"
        "every = [found('cpu', x, Identity(), y, False, filters=FILTERS) for x, y in LAYOUTS.values()]\n"
        "every = [{x: y.detach() for x, y in each.items()} for each in every], losses()\n"
        f"torch.save((said, MODULE.build_info()['isa_active'], *every), {str(tmp_path / 'found')!r})"
    )
    oldest = {"avx2": "AVX2"}.get(isa, "SSE41")
    environment = os.environ | {"FUSED_NCE_ISA": "sse9", "ONEDNN_MAX_CPU_ISA": oldest, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said, active, filtered, plain = torch.load(tmp_path / "found")
    assert "FUSED_NCE_ISA is 'sse9', needed: one of generic" in said
    assert active == isa
    for ours, (place, arguments) in zip(filtered, LAYOUTS.values(), strict=True):
        compare(ours, found("reference", place, Identity(), arguments, False, torch.float64, FILTERS))
    for ours, here in zip(plain, losses(), strict=True):
        test_cpu_kernel.assert_same(ours, here, 3e-6)


def losses():
    """Without a clip, and with a narrow and a wide one."""
    given = partial(test_cpu_kernel.arguments, 37, 5, 33, extra_images=3, offset=2)
    return [test_cpu_kernel.loss(given(clip=clip)) for clip in (0.0, 20.0, 60.0)]


def test_hardness_counts_where_exponentials_are_bounded():
    """Of unit rows, at a scale of 50 and α = 60: e^110 is beyond float32, e^50 is not."""
    base, found = torch.randn(96, 20, generator=torch.Generator().manual_seed(0)), []
    near = base.repeat_interleave(2, dim=0)[:96]  # of every other row the negative beside it is its equal
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (base, near)]
        loss = info_nce(leaves[0], leaves[1], temperature=0.02, normalize=True, hardness=60.0, backend=backend).loss
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for x, exact in zip(*found, strict=True):
        assert (x - exact).abs().max() <= 2e-4 * exact.abs().max()
