"""The linear probe: right numbers, and choices that see neither the test images nor labels they were not given."""

import numpy as np
import pytest
import torch

from fused_nce.train.evaluation import logistic, probes
from fused_nce.train.evaluation.probes import C_GRID, Fitted


def blobs(n, width, classes=3, spread=1.0, seed=0):
    """n points around `classes` centres; the first part of the width carries the class, the rest is noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % classes
    features = spread * rng.standard_normal((n, width))
    features[np.arange(n), labels] += 3.0
    return features.astype(np.float32), labels


def exactly(features, labels, **options):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(**options).fit(features.astype(np.float64), labels)


def test_standardise_uses_the_bank_alone():
    bank, _ = blobs(200, 5)
    bank[:, 3] = 7.0
    queries = np.full((2, 5), 100.0, dtype=np.float32)
    a, b = probes.standardise(bank * 10 + 4, queries)
    np.testing.assert_allclose(a[:, :3].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(a[:, :3].std(0), 1, atol=1e-5)
    assert (a[:, 3] == 0).all()
    assert (b[:, 3] == 0).all()  # constant in the bank: of no use, and not blown up
    np.testing.assert_allclose(b[:, 0], (100 - (bank * 10 + 4)[:, 0].mean()) / (bank * 10)[:, 0].std(), rtol=1e-4)
    assert a.dtype == b.dtype == np.float32


def test_hold_out_is_stratified_and_disjoint():
    labels = np.repeat(np.arange(4), [40, 20, 8, 2])
    fit, held = probes.hold_out(labels, 0.25, np.random.default_rng(0))
    assert np.array_equal(np.sort(np.concatenate([fit, held])), np.arange(70))
    assert np.bincount(labels[held]).tolist() == [10, 5, 2, 1]


def test_hold_out_needs_two_a_class():
    with pytest.raises(ValueError, match="class 1 has 1 example"):
        probes.hold_out(np.array([0, 0, 1]), 0.25, np.random.default_rng(0))


def test_draw_is_balanced_and_stays_in_the_pool():
    labels = np.repeat(np.arange(3), 30)
    pool = np.flatnonzero(np.arange(90) % 2 == 0)
    rng = np.random.default_rng(0)
    first, second = (probes.draw(labels, pool, 10, rng) for _ in range(2))
    assert np.bincount(labels[first]).tolist() == [10, 10, 10]
    assert len(set(first)) == 30
    assert set(first) <= set(pool)
    assert not np.array_equal(first, second)
    with pytest.raises(ValueError, match="labels_per_class: 16; class 0 has only 15 examples"):
        probes.draw(labels, pool, 16, rng)


@pytest.mark.parametrize("c", [1e-2, 1.0])
def test_rotating_into_the_rows_changes_no_prediction(c):
    features, labels = blobs(60, 200, spread=1.5)
    queries, labels_of_queries = blobs(90, 200, spread=1.5, seed=1)
    exact = exactly(features, labels, C=c, max_iter=10_000, tol=1e-9)
    direct = exact.predict(queries)
    found = probes.fit_predict(features, labels, queries, c)
    # A point within the solver's tolerance of a boundary may fall either way.
    assert (found.predicted == direct).mean() > 0.95
    assert 0.4 < (direct == labels_of_queries).mean() < 0.95  # neither hopeless nor too easy to tell


def test_correlated_features_do_not_stall_the_solver():
    """Singular values over five orders of magnitude: the usual coordinates would need thousands of steps."""
    features, labels = blobs(3000, 60, classes=5, spread=2.0)
    mixing = np.random.default_rng(1).standard_normal((60, 60)) @ np.diag(np.logspace(0, -5, 60))
    x = features @ mixing.astype(np.float32)
    x, _ = probes.standardise(x, x)
    found = probes.fit_predict(x, labels, x, 1.0)
    exact = exactly(x, labels, C=1.0, solver="newton-cholesky", tol=1e-8)
    assert found.converged
    assert (found.predicted == exact.predict(x)).mean() > 0.995
    assert 0.5 < (found.predicted == labels).mean() < 0.95


def test_the_weights_are_those_of_scikit_learn():
    features, labels = blobs(400, 20, spread=2.0)
    x, _ = probes.standardise(features, features)
    for c in (1e-2, 1.0):
        known = torch.from_numpy(x)
        model = logistic.fit(known, torch.from_numpy(labels), c, logistic.principal_axes(known))
        exact = exactly(x, labels, C=c, solver="newton-cholesky", tol=1e-10)
        centred = model.bias - model.bias.mean()
        np.testing.assert_allclose(model.weight.numpy(), exact.coef_, atol=0.01 * np.abs(exact.coef_).max())
        np.testing.assert_allclose(centred.numpy(), exact.intercept_ - exact.intercept_.mean(), atol=0.01)


def test_labels_need_not_be_numbered_without_gaps():
    features, labels = blobs(90, 10)
    gaps = np.array([1, 4, 9])[labels]
    found = probes.fit_predict(features, gaps, features, 1.0)
    plain = probes.fit_predict(features, labels, features, 1.0)
    assert np.array_equal(found.predicted, np.array([1, 4, 9])[plain.predicted])


def test_a_fit_leaves_the_threads_as_they_were():
    features, labels = blobs(90, 10)
    torch.set_num_threads(2)
    probes.fit_predict(features, labels, features, 1.0)
    assert torch.get_num_threads() == 2


def test_choose_c_takes_the_best_and_the_strongest_among_equals(monkeypatch):
    right = dict(zip(C_GRID, [3, 8, 8, 7, 2, 1], strict=True))
    labels = np.zeros(10, dtype=np.int64)

    def fake(features, labels_, queries, c, axes, kind):
        predicted = np.ones(10, dtype=np.int64)
        predicted[: right[c]] = 0
        return Fitted(predicted, c, True)

    monkeypatch.setattr(probes, "fit_predict", fake)
    rows = np.arange(10)
    assert probes.choose_c(np.zeros((10, 2), dtype=np.float32), labels, [(rows, rows)]) == C_GRID[1]


def test_linear_probe_learns_and_does_not_learn_noise():
    features, labels = blobs(300, 10)
    queries, truth = blobs(150, 10, seed=1)
    assert (probes.linear_probe(features, labels, queries).predicted == truth).mean() > 0.9
    shuffled = np.random.default_rng(0).permutation(labels)
    assert (probes.linear_probe(features, shuffled, queries).predicted == truth).mean() < 0.6


def test_the_penalty_does_not_depend_on_the_test_images():
    features, labels = blobs(120, 40, spread=2.0)
    queries, _ = blobs(50, 40, seed=1)
    chosen = {probes.linear_probe(features, labels, q).c for q in (queries, queries * 0, queries[::-1] * 50)}
    assert len(chosen) == 1


def test_strong_noise_asks_for_a_strong_penalty():
    features, labels = blobs(60, 400, spread=3.0)
    held_features, held_labels = blobs(600, 400, spread=3.0, seed=5)
    both, all_labels = np.concatenate([features, held_features]), np.concatenate([labels, held_labels])
    c = probes.choose_c(both, all_labels, [(np.arange(60), np.arange(60, 660))])
    hits = {g: (probes.fit_predict(features, labels, held_features, g).predicted == held_labels).sum() for g in C_GRID}
    assert hits[c] == max(hits.values())
    assert hits[c] > min(hits.values())  # the choice matters here


def test_few_label_probe_reads_only_the_labels_it_was_given():
    features, labels = blobs(300, 10)
    queries, truth = blobs(150, 10, seed=1)
    rng = np.random.default_rng(0)
    pool, held = probes.hold_out(labels, 0.25, rng)
    draws = [probes.draw(labels, pool, 5, rng) for _ in range(4)]
    found = probes.few_label_probe(features, labels, queries, draws, held)
    used = np.concatenate([held, *draws])
    spoiled = labels.copy()
    unseen = np.setdiff1d(np.arange(300), used)
    assert len(unseen) > 100
    spoiled[unseen] = (spoiled[unseen] + 1) % 3
    again = probes.few_label_probe(features, spoiled, queries, draws, held)
    assert len(found) == 4
    for a, b in zip(found, again, strict=True):
        assert np.array_equal(a.predicted, b.predicted)
    assert all((one.predicted == truth).mean() > 0.8 for one in found)
