"""Hard negatives against the whole matrix of similarities, tile by tile."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fused_nce import mine_hard_negatives
from fused_nce.mining import top_k


def dense(queries, corpus, k, **options):
    """The same by the matrix, one query at a time: (indices, scores) lists."""
    unit = torch.nn.functional.normalize
    if options.get("normalize", True):
        queries, corpus = unit(queries, dim=1), unit(corpus, dim=1)
    s, found = queries @ corpus.T, []
    for i, row in enumerate(s):
        own = [j for j in options["positives"][i].reshape(-1).tolist() if j >= 0] if "positives" in options else []
        ids = options.get("query_ids")
        ranked = [
            j
            for j in row.argsort(descending=True).tolist()
            if j not in own and (ids is None or options["corpus_ids"][j] != ids[i])
        ][: options.get("range_max")]
        best = min((float(row[j]) for j in own), default=None)
        limits = [options.get("max_score")]
        if best is not None:
            limits += [
                best - options[x] * y
                for x, y in (("absolute_margin", 1), ("relative_margin", abs(best)))
                if x in options
            ]
        high = min((x for x in limits if x is not None), default=float("inf"))
        left = [j for j in ranked if options.get("min_score", -9) <= row[j] <= high]
        found.append(left[options.get("range_min", 0) :][:k])
    return found, s


@pytest.mark.parametrize("workspace_mb", ["16", "0.01"], ids=["whole", "tiles"])
def test_against_the_matrix(workspace_mb, monkeypatch):
    """80 random settings; 2,500 rows are several panels."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    for seed in range(80):
        pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
        n, m = pick.randint(1, 9), pick.choice((3, 40, 2500))
        queries, corpus = (torch.randn(rows, 6, generator=g, dtype=torch.float64) for rows in (n, m))
        options: dict[str, Any] = {"normalize": pick.random() < 0.7}
        if pick.random() < 0.7:
            shape = pick.choice(((n,), (n, 3)))
            options["positives"] = torch.randint(-1, m, shape, generator=g)
            options |= {x: 0.1 for x in ("absolute_margin", "relative_margin") if pick.random() < 0.4}
        if pick.random() < 0.4:
            options["query_ids"], options["corpus_ids"] = (torch.randint(5, (x,), generator=g) for x in (n, m))
        options |= {
            x: y
            for x, y in (("range_min", 2), ("range_max", 9), ("min_score", -0.2), ("max_score", 0.5))
            if pick.random() < 0.4
        }
        k = pick.randint(1, 6)
        found, (exact, s) = (
            mine_hard_negatives(queries, corpus, k, progress=False, **options),
            dense(queries, corpus, k, **options),
        )
        assert found.indices.shape == found.scores.shape == (n, k)
        for i, row in enumerate(exact):
            assert found.indices[i].tolist() == row + [-1] * (k - len(row)), (seed, options)
            torch.testing.assert_close(found.scores[i, : len(row)], s[i, row], rtol=1e-12, atol=1e-14)
            assert (found.scores[i, len(row) :] == float("-inf")).all()


def test_a_rank_is_a_place():
    """Of scores that all tie, and behind a limit, none beyond `range_max`."""
    queries, corpus = torch.ones(2, 3), torch.ones(40, 3)
    found = mine_hard_negatives(queries, corpus, 6, normalize=False, range_max=4, progress=False)
    assert [int((row >= 0).sum()) for row in found.indices] == [4, 4]
    assert all(len(set(row[:4].tolist())) == 4 for row in found.indices)
    corpus[:3] *= 2
    found = mine_hard_negatives(queries, corpus, 6, normalize=False, range_max=4, max_score=4.0, progress=False)
    assert [int((row >= 0).sum()) for row in found.indices] == [1, 1]


def test_memory_is_bounded(monkeypatch):
    """A hundredth of the matrix; what is allocated at once is what the workspace says, and the (N, k) lists."""
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", "1")
    queries, corpus = torch.randn(4000, 8), torch.randn(4000, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        mine_hard_negatives(queries, corpus, 3, positives=torch.arange(4000), range_min=5, range_max=20, progress=False)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= 4 << 20  # 1 MB, and lists of (4000, range_max) in several copies; the matrix is 64 MB


def test_16_bits_are_summed_in_32():
    queries, corpus = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(3, 4096, dtype=torch.bfloat16)
    scores, indices = top_k(queries, corpus, 3)
    assert scores.tolist() == [[4096.0] * 3]
    assert sorted(indices[0].tolist()) == [0, 1, 2]


def test_autocast_rounds_nothing():
    queries, corpus = torch.randn(20, 16), torch.randn(200, 16)
    plain = mine_hard_negatives(queries, corpus, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, mine_hard_negatives(queries, corpus, 5), plain))


def test_a_bar_where_it_is_asked_for(capsys):
    mine_hard_negatives(torch.ones(2, 3), torch.ones(4, 3), 1)
    assert "mining" in capsys.readouterr().err
    mine_hard_negatives(torch.ones(2, 3), torch.ones(4, 3), 1, progress=False)
    assert not capsys.readouterr().err


BAD = torch.tensor([[1.0, 2, 3], [4, float("nan"), 5], [1, 1, 1]])
GIVEN: dict[str, Any] = {"queries": torch.ones(2, 3), "corpus": torch.ones(4, 3), "k": 1}
ERRORS: dict[str, dict[str, Any]] = {
    "k: got 0, need >= 1": {"k": 0},
    "range_min: got -1, need >= 0": {"range_min": -1},
    "range_max: got 2, need > range_min = 2": {"range_min": 2, "range_max": 2},
    "query_ids and corpus_ids: got one of them, need both or none": {"query_ids": torch.zeros(2, dtype=torch.int64)},
    "positives: got torch.float32, need a (N,) or (N, P) int64 tensor": {"positives": torch.zeros(2)},
    "positives: got shape (3,) on cpu, need (2,) or (2, P) on cpu": {"positives": torch.zeros(3, dtype=torch.int64)},
    "positives: got 4, need -1 <= index < M = 4": {"positives": torch.tensor([0, 4])},
    "absolute_margin: got 0.1 without positives, need some": {"absolute_margin": 0.1},
    "corpus: got width D = 2, need queries's 3": {"corpus": torch.ones(4, 2)},
    "max_score: got nan, need a finite number": {"max_score": float("nan")},
    "corpus: row 1 has a NaN or an infinity, need finite numbers": {"corpus": BAD, "max_score": 0.5},
    "queries: row 1 has a NaN or an infinity, need finite numbers": {"queries": -BAD[:2].nan_to_num().log()},
}


def test_messages():
    for message, options in ERRORS.items():
        with pytest.raises((TypeError, ValueError)) as caught:
            mine_hard_negatives(
                *(options.get(x, y) for x, y in GIVEN.items()), **{x: y for x, y in options.items() if x not in GIVEN}
            )
        assert str(caught.value) == message
