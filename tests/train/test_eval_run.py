"""`fused-nce eval` on a run of two steps: what it writes, what it refuses, and the cost of the loss."""

import csv
import dataclasses
import json
from typing import Any

import pytest
import torch
from PIL import Image

from fused_nce import cli
from fused_nce.train import config, evaluate, loss_cost
from fused_nce.train.data import images as images_module
from fused_nce.train.evaluation import scoring
from fused_nce.train.files import MAX_JSON_BYTES
from fused_nce.train.methods.amdim import AMDIMConfig, ModelConfig
from fused_nce.train.saving import checkpoint
from fused_nce.train.settings import AugmentConfig
from tests.train.pictures import encoded, write_shard


def make_run(folder, **model):
    """A run as the trainer leaves it, without the training."""
    torch.manual_seed(0)
    settings = AMDIMConfig(model=ModelConfig(**{"ndf": 4, "n_rkhs": 16, "n_depth": 1} | model), augment=AugmentConfig())
    folder.mkdir()
    config.save(settings, folder)
    weights = settings.build().state_dict()
    checkpoint.save(folder, 2, {"model": weights}, {"step": 2}, keep=2)
    lines = [
        {"step": s, "time_s": 1.0 * s, "loss": 20.0, "nce_minus_chance": -0.1, "images_per_s": 300.0} for s in (1, 2)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("eval") / "run")
    return folder, evaluate.evaluate(str(folder), draws=3, labels_per_class=[5], cost=False)


def test_every_encoder_is_measured_on_the_same_taps(evaluated):
    _, result = evaluated
    seen = {(row["encoder"], row["tap"]) for row in result["probes"]}
    names = ("trained", "random, AMDIM init", "random, Kaiming init")
    assert seen == {(name, tap) for name in names for tap in ("f1", "f7")} | {("raw pixels", "pixels")}
    assert len(result["probes"]) == 4 * len(seen)
    for row in result["probes"]:
        assert 5 < row["accuracy_pct"] <= 100
        assert (row["sd_pct"] is None) == (row["labels"] == "all")
        assert len(row["values_pct"]) == (1 if row["labels"] == "all" else 3)
    widths = {row["tap"]: row["width"] for row in result["probes"]}
    assert widths == {"f1": 16, "f7": 64, "pixels": 1024}


def test_the_result_says_what_was_trained(evaluated):
    encoder: Any = checkpoint.load_model(evaluated[0])[0].encoder
    parameters = sum(p.numel() for p in encoder.parameters())
    facts = {"title": "AMDIM", "epochs": 300, "views": 600, "parameters": parameters, "chance_pct": 10.0}
    assert {key: evaluated[1][key] for key in facts} == facts


def test_the_files_say_the_same(evaluated):
    folder, result = evaluated
    assert json.loads((folder / "eval.json").read_text()) == json.loads(json.dumps(result))
    with (folder / "eval.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy_pct"]) for row in table] == [row["accuracy_pct"] for row in result["probes"]]
    page = (folder / "report.html").read_text()
    best = max(result["probes"], key=lambda row: row["accuracy_pct"])
    assert f"{best['accuracy_pct']:.1f}" in page
    assert not list(folder.glob(".tmp*"))
    assert not list(folder.glob("*.partial.*"))


def test_confusion_matrix_counts_the_test_images_once(evaluated):
    _, result = evaluated
    matrix = result["confusion"]["matrix"]
    assert sum(map(sum, matrix)) == result["splits"]["test"]
    right = sum(matrix[i][i] for i in range(10))
    shown = next(row for row in result["probes"] if (row["probe"], row["labels"]) == ("linear", "all"))
    assert 100 * right / result["splits"]["test"] == pytest.approx(shown["accuracy_pct"])


def test_raw_pixels_reach_their_known_level(evaluated):
    """A check of the whole chain: splits, labels, probe. Digits are easy: all labels give well over 90 %."""
    _, result = evaluated
    found = {row["probe"]: row["accuracy_pct"] for row in result["probes"] if row["encoder"] == "raw pixels"
             and row["labels"] == "all"}  # fmt: skip
    assert found["linear"] > 91
    assert found["knn"] > 95


def test_a_second_evaluation_gives_the_same_numbers(evaluated):
    folder, result = evaluated
    again = evaluate.evaluate(str(folder), draws=3, labels_per_class=[5], cost=False, baselines=False)
    first = [row for row in result["probes"] if row["encoder"] == "trained"]
    assert json.dumps(again["probes"]) == json.dumps(first)
    assert json.loads((folder / "eval.1.json").read_text())["probes"] == result["probes"]  # which had more
    assert evaluate.evaluate(str(folder), draws=3, labels_per_class=[5], cost=False)["probes"] == result["probes"]
    assert not (folder / "eval.2.json").exists()


def test_an_evaluation_of_other_data_or_that_cannot_be_read_stays(evaluated, tmp_path):
    file, result = tmp_path / "eval.json", evaluated[1]
    file.write_text(json.dumps(result))
    evaluate._set_aside(tmp_path, "", result)
    assert file.exists()  # to be written over
    old = {name: value for name, value in result.items() if name != "draws_version"}
    file.write_text(json.dumps(old))
    evaluate._set_aside(tmp_path, "", result)  # which draws otherwise
    assert json.loads((tmp_path / "eval.1.json").read_text()) == old
    file.write_text(json.dumps(result))
    moved = result | {"digests": result["digests"] | {"test": "one image of another class"}}
    evaluate._set_aside(tmp_path, "", moved)
    assert json.loads((tmp_path / "eval.2.json").read_text())["digests"] == result["digests"]
    for number, size in ((3, 9), (4, MAX_JSON_BYTES + 1)):
        with file.open("wb") as opened:
            opened.truncate(size)
        evaluate._refuse_another(file, "elsewhere", result["digests"])
        evaluate._set_aside(tmp_path, "", result)
        assert (tmp_path / f"eval.{number}.json").stat().st_size == size
        assert not file.exists()


def test_large_labels_are_numbered_by_the_classes_that_occur(tmp_path):
    images = [
        (f"{i}.{ending}", part)
        for i in range(12)
        for ending, part in (
            ("png", encoded(Image.new("RGB", (32, 32), (80 * (i % 3), 9, 9)))),
            ("cls", str(100_000 + i % 3).encode()),
        )
    ]
    for split in ("train", "test"):
        write_shard(tmp_path / f"{split}-0.tar", images)
    options: Any = {"data": str(tmp_path), "protocols": ["linear", "knn"], "taps": ["f1"]}
    found = evaluate.evaluate(str(make_run(tmp_path / "run")), **options, baselines=False, cost=False)
    assert found["classes"] == ["100000", "100001", "100002"]
    assert found["chance_pct"] == pytest.approx(100 / 3)
    assert [sum(row) for row in found["confusion"]["matrix"]] == [4, 4, 4]
    assert {row["accuracy_pct"] for row in found["probes"]} == {100.0}  # three plain colours


def test_the_command_prints_the_table_and_the_path(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    options = ["--draws", "2", "--labels_per_class", "5", "--baselines", "false", "--cost", "false", "--taps", "f1"]
    assert cli.main(["eval", str(folder), *options]) == 0
    out = capsys.readouterr().out
    assert "f1  trained" in out
    assert out.rstrip().endswith(f"Report: {folder / 'report.html'}")


def make_folder(root, classes=6, train=24, test=16, px=16):
    """A labelled data set of small images, one colour a class with noise upon it."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("test", test)):
        for label in range(classes):
            folder = root / split / f"colour{label}"
            folder.mkdir(parents=True)
            base = torch.randint(40, 215, (3, 1, 1), generator=torch.Generator().manual_seed(label))
            for i in range(count):
                noise = torch.randint(-30, 30, (3, px, px), generator=generator)
                Image.fromarray((base + noise).to(torch.uint8).permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return root


def test_another_data_set_by_every_protocol(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (folder / "eval.json").write_text("the run's own")
    other = make_folder(tmp_path / "colours")
    options = ["--data", str(other), "--protocols", "all", "--labels_per_class", "1,5", "--taps", "f1", "--draws", "2"]
    options += ["--tasks=4", "--baselines=false", "--cost=false"]
    assert cli.main(["eval", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "Prototype, 1-shot" in printed
    assert "Linear, 5/class" in printed
    assert printed.rstrip().endswith("report-colours.html")
    assert (folder / "eval.json").read_text() == "the run's own"
    result = json.loads((folder / "eval-colours.json").read_text())
    assert (result["trained_on"], result["data_name"]) == ("digits", "colours")
    assert result["classes"] == [f"colour{i}" for i in range(6)]
    found = {(row["probe"], row["labels"]): row for row in result["probes"]}
    assert set(found) == {
        *((name, "all") for name in ("linear", "knn", "sgd", "svm", "mlp")),
        *((name, f"{count}/class") for name in ("linear", "knn") for count in (1, 5)),
        *((name, f"5-way {shots}-shot") for name in ("prototype", "logistic") for shots in (1, 5)),
    }
    assert all(row["accuracy_pct"] > 60 for row in found.values())  # six plain colours
    page = (folder / "report-colours.html").read_text()
    assert "AMDIM on digits, evaluated on colours" in page
    assert "95 % interval of 4 tasks" in page
    assert not list(folder.glob("*.partial.csv"))
    assert list(result["digests"]) == ["probe", "test"]
    before = (folder / "eval-colours.json").read_bytes()
    options[1] = str(make_folder(tmp_path / "third" / "colours", test=15))
    assert cli.main(["eval", str(folder), *options]) == 2
    said = f"data: {folder / 'eval-colours.json'} is of other data than {options[1]}, by the same name; move it away"
    assert said in capsys.readouterr().err
    assert (folder / "eval-colours.json").read_bytes() == before


@pytest.mark.parametrize("words", [["--taps", "f1,f7"], ["--taps=f1,f7"], ["--taps=[f1, f7]"], ["--taps", "[f1,f7]"]])
def test_a_list_is_written_plainly_or_in_brackets(evaluated, monkeypatch, capsys, words):
    def stop(*args, **options):
        raise OSError(f"asked for {options['labels_per_class']}")

    seen = []
    monkeypatch.setattr(evaluate.features, "check_taps", lambda model, sample, taps: seen.extend(taps))
    monkeypatch.setattr(scoring, "plan", stop)
    assert cli.main(["eval", str(evaluated[0]), *words, "--labels_per_class", "5"]) == 2
    assert seen == ["f1", "f7"]
    assert "asked for [5]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels_per_class", "few"], "labels_per_class"),
        (["--protocols", "lda"], "protocols: must be of linear, knn, few"),
        (["--taps"], "taps"),
    ],
)
def test_a_list_that_is_none_is_one_line(tmp_path, capsys, words, message):
    assert cli.main(["eval", str(make_run(tmp_path / "run")), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_failed_timing_of_the_loss_costs_no_result(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("measuring the loss failed (exit 1): killed")

    monkeypatch.setattr(loss_cost, "measure", fail)
    folder = make_run(tmp_path / "run")
    options = ["--draws=2", "--labels_per_class=5", "--baselines=false", "--taps=f1"]
    assert cli.main(["eval", str(folder), *options]) == 1
    printed = capsys.readouterr()
    assert "f1  trained" in printed.out
    assert "fused-nce: measuring the loss failed (exit 1): killed" in printed.err
    assert json.loads((folder / "eval.json").read_text())["loss_cost_error"].endswith("killed")
    assert "Not measured in this evaluation: measuring the loss failed" in (folder / "report.html").read_text()


def test_accuracies_are_on_the_disk_as_they_come(tmp_path, monkeypatch, capsys):
    """The second feature set fails: the first one's accuracies are there, and an older evaluation is untouched."""
    folder, real = make_run(tmp_path / "run"), scoring.score
    (folder / "eval.csv").write_text("older")
    done: list[int] = []

    def fail_later(*args):
        if done:
            raise MemoryError("out of memory")
        done.append(1)
        return real(*args)

    monkeypatch.setattr(scoring, "score", fail_later)
    assert cli.main(["eval", str(folder), "--draws=2", "--labels_per_class=5", "--baselines=false"]) == 2
    assert "fused-nce: memory: out of memory" in capsys.readouterr().err
    with (folder / "eval.partial.csv").open(newline="") as file:
        assert [(row["encoder"], row["tap"]) for row in csv.DictReader(file)] == [("trained", "f1")] * 4
    assert (folder / "eval.csv").read_text() == "older"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": ["f3"]}, "taps: must be one of f1, f5, f7, h5, h7, got 'f3'"),
        ({"taps": []}, "taps: none given"),
        ({"labels": []}, "labels: none given"),
        ({"labels": ["digit"]}, "labels: must be left out for images, which have no labels by name; got 'digit'"),
        ({"draws": 1}, "draws: 1; need at least 2"),
        ({"labels_per_class": [0]}, "labels_per_class: 0; need at least 1"),
        ({"labels_per_class": [40]}, "labels_per_class: 40; class 0 has only"),
    ],
)
def test_settings_that_do_not_fit_are_named(evaluated, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(str(evaluated[0]), **options)


@pytest.mark.parametrize("command", ["eval", "fine-tune"])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses_is_refused_before_anything_is_read(tmp_path, capsys, command, seed):
    assert cli.main([command, str(tmp_path / "nowhere"), f"--seed={seed}"]) == 2
    assert capsys.readouterr().err == f"fused-nce: seed: must be in [0, 4294967295], got {seed}\n"


def test_a_tap_that_is_named_twice_is_measured_once(tmp_path):
    options: dict[str, Any] = {"protocols": ["knn"], "baselines": False, "cost": False}
    found = evaluate.evaluate(str(make_run(tmp_path / "run")), taps=["f1", "f1"], **options)
    assert (found["taps"], [row["tap"] for row in found["probes"]]) == (["f1"], ["f1"])


def test_a_tap_that_the_encoder_lacks_is_refused_by_the_options_name(evaluated, capsys):
    for argv in (["fine-tune", "--tap=f3"], ["eval", "--taps=f3"]):
        assert cli.main([argv[0], str(evaluated[0]), argv[1]]) == 2
        option = argv[1].removeprefix("--").removesuffix("=f3")
        assert capsys.readouterr().err == f"fused-nce: {option}: must be one of f1, f5, f7, h5, h7, got 'f3'\n"


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path / "nowhere")]) == 2
    folder = make_run(tmp_path / "run")
    weights = next(folder.glob("checkpoints/step_*")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert cli.main(["eval", str(folder)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fused-nce: ")]
    assert "config.yaml" in errors[0]
    assert "damaged" in errors[1]
    assert len(errors) == 2


def test_a_data_set_without_labels_is_refused(evaluated, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / split / "a.png")
    with pytest.raises(ValueError, match=f"the probe split of {tmp_path} has no labels of 2 or more classes"):
        evaluate.evaluate(str(evaluated[0]), data=str(tmp_path))


def test_images_without_a_label_and_those_not_drawn_are_left_out_before_any_is_decoded(tmp_path, monkeypatch):
    make_folder(tmp_path, classes=2, train=40, test=2)
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "a.png")
    monkeypatch.setattr(images_module, "MAX_PROBE_IMAGES", 30)
    options: Any = {"seed": 0, "limit_mb": 1}
    size = 100  # of 81 images 2.3 MB, of 30 still 0.9
    probe, test = images_module.load_labelled(str(tmp_path), size, AugmentConfig(), **options)
    assert (len(probe.images), len(test.images)) == (30, 4)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert probe.labels.tolist() == [int(i >= 40) for i in order[:30].sort().values]  # of the labelled, as they stand
    assert "probe: 30 images, 2 classes; left out: 1 images without a label" in probe.account
    assert "50 images that were not drawn" in probe.account
    assert probe.digest == images_module.load_split(str(tmp_path), "probe", size).digest  # of all
    with pytest.raises(
        ValueError, match=r"probe: 30 images take 2 MB as uint8 of 120 px; memory_limit_mb must be as large, got 1"
    ):
        images_module.load_labelled(str(tmp_path), 120, AugmentConfig(), **options)


@pytest.mark.parametrize("seed", range(5))
def test_two_of_each_class_are_drawn_however_rare(seed):
    labels = torch.tensor([0] * 300 + [1] * 2 + [2] + [3] * 5)
    rows = images_module.drawn(labels, 20, seed)
    assert len(rows) == 20 == len(set(rows.tolist()))
    assert rows.tolist() == sorted(rows.tolist())
    counts = labels[rows].bincount()
    assert counts[1:3].tolist() == [2, 1]
    assert min(counts[0], counts[3]) >= 2
    assert len(images_module.drawn(labels, 3, seed)) == 7
    # What is drawn without regard to class has two of each: the same.
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    assert images_module.drawn(torch.arange(300) % 2, 50, seed).tolist() == sorted(order[:50].tolist())


def test_the_limit_of_the_runs_memory_is_an_option(evaluated, tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, classes=2, train=2, test=1)
    monkeypatch.setattr(images_module, "decoded_bytes", lambda source, size: (5000 << 20) + 1)
    for words, limit in (([], 4096), (["--memory_limit_mb=5000"], 5000)):
        assert cli.main(["eval", str(evaluated[0]), "--data", str(tmp_path), *words]) == 2
        need = f"take 5001 MB as uint8 of 32 px; memory_limit_mb must be as large, got {limit}"
        assert need in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "resize"),
    [
        ({"geometry": "none"}, 64),
        ({"geometry": "translate"}, 64),
        ({"geometry": "crop", "crop_area": (4 / 9, 4 / 9)}, 96),
        ({"geometry": "crop"}, 70),
    ],
)
def test_an_image_is_tested_at_the_scale_that_training_showed(tmp_path, changes, resize):
    """A bar takes a quarter of an image of 96 px: how wide it is in the test image."""
    for split in ("train", "test"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            image = torch.zeros(96, 96, 3, dtype=torch.uint8)
            image[:, 48:] = 255
            image[36:60, :] = 255 - image[36:60, :]  # a quarter of the image's height
            Image.fromarray(image.numpy()).save(tmp_path / split / label / "1.png")
    found = images_module.load_labelled(str(tmp_path), 64, AugmentConfig(**changes), seed=0)[1].images[0, 0]
    assert ((found[:, 0] > 128).sum().item(), (found[0] > 128).sum().item()) == (round(24 * resize / 96), 32)


def test_a_test_class_without_probe_images_is_refused():
    with pytest.raises(ValueError, match="test class 2 has no example in the probe split"):
        scoring.plan(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2]), labels_per_class=[1], draws=2, seed=0)


def test_confusion_matrix_has_the_truth_in_rows():
    truth, predicted = torch.tensor([0, 0, 1]).numpy(), torch.tensor([0, 1, 1]).numpy()
    assert scoring.confusion_matrix(predicted, truth, 2) == [[1, 1], [0, 1]]


def test_of_many_classes_the_mistakes_are_kept_alone():
    truth = torch.arange(101).repeat(3).numpy()
    predicted = truth.copy()
    predicted[[5, 7, 7 + 101]] = 9, 3, 3
    shown = ("knn", predicted)
    found = scoring.confusion(shown, "f1", truth, 101)
    assert found == {"tap": "f1", "probe": "knn", "labels": "all", "mistakes": [[7, 3, 2], [5, 9, 1]]}
    found = scoring.confusion(("knn", truth), "f1", truth, 101)
    assert found is not None
    assert found["mistakes"] == []
    found = scoring.confusion(("knn", truth % 100), "f1", truth % 100, 100)
    assert found is not None
    assert "mistakes" not in found
    assert len(found["matrix"]) == len(found["matrix"][0]) == 100


def test_loss_cost_measures_both(monkeypatch):
    terms = [(1, 4), (4, 4)]
    found = loss_cost.compare(8, terms, 16, torch.float32, repeats=3)
    assert found["fused"]["loss"] == pytest.approx(found["naive"]["loss"], rel=1e-5)
    for name in ("fused", "naive"):
        assert found[name]["time_ms"] > 0
        assert found[name]["quartiles_ms"][0] <= found[name]["time_ms"] <= found[name]["quartiles_ms"][1]
    monkeypatch.setattr(loss_cost, "naive_loss", lambda a, c: 1.1 * loss_cost.fused_loss(a, c))
    with pytest.raises(RuntimeError, match="the losses disagree"):
        loss_cost.compare(8, terms, 16, torch.float32, repeats=1)


def test_loss_cost_sees_the_naive_score_tensor():
    """In a process of its own: 256 × 256 × 49 scores are 12.8 MB, and the naive loss holds several of them at once."""
    found = loss_cost.measure(256, [(1, 49)], 32, torch.float32, repeats=1)
    assert found["naive"]["peak_bytes"] > 3 * 4 * 256 * 256 * 49
    assert found["naive"]["peak_bytes"] > 1.5 * found["fused"]["peak_bytes"]


@pytest.mark.nightly
def test_a_failed_measurement_is_reported():
    with pytest.raises(RuntimeError, match=r"measuring the loss failed \(exit \d+\): "):
        loss_cost.measure(0, [(1, 4)], 16, torch.float32)


def test_every_pair_of_the_loss_is_a_term(monkeypatch):
    seen: dict = {}
    monkeypatch.setattr(loss_cost, "measure", lambda *args: seen.update(args=args) or {})
    settings = AMDIMConfig(precision="fp32")
    settings.model = dataclasses.replace(settings.model, ndf=32, n_rkhs=256, n_depth=1)
    assert evaluate._loss_cost(settings.build(), settings) == {"loss_cost": {}}
    assert seen["args"] == (200, [(1, 25), (1, 25), (1, 49), (1, 49), (1, 25), (1, 25)], 256, torch.float32)
    settings.model = dataclasses.replace(settings.model, mixture=3)
    evaluate._loss_cost(settings.build(), settings)
    assert seen["args"][1] == [(3, 25), (3, 25), (3, 49), (3, 49), (1, 25), (1, 25)]
    settings.model = dataclasses.replace(settings.model, mixture=1)
    settings.loss = dataclasses.replace(settings.loss, pairs=("5>7",), antecedents="all")
    evaluate._loss_cost(settings.build(), settings)
    assert seen["args"][1] == [(25, 49), (25, 49)]
