"""One rule says which split a name means, of shards, globs and folders; what it cannot tell apart is refused."""

import os

import pytest

from fused_nce.train.data import recordings, splits
from fused_nce.train.data.image_source import ImageSource, open_samples
from fused_nce.train.data.images import load_labelled
from fused_nce.train.data.members import IMAGE
from fused_nce.train.settings import AugmentConfig
from tests.train.pictures import write_shard
from tests.train.test_reading import P, pairs, shards, shown, tree

NAMES = {
    "train": "train-0 train trainA train2017 training_1 trainval-0 trainset-0 imagenet-train-000000 cifar10train-1 "
    "cifarTrain train-test-0 IMAGENET_TRAIN a.train.0 train_set",
    "test": "test-0 testA cifar_test_0 testing imagenetTest test-tube my.test",
    "val": "val-0 valid imagenet1k-validation-0000-of-0064 Val x_val val_set",
    None: "trainer contest interval-0 retrieval values-0 strain trains unlabeled-0 extra my-test-train-0 mytrain",
}


def test_a_word_of_a_name_is_its_split():
    assert {name: splits.split_of(name) for names in NAMES.values() for name in names.split()} == {
        name: split for split, names in NAMES.items() for name in names.split()
    }
    alone = ("Train", "training_set", "validation", "test-set", "valid", "TEST")
    assert [name for name in (*alone, "train-0", "cifar_test", "trainer") if splits.is_split(name)] == list(alone)


# Shards; what a folder gives to train and to test on; and a glob, where another than `*.tar` is meant, with the same.
SHARDS = {
    # as ever
    "train-0 test-0 extra-0": ("train-0", "test-0", "train*"),
    "train-0 small-train-0 val-0": ("train-0", "val-0", "train*"),
    "trainclean-0 testclean-0 values-0": ("trainclean-0", "testclean-0 | values-0", "train*"),
    "a-0 b-0": ("a-0 b-0", None, "*-0.tar"),
    "a-0 values-0": ("a-0 values-0", None, "*"),
    "a-0 test-0": ("a-0", "test-0", "*"),
    "test-0": (None, "test-0", None),
    "a-train-0 b-0": ("a-train-0 b-0", None, "*-0.tar"),
    "trainset-0 testset-0": ("trainset-0", "testset-0", "trainset*"),
    "contest-0 strain-0": ("contest-0 strain-0", None, "*"),
    # names whose beginning is not the split's
    "imagenet-train-000000 imagenet-val-000000": ("imagenet-train-000000", "imagenet-val-000000", "imagenet-train-*"),
    "in1k-train-0 in1k-validation-0": ("in1k-train-0", "in1k-validation-0", "in1k-train-*.tar"),
    "cifar_train_0 cifar_test_0 cifar_extra_0": ("cifar_train_0", "cifar_test_0", "cifar_train*"),
    "c-Train-0 c-Validation-0": ("c-Train-0", "c-Validation-0", "c-Train-*"),
    "c-TRAIN-0 c-TEST-0": ("c-TRAIN-0", "c-TEST-0", "c-TRAIN-*"),
    "train-0 my-test-0": ("train-0", "my-test-0", "*"),
    "strain-train-0 strain-val-0": ("strain-train-0", "strain-val-0", "strain-train-*"),
    "interval-train-0 interval-test-0": ("interval-train-0", "interval-test-0", "*train*"),
    "data-0 data-val-0": ("data-0", "data-val-0", "*"),
    "training-0 testing-0": ("training-0", "testing-0", "training*"),
    "a-0 validation-0": ("a-0", "validation-0", "*"),
    "validation-0": (None, "validation-0", None),
    "train-0 train_train-0 train_val-0 val-0 test-0": ("train-0 train_train-0 train_val-0", "test-0 | val-0", None),
}


def groups(pattern):
    found = splits.find_shards(pattern)
    train, *tests = (" ".join(p.name.removesuffix(".tar") for p in group) for group in (found.train, *found.tests))
    return train or None, " | ".join(tests) or None


@pytest.mark.parametrize("names", SHARDS)
def test_shards_are_told_apart_by_name_in_folders_and_by_globs(tmp_path, names):
    for name in names.split():
        (tmp_path / f"{name}.tar").touch()
    *wanted, base = SHARDS[names]
    assert groups(str(tmp_path)) == tuple(wanted)
    if base is not None:
        assert groups(f"{tmp_path}/{base}") == tuple(wanted)


@pytest.mark.parametrize(
    "names", ["mytrain-0 mytest-0", "mytrain-0-of-100 myvalid-00-of-8", "my-test-train my-test-val"]
)
def test_shards_that_only_a_part_of_a_word_tells_apart_are_refused(tmp_path, names):
    for name in names.split():
        (tmp_path / f"{name}.tar").touch()
    for pattern in (tmp_path, f"{tmp_path}/my*"):
        with pytest.raises(
            ValueError, match=r"^data: my.*tar and my.*tar at .* look like two splits; their names must"
        ):
            splits.find_shards(str(pattern))


def test_a_glob_of_all_leaves_out_the_shards_of_another_split_and_says_so(tmp_path):
    shards(tmp_path, **{"x-train": pairs("0", "1"), "x-val": pairs("0"), "more": pairs("1")})
    source = ImageSource(f"{tmp_path}/*.tar", "train")
    assert (len(source), shown(source)[2]) == (3, {"shards of another split": 1})
    assert shown(ImageSource(f"{tmp_path}/*.tar", "test"))[::2] == ([0], {})
    assert groups(f"{tmp_path}/x-val-*.tar") == ("x-val-0", None)  # nothing else: it was asked for
    folder = ImageSource(tmp_path, "train")
    assert (len(folder), shown(folder)[2]) == (2, {"shards of no split": 1})
    with pytest.raises(ValueError, match=r"^data: no test shards at .*; there must be test-\*\.tar or val\*\.tar, or"):
        ImageSource(f"{tmp_path}/more*.tar", "test")


@pytest.mark.parametrize("glob", ["", "/train*.tar"])
def test_of_val_and_test_shards_those_with_labels_are_taken_and_the_others_counted(tmp_path, glob):
    shards(tmp_path, train=pairs("0", "1"), val=pairs("1", "0"), test=pairs("0"))
    write_shard(tmp_path / "val-1.tar", pairs("0"))
    labels, _, left_out = shown(ImageSource(f"{tmp_path}{glob}", "test"))
    assert (labels, left_out) == ([0], {"other shards to test on": 2})
    for unlabelled in ([("0.png", P[1])], [("0.png", P[1]), ("0.cls", b"-1")]):
        write_shard(tmp_path / "test-0.tar", unlabelled)
        source = ImageSource(f"{tmp_path}{glob}", "test")
        assert (source.labels, shown(source)[2]) == ([1, 0, 0], {"other shards to test on": 1})
        assert f"1 other shards to test on ({tmp_path}/test-0.tar)" in source.account()
    for name in ("val-0.tar", "val-1.tar"):  # none has any: the first
        write_shard(tmp_path / name, [("0.png", P[1])])
    assert shown(ImageSource(f"{tmp_path}{glob}", "test"))[2] == {"other shards to test on": 2}


FOLDERS = {
    "Train/a Val/a annotations": "Train, Val",
    "training_set/a test_set/a": "test_set, training_set",
    "train-clean-100/a train-clean-360/a dev-clean/a test-clean/a test-other/a": "test-clean, test-other, "
    "train-clean-100 and 1 more such",
    "mytrain/a myvalid/a other/a": "mytrain, myvalid",
    "validation/a": "validation",
}


def test_folders_that_look_like_two_splits_are_no_classes(tmp_path):
    for i, (folders, named) in enumerate(FOLDERS.items()):
        root = tree(tmp_path / str(i), **{name: ["1.png"] if "/" in name else [] for name in folders.split()})
        with pytest.raises(ValueError, match=f"^data: {root} holds {named}; splits must be called train, and test or"):
            ImageSource(root, "train")
    plain = tree(tmp_path / "plain", bullet_train=["1.png"], contest=["1.png"], interval=["1.png"])
    assert ImageSource(plain, "train").classes == ["bullet_train", "contest", "interval"]
    below = tree(tmp_path / "below" / "train", bullet_train=["1.png"], test_tube=["1.png"])  # as the refusal says
    assert ImageSource(below.parent, "train").classes == ["bullet_train", "test_tube"]


@pytest.mark.parametrize("names", ["train validation", "train Val", "train test_set", "Training val", "training test"])
def test_beside_a_split_that_is_called_so_another_may_be_called_otherwise(tmp_path, names):
    train, test = names.split()
    tree(tmp_path, **{f"{train}/a": ["1.png", "2.png"], f"{test}/a": ["3.png"], "notes": []})
    for split, count in (("train", 2), ("test", 1)):
        source = ImageSource(tmp_path, split)
        assert (source.labels, shown(source)[2]) == ([0] * count, {"entries beside the splits": 1})


def test_folders_called_unlabeled_are_no_class(tmp_path):
    unlabelled = {name: ["9.png"] for name in ("unlabeled", "Unlabelled", "unsup")}
    tree(tmp_path / "train", ant=["1.png"], bee=["1.png"], unlabel=["1.png"], unsupervised=["9.txt"], **unlabelled)
    source = ImageSource(tmp_path, "train")
    assert (source.classes, sorted(source.labels)) == (["ant", "bee", "unlabel"], [-1, -1, -1, 0, 1, 2])
    assert shown(source)[2] == {".txt files": 1, "folders without images": 1}


def test_flat_folders_are_looked_at_no_file_at_a_time(tmp_path, monkeypatch):
    tree(tmp_path, train=[f"{i}.png" for i in range(200)])
    real, seen = os.stat, []

    def stat(path, **options):
        seen.append(str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    for root in (tmp_path, tmp_path / "train"):
        assert len(open_samples(str(root), "train", IMAGE)) == 200
        assert not [path for path in seen if path.endswith(".png")]
    assert len(seen) < 40


def test_json_and_class_members(tmp_path):
    data = shards(tmp_path / "class", train=[*pairs("1", "0", suffix="class"), ("2.png", P[2]), ("2.class", b"cat")])
    assert shown(ImageSource(data, "train")) == ([1, 0, -1], [0, 1, 2], {".class members that hold no integer": 1})
    members = [m for i in range(2) for m in ((f"{i}.png", P[i]), (f"{i}.json", b'{"label": %d}' % i))]
    data = shards(tmp_path / "json", train=members, test=members)
    with pytest.raises(ValueError, match=r"no labels of 2 .*; of images no \.json member is read, so write \.cls mem"):
        load_labelled(str(data), 32, AugmentConfig(), seed=0)


def test_minus_one_in_json_is_no_label(tmp_path):
    values = (b'{"who": -1, "take": "-1", "all": -1}', b'{"who": 3, "take": "2"}', b'{"who": -1.0, "take": "2"}')
    members = [m for i, value in enumerate(values) for m in ((f"{i}.wav", b""), (f"{i}.json", value))]
    source = recordings.WavSource(str(shards(tmp_path, train=members)), "train")
    assert source.tags == {"take": ["-1", "2", "2"], "who": ["", "3", ""]}


def test_only_decimal_digits_are_numbers():
    assert recordings.classes(["²", "10", "9", "b", ""]) == ["9", "10", "b", "²"]
