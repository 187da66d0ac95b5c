"""kNN: against a loop in plain Python, and the weights that make it more than a vote count."""

import math

import pytest
import torch

from fused_nce.train.evaluation import knn
from fused_nce.train.evaluation.knn import knn_predict, nearest, neighbours_for


def loop_predict(bank, labels, queries, k, temperature):
    """The same rule in float64, one image at a time."""
    answers = []
    for query in queries.double().tolist():
        scored = []
        for row, label in zip(bank.double().tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, row, strict=True))
            scored.append((dot / (math.hypot(*query) * math.hypot(*row)), label))
        votes: dict[int, float] = {}
        for cosine, label in sorted(scored, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(cosine / temperature)
        answers.append(max(votes, key=lambda label: votes[label]))
    return answers


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (12, 0.02), (40, 1.0)])
def test_matches_the_loop(k, temperature):
    generator = torch.Generator().manual_seed(k)
    bank, queries = torch.randn(40, 6, generator=generator), torch.randn(30, 6, generator=generator)
    labels = torch.randint(4, (40,), generator=generator)
    found = knn_predict(bank, labels, queries, k=k, temperature=temperature)
    assert found.tolist() == loop_predict(bank, labels, queries, k, temperature)


def test_one_near_neighbour_outvotes_two_far_ones():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.1, 1.0]])
    labels, query = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.1]])
    assert knn_predict(bank, labels, query, k=3, temperature=0.1).tolist() == [1]
    assert knn_predict(bank, labels, query, k=3, temperature=100.0).tolist() == [0]  # the plain count


def test_length_of_a_feature_does_not_matter():
    bank, query = torch.tensor([[100.0, 100.0], [0.0, 0.01]]), torch.tensor([[0.1, 1.0]])
    assert knn_predict(bank, torch.tensor([0, 1]), query, k=1).tolist() == [1]


def test_a_tiny_temperature_does_not_overflow():
    bank, labels = torch.eye(4), torch.tensor([0, 1, 2, 3])
    assert knn_predict(bank, labels, torch.eye(4), k=4, temperature=1e-4).tolist() == [0, 1, 2, 3]


def test_only_classes_that_occur_have_votes(monkeypatch):
    """A column for each number would be 8 TB here; and with few votes held at a time they are the same."""
    labels = 10**12 * torch.tensor([0, 1, 1])
    bank, query = torch.tensor([[1.0, 0.1], [0.5, 0.5], [0.4, 0.5]]), torch.eye(2)
    assert knn_predict(bank, labels, query, k=3).tolist() == [0, 10**12]
    monkeypatch.setattr(knn, "MAX_DISTANCES", 1)
    assert knn_predict(bank, labels, query, k=3).tolist() == [0, 10**12]


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(50, 8, generator=generator), torch.randn(23, 8, generator=generator)
    whole, parts = nearest(bank, queries, 7), nearest(bank, queries, 7, chunk=5)
    assert torch.equal(whole[1], parts[1])
    assert whole[1].shape == (23, 7)
    assert bool((whole[0][:, :-1] >= whole[0][:, 1:]).all())


@pytest.mark.parametrize(("size", "k"), [(50_000, 200), (10_000, 200), (445, 8), (100, 5), (3, 3)])
def test_neighbours_by_bank_size(size, k):
    assert neighbours_for(size) == k


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k: 0; need 1 to 4"),
        ({"k": 5}, "k: 5; need 1 to 4"),
        ({"temperature": 0.0}, "temperature: 0.0; need a positive number"),
        ({"temperature": math.nan}, "temperature: nan; need a positive number"),
        ({"labels": torch.tensor([0, 1])}, r"labels: shape \(2,\); need \(4,\)"),
        ({"labels": torch.tensor([0, 1, -1, 2])}, "labels: -1 found; need classes from 0"),
        ({"queries": torch.zeros(2, 3)}, r"bank \(4, 2\) and queries \(2, 3\)"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"bank": torch.randn(4, 2), "labels": torch.arange(4), "queries": torch.randn(2, 2), "k": 1} | change
    bank, labels, queries = given.pop("bank"), given.pop("labels"), given.pop("queries")
    with pytest.raises(ValueError, match=message):
        knn_predict(bank, labels, queries, **given)


@pytest.mark.parametrize("chunk", [None, 4])
def test_l1_is_the_sum_of_absolute_differences(chunk):
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 5, generator=generator), torch.randn(11, 5, generator=generator)
    far, index = nearest(bank, queries, 4, chunk, metric="l1")
    for query, distances, found in zip(queries.tolist(), far.tolist(), index.tolist(), strict=True):
        apart = [(sum(abs(a - b) for a, b in zip(query, row, strict=True)), i) for i, row in enumerate(bank.tolist())]
        assert found == [i for _, i in sorted(apart)[:4]]
        assert distances == pytest.approx([-distance for distance, _ in sorted(apart)[:4]], rel=1e-5)
    with pytest.raises(ValueError, match="metric: got 'l2', need one of 'cosine', 'l1'"):
        nearest(bank, queries, 4, metric="l2")
