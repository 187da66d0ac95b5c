"""The protocols of `fused-nce eval`: the numbers of their definitions, none of which learns from test images."""

from typing import Any

import numpy as np
import pytest
import torch

from fused_nce.train.evaluation import episodes, logistic, probes, protocols, scoring, trained_probes
from fused_nce.train.evaluation.protocols import FROZEN, PROTOCOLS, FeatureSet
from tests.train.test_eval_probes import blobs, exactly

SINGLE = ("linear", "knn", "sgd", "svm", "mlp")  # one set of predictions each


def make_plan(n=120, m=100, names=FROZEN):
    labels, truth = (torch.arange(size) % 5 for size in (n, m))
    return scoring.plan(labels, truth, protocols=names, labels_per_class=[2, 4], draws=3, tasks=6, seed=0)


def make_features(n=120, m=100, spread=1.5):
    bank, queries = (blobs(size, 12, classes=5, spread=spread, seed=seed)[0] for seed, size in enumerate((n, m)))
    return FeatureSet(torch.from_numpy(bank), torch.from_numpy(queries))


def predicted(name, features):
    found = PROTOCOLS[name].run(features, make_plan()).predicted
    assert found is not None
    return found


@pytest.mark.parametrize("name", FROZEN)
def test_a_protocol_finds_classes_that_are_there_and_none_in_noise(name):
    found = PROTOCOLS[name].run(make_features(spread=0.7), make_plan())
    noise = FeatureSet(torch.randn(120, 12), torch.randn(100, 12))
    for row, chance in zip(found.rows, PROTOCOLS[name].run(noise, make_plan()).rows, strict=True):
        assert row["accuracy_pct"] > 75, row
        assert chance["accuracy_pct"] < 40, chance
        assert row["accuracy_pct"] == pytest.approx(np.mean(row["values_pct"]))


@pytest.mark.parametrize("name", SINGLE)
def test_no_prediction_depends_on_another_test_image(name):
    bank, queries = make_features()[:2]
    together = predicted(name, FeatureSet(bank, queries))
    apart = predicted(name, FeatureSet(bank, torch.cat([queries[:50], -30 * queries[50:]])))
    assert np.array_equal(together[:50], apart[:50])
    assert not np.array_equal(together[50:], apart[50:])


@pytest.mark.parametrize("name", SINGLE)
def test_a_second_run_gives_the_same_predictions_and_leaves_the_random_state(name):
    state = torch.get_rng_state()
    first, second = (predicted(name, make_features()) for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_the_svm_has_scikit_learns_weights():
    from sklearn.svm import LinearSVC

    features, labels = blobs(400, 20, spread=2.0)
    x, _ = probes.standardise(features, features)
    known = torch.from_numpy(x)
    for c in (1e-3, 1e-1):
        model = logistic.fit(known, torch.from_numpy(labels), c, logistic.principal_axes(known), "svm")
        # It penalises its bias like a weight; scaled up, the bias costs next to nothing, as ours costs nothing.
        exact = LinearSVC(C=c, dual=False, tol=1e-10, intercept_scaling=100, max_iter=10_000).fit(
            x.astype(np.float64), labels
        )
        assert model.converged
        np.testing.assert_allclose(model.weight.numpy(), exact.coef_, atol=0.01 * np.abs(exact.coef_).max())
        np.testing.assert_allclose(model.bias.numpy(), exact.intercept_, atol=0.01)


def test_all_rates_at_once_are_torchs_sgd_one_by_one():
    features, labels = blobs(90, 6)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    rates, epochs = (0.01, 0.1), 5
    together = trained_probes.softmax_by_sgd(x, y, rates, epochs, seed=3)
    for weight, rate in zip(together, rates, strict=True):
        net = torch.nn.Linear(6, 3)
        torch.nn.init.zeros_(net.weight)
        torch.nn.init.zeros_(net.bias)
        optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
        for done, rows in trained_probes._batches(90, epochs, 3):
            optimizer.param_groups[0]["lr"] = rate * 0.1 ** ((done >= 0.6) + (done >= 0.8))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        torch.testing.assert_close(weight[:, :-1], net.weight.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weight[:, -1], net.bias.detach(), rtol=1e-4, atol=1e-6)


def test_an_epoch_sees_every_row_once_and_no_row_alone():
    for n in (5, 257, 700):
        rows = [rows for done, rows in trained_probes._batches(n, 1, 0)]
        assert torch.cat(rows).sort().values.tolist() == list(range(n))
        assert min(map(len, rows)) > 1


def test_the_mlp_finds_what_no_plane_separates():
    rng = np.random.default_rng(0)
    x = rng.choice([-1.0, 1.0], (600, 2)).astype(np.float32)
    labels = (x.prod(1) > 0).astype(np.int64)
    x += 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    found = trained_probes.mlp_probe(x[:400], labels[:400], x[400:])
    plane = probes.linear_probe(x[:400], labels[:400], x[400:])
    assert (found.predicted == labels[400:]).mean() > 0.95
    assert (plane.predicted == labels[400:]).mean() < 0.7


def test_a_rate_that_diverges_is_not_chosen(monkeypatch):
    monkeypatch.setattr(trained_probes, "SGD_RATES", (0.1, 1e30))
    features, labels = blobs(120, 6)
    found = trained_probes.sgd_probe(features, labels, features, epochs=5)
    assert found.rate == 0.1
    assert (found.predicted == labels).mean() > 0.9


def test_an_episode_holds_five_classes_their_images_and_their_queries():
    labels, truth = np.arange(140) % 7, np.arange(210) % 7
    tasks = episodes.draw(labels, truth, shots=3, count=40, rng=np.random.default_rng(0))
    seen = set()
    for task in tasks:
        assert task.support.shape == (5, 3)
        assert task.queries.shape == (5, 15)
        classes = labels[task.support][:, 0]
        assert len(set(classes)) == 5
        assert (labels[task.support] == classes[:, None]).all()
        assert (truth[task.queries] == classes[:, None]).all()
        assert all(len(set(row)) == len(row) for row in (*task.support, *task.queries))
        seen |= set(classes)
    assert seen == set(range(7))
    with pytest.raises(ValueError, match="few-shot needs 5 classes with 25 labelled and 15 test examples; got 0"):
        episodes.draw(labels, truth, shots=25, count=1, rng=np.random.default_rng(0))


def test_the_prototype_is_the_mean_and_the_nearest_wins():
    support = torch.tensor([[[0.0, 0.0], [2.0, 0.0]], [[10.0, 0.0], [10.0, 2.0]]])  # means (1, 0), (10, 1)
    queries = torch.tensor([[1.0, 0.0], [5.4, 0.5], [5.7, 0.5], [100.0, 0.0]])
    assert episodes.nearest_prototype(support, queries).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("shots", [1, 5])
def test_few_coordinates_change_nothing_in_the_logistic_classifier(shots):
    generator = torch.Generator().manual_seed(0)
    support, queries = (torch.randn(*shape, generator=generator) for shape in ((5, shots, 40), (200, 40)))
    few, labels = support.flatten(0, 1).numpy(), np.repeat(np.arange(5), shots)
    exact = exactly(few, labels, C=episodes.C, tol=1e-8, max_iter=10_000)
    assert (episodes.logistic(support, queries).numpy() == exact.predict(queries.double().numpy())).mean() > 0.99


def test_unit_uses_the_bank_alone():
    bank, queries = make_features()[:2]
    a, b = episodes.unit(bank + 9, queries + 9)
    again = episodes.unit(bank + 9, torch.cat([queries[:1] + 9, 500 * queries]))[1]
    torch.testing.assert_close(a.norm(dim=1), torch.ones(len(a)))
    torch.testing.assert_close(b[:1], again[:1])
    expected = bank - bank.mean(0)
    torch.testing.assert_close(a, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_the_interval_is_of_the_mean():
    values = [50.0, 60.0, 70.0, 80.0]
    found = protocols.row("prototype", "5-way 1-shot", values, {}, interval=True)
    assert found["ci95_pct"] == pytest.approx(1.96 * np.std(values, ddof=1) / 2, rel=1e-4)
    assert found["sd_pct"] is None
    assert protocols.row("linear", "10/class", values, {})["ci95_pct"] is None


def test_only_what_is_asked_for_is_drawn():
    """A data set of two classes can be probed; few-shot alone needs five."""
    labels = torch.arange(60) % 2
    plan = scoring.plan(labels, labels, protocols=["linear"], labels_per_class=[100], draws=2, seed=0)
    assert plan.draws == {}
    assert plan.episodes == {}
    with pytest.raises(ValueError, match="few-shot needs 5 classes with 1 labelled and 15 test examples; got 2"):
        scoring.plan(labels, labels, protocols=["few-shot"], labels_per_class=[1], draws=2, seed=0)
    assert list(make_plan(names=("few", "few-shot")).draws) == [2, 4]


def test_no_draw_depends_on_what_else_is_asked_for():
    labels, truth = torch.arange(200) % 5, torch.arange(100) % 5

    def drawn(names, sizes, seed=0):
        plan = scoring.plan(labels, truth, protocols=names, labels_per_class=sizes, draws=3, tasks=4, seed=seed)
        few = {count: np.stack(draws).tolist() for count, draws in plan.draws.items()}
        return few, {shots: [task.support.tolist() for task in tasks] for shots, tasks in plan.episodes.items()}

    (alone, _), (both, tasks) = drawn(["few"], [10]), drawn(["few", "few-shot"], [1, 10])
    assert alone[10] == both[10] == drawn(["linear", "fine-tune"], [10])[0][10]
    assert tasks == drawn(["few-shot"], [3])[1]
    assert alone[10] != drawn(["few"], [10], seed=1)[0][10]
    assert len({str(draw) for draw in both[10]}) == 3
    assert [task[0] for task in tasks[1]] != [[row[0] for row in task][:1] for task in tasks[5]]


def test_a_class_of_one_image_is_refused_by_name_where_something_is_chosen_and_there_alone():
    labels = torch.tensor([0, 0, 0, 1])
    options: Any = {"classes": ["ant", "bee"], "labels_per_class": [3], "draws": 2, "seed": 0}
    for name in PROTOCOLS:
        if PROTOCOLS[name].chooses:
            with pytest.raises(ValueError, match="class bee has 1 example; need 2 or more"):
                scoring.plan(labels, labels, protocols=["knn", name], **options)
    plan = scoring.plan(labels, labels, protocols=[name for name in SINGLE if not PROTOCOLS[name].chooses], **options)
    features = FeatureSet(torch.eye(4), torch.eye(4))
    assert PROTOCOLS["knn"].run(features, plan).rows[0]["accuracy_pct"] >= 50
    with pytest.raises(ValueError, match="labels_per_class: 3; class ant has only 2 examples"):
        scoring.plan(torch.tensor([0, 0, 0, 1, 1, 1]), labels, protocols=["few"], **options)


def test_names_of_protocols():
    assert protocols.check_names(["svm", "linear"]) == ["linear", "svm"]
    assert protocols.check_names(["all"]) == list(FROZEN)
    assert protocols.check_names(["ndm", "all", "fine-tune"]) == [*FROZEN, "fine-tune", "ndm"]
    with pytest.raises(ValueError, match=r"protocols: must be of linear, knn, .*, or all; got 'lda'"):
        protocols.check_names(["lda"])
    with pytest.raises(ValueError, match="protocols: none given"):
        protocols.check_names([])
