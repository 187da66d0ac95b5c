"""CelebA's lists and folder, on made images; the probe of attributes, beside scikit-learn's; and a run judged by it."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fused_nce import cli
from fused_nce.train.data.image_source import ImageSource
from fused_nce.train.data.images import load_attributes
from fused_nce.train.evaluation import attributes
from fused_nce.train.evaluation.logistic import fit, principal_axes
from fused_nce.train.settings import AugmentConfig

NAMES = ["Red", "Rare", "Noise", "Always"]


def make(root, ending=".txt", count=60):
    """Red images, seen; a rare attribute, blue; one that nothing shows; one that all have. 2 in 3 are to train on."""
    folder = root / "img_align_celeba" / "img_align_celeba"  # as Kaggle's archive unpacks
    folder.mkdir(parents=True)
    draw, rows = np.random.default_rng(0), []
    for i in range(count):
        has = [i % 2 == 0, i % 10 in (0, 3), bool(draw.integers(2)), True]
        pixels = draw.integers(0, 60, (218, 178, 3)).astype(np.uint8)
        pixels[..., 0] += 120 * has[0]
        pixels[..., 2] += 120 * has[1]
        Image.fromarray(pixels).save(folder / f"{i + 1:06d}.jpg")
        rows.append((f"{i + 1:06d}.jpg", ["1" if x else "-1" for x in has], "0" if i < 2 * count // 3 else "2"))
    if ending == ".csv":
        lines = [",".join(["image_id", *NAMES]), *(",".join([name, *has]) for name, has, _ in rows)]
        parts = ["image_id,partition", *(f"{name},{part}" for name, _, part in rows)]
    else:
        lines = [str(count), " ".join(NAMES) + " ", *(f"{name}  {' '.join(has)}" for name, has, _ in rows)]
        parts = [f"{name} {part}" for name, _, part in rows]
    (root / f"list_attr_celeba{ending}").write_text("\n".join(lines) + "\n")
    (root / f"list_eval_partition{ending}").write_text("\n".join(parts) + "\n")
    return root


@pytest.mark.parametrize("ending", [".txt", ".csv"])
def test_both_lists_give_the_splits_and_what_is_left_out(tmp_path, ending):
    root = make(tmp_path, ending)
    train, test = (ImageSource(root, split) for split in ("train", "test"))
    assert train.samples.attributes is not None
    assert (len(train), len(test)) == (40, 20)
    assert train.samples.attributes.names == NAMES
    assert train.samples.attributes.values[:4].tolist()[0][:2] == [True, True]
    assert train.samples.attributes.values[:, 0].tolist() == [i % 2 == 0 for i in range(40)]
    assert test.samples.short_name(0) == "000041.jpg"
    assert train.account() == f"{root}, train: 40 images, 4 attributes"
    (root / "img_align_celeba/img_align_celeba/000003.jpg").unlink()
    (root / "img_align_celeba/other.jpg").write_bytes(b"")
    list_ = root / f"list_eval_partition{ending}"
    list_.write_text(list_.read_text().replace("000001.jpg,0", "000001.jpg,1").replace("000001.jpg 0", "000001.jpg 1"))
    source = ImageSource(root, "train")
    assert len(source) == 38
    for words in (
        "1 images that the list has and the folder lacks (000003.jpg)", "1 images of another partition (000001.jpg)",
        "1 images without attributes (other.jpg)",
    ):  # fmt: skip
        assert words in source.account()
    assert source.samples.digest() != train.samples.digest()


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("list_attr_celeba.txt", "000002.jpg  -1", "000002.jpg  2", "list_attr_celeba.txt, line 4: must hold 1 and -1"),
        ("list_attr_celeba.txt", "000002.jpg  -1", "000002.jpg ", "line 4: must hold a name and 4 numbers, got 3 of"),
        ("list_attr_celeba.txt", "Red Rare", "Red Red", "must name different attributes"),
        ("list_eval_partition.txt", "000002.jpg 0", "000002.jpg", "line 2: must hold a name and 1 numbers, got 0 of"),
        ("list_eval_partition.txt", None, None, "list_eval_partition.txt: cannot be used"),
        ("list_eval_partition.txt", " 0\n", " 1\n", "no train image of .*list_eval_partition.txt lies below"),
    ],
)
def test_a_damaged_list_is_named_with_its_line(tmp_path, file, old, new, words):
    path = make(tmp_path, count=12) / file
    if old is None:
        path.unlink()
    else:
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=words):
        ImageSource(tmp_path, "train")


def test_a_damaged_image_brings_the_attributes_of_its_replacement(tmp_path):
    root = make(tmp_path, count=240)
    (root / "img_align_celeba/img_align_celeba/000002.jpg").write_bytes(b"")
    train = load_attributes(str(root), 16, AugmentConfig(), seed=0, limit_mb=64)[0]
    assert train.attributes is not None
    assert train.attributes.values[:4, 0].tolist() == [True, True, True, False]
    assert (train.images[1] == train.images[2]).all()


def test_every_attribute_has_the_logistic_regression_of_its_own():
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    x = torch.randn(200, 6)
    x -= x.mean(0)
    y = (x[:, :3] + 0.7 * torch.randn(200, 3) > torch.tensor([0.0, 1.0, -0.5])).float()
    ours = fit(x, y, 0.5, principal_axes(x), "attributes")
    assert ours.converged
    for i in range(3):
        theirs = LogisticRegression(C=0.5, tol=1e-8, max_iter=1000).fit(x.numpy(), y[:, i].numpy())
        assert np.abs(theirs.decision_function(x.numpy()) - ours.logits(x)[:, i].numpy()).max() < 5e-3


def test_balanced_accuracy_is_the_mean_over_both_answers_at_the_share():
    logits = torch.tensor([[-3.0], [-1.0], [-1.0], [-3.0], [-3.0], [0.5]])
    truth = torch.tensor([[False], [False], [True], [False], [False], [True]])
    share = torch.tensor([0.2])  # its logit is −1.39: −1 is likelier than that
    assert attributes.balanced(logits, truth, share).tolist() == pytest.approx([50 * (1 + 3 / 4)])
    assert attributes.balanced(logits, truth, torch.tensor([0.5])).tolist() == pytest.approx([50 * (0.5 + 1)])


def test_one_penalty_serves_both_accuracies():
    """The threshold of balanced accuracy forgives weights near 0, with which every answer is the commoner one."""
    g = torch.Generator().manual_seed(0)
    known = torch.rand(400, 3, generator=g) < torch.tensor([0.2, 0.6, 0.85])
    x = known * 2.0 - 1 + 0.05 * torch.randn(400, 3, generator=g)  # every penalty balances them
    found = attributes.probe(x[:200], known[:200], x[200:], known[200:], seed=0)
    assert found.accuracy.min() > 90
    assert found.balanced.min() > 90


def test_an_empty_list_and_one_name_twice_are_said(tmp_path):
    root = make(tmp_path, ".csv", count=12)
    images = root / "img_align_celeba"
    (images / "z").mkdir()
    shutil.copy(images / "img_align_celeba/000001.jpg", images / "z/000001.jpg")
    source = ImageSource(root, "train")
    assert len(source) == 8
    assert "1 images of a name that another has (" in source.account()
    (root / "list_attr_celeba.csv").write_text("")
    with pytest.raises(ValueError, match=r"list_attr_celeba\.csv must name different attributes, got \[\]"):
        ImageSource(root, "train")


def test_what_images_show_is_told_and_what_they_do_not_is_guessed(tmp_path):
    root = make(tmp_path, count=240)
    sets = load_attributes(str(root), 16, AugmentConfig(), seed=0, limit_mb=64)
    names, known, truth, said = attributes.usable(*sets, str(root))
    assert names == NAMES[:3]
    assert said == ["not judged, for all images of a split have it or lack it: Always"]
    features = [split.images.float().mean((2, 3)) for split in sets]
    found = attributes.probe(features[0], known, features[1], truth, seed=0)
    assert found.balanced[:2].tolist() == [100, 100]
    assert 30 < found.balanced[2] < 70
    assert found.accuracy[0] == 100


def test_a_run_is_judged_by_attributes(tmp_path, capsys, caplog):
    root, run = make(tmp_path / "data"), tmp_path / "run"
    words = ["--preset=digits", "--batch-size=8", "--max-steps=2", f"--data={root}", f"--out={run}"]
    assert cli.main(["train", "simclr", *words]) == 0
    assert "40 images, 4 attributes" in caplog.text
    assert cli.main(["eval", str(run), "--cost", "false"]) == 0
    assert "Linear, attributes, balanced"[:12] in capsys.readouterr().out
    found = json.loads((run / "eval.json").read_text())
    rows = {(row["encoder"], row["tap"], row["labels"]): row for row in found["probes"]}
    assert {key[2] for key in rows} == {"attributes", "attributes, balanced"}
    assert rows["raw pixels", "pixels", "attributes, balanced"]["values_pct"][0] == 100
    assert found["classes"] == ["not Red", "Red"]
    assert "not run, for want of one class an image: knn" in found["read"]
    with (run / "eval.csv").open() as file:
        single = {
            (row["encoder"], row["tap"], row["labels"]): float(row["accuracy_pct"]) for row in csv.DictReader(file)
        }
    assert single["raw pixels", "pixels", "Red, balanced"] == 100
    page = (run / "report.html").read_text()
    assert "Linear, attributes, balanced" in page
    assert "chosen by the least mean cross-entropy on a held-out quarter" in page
    assert cli.main(["eval", str(run), "--protocols", "knn"]) == 2
    assert "protocols: images with attributes have linear alone, got knn" in capsys.readouterr().err
