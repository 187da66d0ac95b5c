"""Columns that leave a row's negatives by ceilings, guides or as one of several positives, on an emulated GPU."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fused_nce import tile_loss, tile_stats
from fused_nce.core.spec import FILTERS, Index, Several, Spec, TanhClip
from fused_nce.core.tails import Nce
from fused_nce.losses.registry import LOSSES
from tests.backends.test_cpu_statistics import filtered
from tests.cases import Sweep
from tests.conftest import MODULE, needs_kernels
from tests.losses.fuzz import Judge, draw

pytestmark = [needs_kernels, pytest.mark.usefixtures("play_gpu")]
WORDS = ("margin,", "/margin", "guide", "several", "soft ", "prefixes")
OPTIONS = [name for name in LOSSES if any(word in name for word in WORDS)]


@pytest.mark.parametrize("workspace_mb", ["16", "0.04"])
def test_what_filters_leave(workspace_mb, monkeypatch):
    """Every statistic, layout and transform: by the dot product, a guide's, both, or as one of several positives."""
    assert len(list(filtered("cuda", workspace_mb, monkeypatch))) > 20


# Rows, columns, the limit and what the plan makes of them.
ROUTES = {
    "panels": (60, 2100, 0.1, {"panels": 3, "block_rows": 30}),
    "parts of a row": (3, 7500, 16, {"ctas_per_row": 3}),
    "panels of parts": (2, 12000, 0.088, {"ctas_per_row": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route(route, dtype, monkeypatch):
    """Marks of each strip and panel, of the scores, the guides and several columns, statistics first or at once."""
    n, m, limit, wanted = ROUTES[route]
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(rows, 8, generator=g).to(dtype) for rows in (n, m))
    guide = tuple(torch.randn(rows, 5, generator=g) for rows in (n, m))
    places = torch.randint(-1, m, (n, 40), generator=g)
    specs: dict[Spec, dict[str, Any]] = {
        Spec(Index(), TanhClip(6.0), filters=FILTERS): {
            "row_ids": places[:, 0].clamp(min=0),
            "ceilings": torch.tensor([[2.0], [3.0]]).expand(2, n).contiguous(),
            "guide": guide,
        },
        Spec(Several(40), stats=("neg_lse", "square", "neg_sum", "neg_count")): {"row_ids": places},
    }
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", str(limit))
    plan = MODULE.cuda_plan(n, m, 8, 1, q.element_size(), int(limit * (1 << 20)), optional=True, marked=True)
    assert {name: plan[name] for name in wanted} == wanted if dtype == torch.float32 else plan["fits"]
    for spec, more in specs.items():
        results = []
        for backend, wide in (("reference", torch.float64), ("cuda", dtype)):
            one, two = (x.to(wide).requires_grad_() for x in (q, k))
            given = more | ({"ceilings": more["ceilings"].double()} if backend == "reference" and spec.filters else {})
            if backend == "reference" and spec.filters:
                given["guide"] = tuple(x.double() for x in guide)
            rows = tile_stats(one, two, spec, scale=0.3, backend=backend, **given)
            del rows["pos"]
            loss = torch.stack([x.sum() / m for x in rows.values() if x.requires_grad]).sum()
            if spec.filters:
                loss = loss + tile_loss(one, two, spec, Nce(0.1), scale=0.3, backend=backend, **given).loss
            results.append([*(x.double() for x in rows.values()), *torch.autograd.grad(loss, (one, two))])
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
        for exact, x in zip(*results, strict=True):
            assert (x - exact).abs().max() <= tolerance * exact.abs().max(), spec.code


def sweep(dtype, seed, count, record_eta):
    """Random problems of losses with marks or prefixes, within their budget."""
    rng, tried = np.random.default_rng(seed), Sweep(record_eta, "cuda*", dtype)
    for _ in range(count):
        case = dataclasses.replace(draw(rng, dtype), loss=OPTIONS[int(rng.integers(len(OPTIONS)))], backend="cuda")
        judge = Judge(case)
        if judge.fair:
            before = tried.ran
            tried.add(case.line, partial(judge.run, "cuda"))
            assert tried.ran > before, f"refused: {case.line}"
    tried.check()
    assert tried.ran > count / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_losses(dtype, fresh_seed, record_eta):
    assert len(OPTIONS) >= 7
    sweep(dtype, 20261129, 40, record_eta)
    sweep(dtype, fresh_seed, 20, record_eta)


def test_a_guide_costs_one_product_of_its_own():
    """Its dot products lie where the scores will: no more memory than the marks."""
    q, k, guide = torch.randn(4, 8), torch.randn(4, 8), (torch.randn(4, 3), torch.randn(4, 3))
    given: dict[str, Any] = {"scale": 1.0, "backend": "cuda"}
    launches = []
    for filters in ((), ("guide",)):
        more: dict[str, Any] = {"ceilings": torch.ones(1, 4), "guide": guide} if filters else {}
        before = MODULE.cuda_emulated_launches()
        tile_stats(q, k, Spec(Index(), filters=filters), row_ids=torch.arange(4), **given, **more)
        launches.append(MODULE.cuda_emulated_launches() - before)
    assert launches[1] - launches[0] == 2
    plain, marked = (MODULE.cuda_plan(512, 4096, 64, 1, 2, 256 << 20, marked=marked) for marked in (False, True))
    assert marked["total_bytes"] - plain["total_bytes"] == plain["strip_rows"] * 4096 // 8 * 2
