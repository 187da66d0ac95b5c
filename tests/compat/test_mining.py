"""Hard negatives as sentence-transformers mines them, from embeddings that both are given."""

from __future__ import annotations

import contextlib
import io
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_nce import mine_hard_negatives
from tests.compat import packages

pytestmark = pytest.mark.nightly


@pytest.mark.parametrize("seed", range(50))
def test_the_same_documents(seed, monkeypatch):
    """One or two positives a query, ranges, margins and scores: the same negatives in the same order.

    Upstream looks at as many candidates more than `range_max` as a query has positives below them, so that a row whose
    positives are all among its first ranks is the one to compare; and a row that it cannot fill it drops or shortens.
    """
    theirs = packages.or_skip("sentence_transformers.util.hard_negatives")
    datasets = pytest.importorskip("datasets")
    # A hash of the table that nobody reads, through dill, whose versions do not all get through pyarrow.
    monkeypatch.setattr(datasets.arrow_dataset, "generate_fingerprint", lambda *_, **__: "0")
    pick, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, m, p, k = 12, pick.choice((40, 90)), pick.choice((1, 2)), pick.randint(1, 4)
    corpus = torch.nn.functional.normalize(torch.randn(m, 8, generator=g), dim=1)
    own = torch.stack([torch.arange(n) * p + i for i in range(p)], dim=1)
    noise = 0.3 * torch.randn(n, 8, generator=g)
    queries = torch.nn.functional.normalize(corpus[own].mean(dim=1) + noise, dim=1)
    options: dict[str, Any] = {"range_max": pick.choice((8, 15, 25))}
    chances = (
        ("range_min", 2),
        ("absolute_margin", 0.15),
        ("relative_margin", 0.2),
        ("max_score", 0.8),
        ("min_score", 0.1),
    )
    options |= {name: value for name, value in chances if pick.random() < 0.5}
    texts = {f"d{j}": corpus[j] for j in range(m)} | {f"q{i}": queries[i] for i in range(n)}

    def encode(names: list[str], **_: Any) -> Any:
        return torch.stack([texts[name] for name in names]).numpy()

    model = SimpleNamespace(
        device=torch.device("cpu"),
        model_card_data=SimpleNamespace(base_model=""),
        encode_document=encode,
        encode_query=encode,
        similarity=lambda a, b: torch.as_tensor(a) @ torch.as_tensor(b).T,
        similarity_pairwise=lambda a, b: (torch.as_tensor(a) * torch.as_tensor(b)).sum(dim=1),
    )
    pairs = {"a": [f"q{i}" for i in range(n) for _ in range(p)], "b": [f"d{j}" for j in own.flatten().tolist()]}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        mined = theirs.mine_hard_negatives(
            datasets.Dataset.from_dict(pairs),
            model,
            corpus=[f"d{j}" for j in range(m)],
            num_negatives=k,
            output_format="triplet",
            verbose=False,
            **options,
        )
    ordered = list(dict.fromkeys([f"d{j}" for j in range(m)]))  # places in upstream's corpus are ours
    found = mine_hard_negatives(queries, corpus, k, positives=own, progress=False, **options)
    ranks = (queries @ corpus.T).argsort(dim=1, descending=True)
    compared = 0
    for i in range(n):
        if not set(own[i].tolist()) <= set(ranks[i, : options["range_max"]].tolist()):
            continue
        negatives = [
            x
            for q, d, x in zip(*(mined[c] for c in mined.column_names), strict=True)
            if q == f"q{i}" and d == f"d{own[i, 0]}"
        ]
        ours = [ordered[j] for j in found.indices[i].tolist() if j >= 0]
        assert ours == negatives, (seed, i, options)
        compared += len(ours)
    assert compared or "absolute_margin" in options or "relative_margin" in options
