"""Matryoshka: a loss of several prefixes of the operands is the sum of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fused_nce import info_nce
from fused_nce.losses import candidates
from fused_nce.losses.candidates import DIRECTIONS
from tests.losses.test_candidates import HARD, IDS, K, Q, graded, same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prefixes_are_the_sum_of_their_losses(dtype):
    """Value and gradients, hard negatives and other options included."""
    leaves = graded(*(x.to(dtype) for x in (Q, K, HARD)))
    unit = tuple(nn.functional.normalize(x, dim=-1) for x in (Q, K, HARD))
    every: tuple[dict[str, Any], ...] = (
        {},
        {"clip": 3.0, "reduction": "sum"},
        {"symmetric": True},
        {"targets": torch.tensor([2, 1, 1, 0, 5, 4]), "false_negative_margin": 0.1},
        {"guide": unit[:2], "guide_margin": 0.3},
        {"share_hard_negatives": True, "hardness": 0.5, "temperature": 0.7},
        {"filter_hard_negatives": True, "false_negative_margin": -0.3, "guide": unit, "guide_margin": 0.2},
        {"directions": ("q2k", "k2k"), "label_smoothing": 0.1, "query_ids": IDS, "row_weights": Q[:, 0].abs()},
        {"directions": DIRECTIONS, "joint": True, "tau_plus": 0.1, "clip": 2.0},
        {"column_bias": K[:, 0]},
    )
    for options in every:
        more = any("hard_negatives" in name for name in options)
        for backend in ("reference", "chunked", None):
            how = options | {"backend": backend}

            def loss(width: int | None, how: dict[str, Any] = how, more: bool = more, **others: Any):
                # of 16 bits: the operands are theirs, and the normalised ones keep 24
                q, k, h = (x if dtype == torch.float64 else x.float() for x in leaves)
                given = {"hard_negatives": h[..., :width]} if more else {}
                return info_nce(q[:, :width], k[:, :width], **given, **others, **how)

            q, k, h = leaves
            given = {"hard_negatives": h} if more else {}
            # Widths in any order; one that comes twice counts twice.
            out = info_nce(q, k, prefixes=(5, 2, 3, 2), prefix_weights=(2, 0.25, 1, 0.25), **given, **how)
            parts = [weight * loss(d, normalize=True).loss for d, weight in ((2, 0.5), (3, 1), (5, 2))]
            rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-5)
            same(out.loss, torch.stack(parts).sum(), leaves, rtol)
            assert {"pos_mean_3", "neg_lse_mean_5"} <= set(out.stats)
            assert ("top1_2" in out.stats) == ("hardness" not in options)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_under_autocast_the_positives_equal_is_no_false_negative_of_a_prefix(backend):
    """Rows are cast once, before they are normalised, by what a margin is measured from as by the scores."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(64, 48, generator=g), torch.randn(32, 48, generator=g).repeat_interleave(2, dim=0)
    how: dict[str, Any] = {"prefixes": (32,), "false_negative_margin": 0.0, "reduction": "none", "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(q, k, **how).nce
    torch.testing.assert_close(found, info_nce(q.bfloat16(), k.bfloat16(), **how).nce)


def test_prefixes_without_a_margin_ask_for_no_unit_rows(monkeypatch):
    """Of each width, in torch, they took a tenth of a call; by them a margin is measured."""
    cut, asked = candidates.cut, []

    def counted(*args):
        asked.append(args)
        return cut(*args)

    monkeypatch.setattr(candidates, "cut", counted)
    for options in ({}, {"guide": (Q, K)}, {"symmetric": True}):
        info_nce(Q, K, prefixes=(2, 5), **options)
    assert not asked
    info_nce(Q, K, prefixes=(2, 5), false_negative_margin=0.1)
    assert len(asked) == 1


def test_a_guide_of_prefixes_is_normalised_with_the_rest():
    q, k, g = (torch.randn(8, d, generator=torch.Generator().manual_seed(d)) for d in (4, 5, 3))
    k, guide = torch.randn(8, 4, generator=torch.Generator().manual_seed(9)), (3 * g, 5 * g.flip(0))
    one = info_nce(q, k, guide=guide, normalize=True).loss
    torch.testing.assert_close(info_nce(q, k, guide=guide, normalize=True, prefixes=[4]).loss, one)
