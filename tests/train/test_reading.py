"""What folders and shards give: every image and label is read, named in a refusal, or counted as left out."""

import gzip
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from fused_nce.train.data import images
from fused_nce.train.data.image_source import ImageSource, to_rgb
from fused_nce.train.settings import AugmentConfig
from tests.train.pictures import archive, encoded, picture, write_shard

P = [picture(v) for v in range(8)]
LINK, SOFT, FIFO = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE


def shards(folder, zipped=False, names=None, **splits):
    """A folder with a shard of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, members in splits.items():
        write_shard(folder / f"{split}-0.tar{'.gz' * zipped}", members)
    if names is not None:
        (folder / "classes.json").write_text(json.dumps(names))
    return folder


def pairs(*texts, suffix="cls"):
    return [m for i, text in enumerate(texts) for m in ((f"{i}.png", P[i]), (f"{i}.{suffix}", text.encode()))]


def shown(source):
    """Labels, the red of each image's corner, and what was left out, by kind."""
    left_out = {kind: count for kind, (count, _) in source.samples.account.kinds.items()}
    return source.labels, [int(source.read(i)[0, 0, 0]) for i in range(len(source))], left_out


# --- members of shards --------------------------------------------------------------------------------------------

LINKS = [
    ("a.png", P[1]), ("a.cls", b"1"), ("b.png", LINK, "a.png"), ("b.cls", b"0"), ("c.png", SOFT, "d/e.png"),
    ("c.cls", SOFT, "./b.cls"), ("d/e.png", P[5]), ("f.png", SOFT, "gone.png"), ("g.png", SOFT, "g.png"),
    ("h.png", FIFO, ""),
]  # fmt: skip
MEMBERS = {
    "dots": ([("22.05.png", P[1]), ("22.05.cls", b"1"), ("v.2/0.png", P[2]), ("v.2/0.cls", b"0")], [1, 0], [1, 2], {}),
    "upper case": ([("0.PNG", P[1]), ("0.CLS", b"1")], [1], [1], {}),
    "apart": ([("0.png", P[1]), ("1.png", P[2]), ("0.cls", b"1"), ("1.cls", b"0")], [1, 0], [1, 2], {}),
    "macOS": ([("._0.png", b"\0"), ("._0.cls", b"\0"), ("__MACOSX/0.png", b"\0"), *pairs("1"), (".DS_Store", b"")],
              [1], [0], {"hidden members": 4}),
    "another image of a key": ([*pairs("1"), ("0.seg.png", P[2]), ("0.jpg", P[3])], [1], [0],
                               {"further images of a key": 2}),
    "two images of a key": ([("0.left.png", P[1]), ("0.right.png", P[2]), ("0.cls", b"1")], [1, 1], [1, 2], {}),
    "a key that returns": ([*pairs("1", "0"), ("0.png", P[3]), ("0.cls", b"2")], [1, 0, 2], [0, 1, 3], {}),
    "a label that returns": ([*pairs("1", "0"), ("0.cls", b"1")], [1, 0], [0, 1], {"members that come twice": 1}),
    "a label twice": ([*pairs("1"), ("0.cls", b"1")], [1], [0], {"members that come twice": 1}),
    "no image": ([*pairs("1"), ("9.cls", b"1"), ("0.txt", b"a"), ("note", b"")], [1], [0],
                 {"labels without images": 1, ".txt members": 1, "members without a suffix": 1}),
    "links": (LINKS, [1, 0, 0, -1], [1, 1, 5, 5], {"links to what the shard lacks": 2, "members that are no file": 1}),
    "blanks": (pairs("1\n", " 0", "02\r\n", "\ufeff1"), [1, 0, 2, 1], [0, 1, 2, 3], {}),
    "names": (pairs("dog", "cat\n", "dog"), [1, 0, 1], [0, 1, 2], {}),
    "no label": (pairs("-1", "0"), [-1, 0], [0, 1], {}),
    **{suffix: (pairs("1", "0", suffix=suffix), [1, 0], [0, 1], {}) for suffix in ("cls2", "index", "inx", "id")},
    "an id beside the label": ([*pairs("1", "0"), ("0.id", b"77"), ("1.id", b"78")], [1, 0], [0, 1],
                               {".id members beside another label": 2}),
    "an id of text": ([("0.png", P[0]), ("0.id", b"x7")], [-1], [0], {".id members that hold no integer": 1}),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [False, True])
def test_members_are_read_or_counted(tmp_path, zipped):
    for what, (members, *wanted) in MEMBERS.items():
        source = ImageSource(shards(tmp_path / what, zipped, train=members), "train")
        assert list(shown(source)) == wanted, what


def test_numbers_that_count_the_samples_are_no_labels(tmp_path):
    members = [m for i in range(120) for m in ((f"{i}.png", P[0]), (f"{i}.id", str(i).encode()))]
    source = ImageSource(shards(tmp_path, train=members), "train")
    assert (set(source.labels), source.classes) == ({-1}, [])
    assert "120 .id members that differ in every sample" in source.account()


REFUSED = {
    "two labels": ([*pairs("1"), ("0.cls", b"0")], None, r"train-0\.tar:0\.cls comes twice, with b'1' and with b'0'"),
    "empty": (pairs("1", ""), None, r"train-0\.tar:1\.cls cannot be read: must hold one integer or one name, got ''"),
    "lines": (pairs("1\n2"), None, r"train-0\.tar:0\.cls cannot be read: must hold one integer or one name"),
    "no text": ([("0.png", P[0]), ("0.cls", b"\xff1")], None, r"train-0\.tar:0\.cls cannot be read: .*byte 0xff"),
    "negative": (pairs("0", "-2"), None, r"train-0\.tar:1\.cls holds -2; a class must be in \[0, 1,000,000\)"),
    "huge": (pairs("99999999"), None, r"train-0\.tar:0\.cls holds 99999999; a class must be"),
    "mixed": (pairs("1", "cat"), None, r"train-0\.tar:1\.cls holds 'cat' and .*train-0\.tar:0\.cls 1; labels must be"),
    "above the file": (pairs("2"), ["a", "b"], r"train-0\.tar:0\.cls holds 2, but classes\.json names 2 classes: a, b"),
    "not in the file": (pairs("c"), ["a", "b"], r"train-0\.tar:0\.cls holds c, but classes\.json names 2 classes"),
    "twice in the file": (pairs("0"), ["a", "a"], r"classes\.json must hold different names, got 'a' twice"),
    "no list": (pairs("0"), {"a": 0}, r'classes\.json must hold a list of names, got {"a": 0}'),
    "only hidden": ([("._0.png", P[0])], None, r"no image in .*left out: 1 hidden members \(.*:\._0\.png\)"),
}


def test_what_cannot_be_read_is_named(tmp_path):
    for what, (members, names, message) in REFUSED.items():
        with pytest.raises(ValueError, match=rf"^data: .*{message}[^\n]*$"):
            ImageSource(shards(tmp_path / what, names=names, train=members), "train")
    folder = shards(tmp_path / "json", train=pairs("0"))
    (folder / "classes.json").write_text('["a",')
    with pytest.raises(ValueError, match=r"^data: .*classes\.json cannot be read: "):
        ImageSource(folder, "train")


def test_names_and_numbers_agree_by_a_classes_file(tmp_path):
    source = ImageSource(shards(tmp_path, names=["cat", "dog"], train=pairs("1", "cat", "dog")), "train")
    assert (source.labels, source.classes) == ([1, 0, 1], ["cat", "dog"])


@pytest.mark.parametrize("zipped", [False, True])
def test_a_shard_that_was_cut_never_gives_fewer_images_in_silence(tmp_path, zipped):
    raw = archive(pairs(*"012345"))
    raw = gzip.compress(raw) if zipped else raw
    path = tmp_path / f"train-0.tar{'.gz' * zipped}"
    outcomes = set()
    for size in range(0, len(raw), 11 if zipped else 128):
        path.write_bytes(raw[:size])
        message, source = "", None
        try:
            source = ImageSource(tmp_path, "train")
        except ValueError as error:
            message = str(error)
        if source is None:
            assert path.name in message
            outcomes.add("refused")
        else:
            said = "end marks that are missing" in str(source.samples.account)
            assert said or (len(source) == 6 and not zipped)
            outcomes.add("said" if said else "whole")
    assert outcomes == ({"refused"} if zipped else {"refused", "said", "whole"})


def test_a_second_archive_behind_the_first_is_counted(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(archive(pairs("0")) + archive(pairs("1")))
    assert shown(ImageSource(tmp_path, "train"))[2] == {"archives behind the end mark of another": 1}


def test_files_beside_the_shards_are_counted(tmp_path):
    shards(tmp_path, train=pairs("0"), test=pairs("0"), extra=pairs("0"))
    (tmp_path / "train-1.tar.zst").write_bytes(b"")
    assert shown(ImageSource(tmp_path, "train"))[2] == {"shards of no split": 1, ".tar.zst files": 1}


def test_test_shards_are_never_trained_on(tmp_path):
    shards(tmp_path, test=pairs("0"))
    with pytest.raises(ValueError, match="no train shards"):
        ImageSource(tmp_path, "train")


def test_webdataset_sees_the_same_samples(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="the extra `shards`")
    members = [*pairs("1\n", "0"), ("a/b.JPG", P[4]), ("a/b.CLS", b"2"), ("._x.png", b""), ("c.tiff", P[5])]
    folder = shards(tmp_path, train=members)
    theirs = []
    for sample in webdataset.WebDataset(f"{folder}/train-0.tar", shardshuffle=False):
        content = next((v for k, v in sample.items() if k in ("png", "jpg", "tiff")), None)
        theirs.append((sample["__key__"], content, int(sample.get("cls", b"-1"))))
    source = ImageSource(folder, "train")
    ours = [(source.samples.name(i).split(":")[1], source.samples.content(i), n) for i, n in enumerate(source.labels)]
    assert ours == theirs


# --- folders ------------------------------------------------------------------------------------------------------


def tree(root, **folders):
    for name, files in folders.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_bytes(P[1])
    return root


def test_a_folder_is_what_image_folder_makes_of_it(tmp_path):
    suffixes = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "PNG", "TIF")
    tree(tmp_path / "set", bee=[f"x.{s}" for s in suffixes], ant=["b/1.png", "a.b.png", "b.png"])
    tree(tmp_path / "elsewhere", cow=["1.png"])
    (tmp_path / "set" / "cow").symlink_to(tmp_path / "elsewhere" / "cow")
    (tmp_path / "set" / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    theirs = ImageFolder(str(tmp_path / "set"))
    source = ImageSource(tmp_path / "set", "train")
    assert source.classes == theirs.classes == ["ant", "bee", "cow"]
    ours = [(source.samples.name(i), label) for i, label in enumerate(source.labels)]
    assert sorted(ours) == sorted(theirs.samples)
    assert shown(source)[2] == {}


def test_what_a_folder_leaves_out_is_counted(tmp_path):
    tree(tmp_path / "train", ant=["1.png", "._1.png", "notes.txt", "2.gif"], bee=["1.png"])
    tree(tmp_path / "train", **{".ipynb_checkpoints": ["1.png"], "__MACOSX": ["1.png"], "empty": [], ".": ["0.png"]})
    tree(tmp_path, test=[], owl=["1.png"])
    (tmp_path / "train" / "ant" / "up").symlink_to(tmp_path / "train")
    (tmp_path / "train" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere")
    source = ImageSource(tmp_path, "train")
    assert source.classes == ["ant", "bee"]
    assert (sorted(source.labels), shown(source)[2]) == (
        [-1, 0, 1],
        {
            "hidden files": 1, "hidden folders": 2, ".txt files": 1, ".gif files": 1, "folders without images": 1,
            "entries beside the splits": 1, "links to nothing": 1, "links to a folder that they lie in": 1,
        },
    )  # fmt: skip
    line = source.account()
    assert line.startswith(f"{tmp_path}, train: 3 images, 2 classes, 1 without a label; left out: ")
    assert f"1 .txt files ({tmp_path}/train/ant/notes.txt)" in line


def test_folders_that_look_like_splits_are_no_classes(tmp_path):
    tree(tmp_path, Train=["1.png"], Val=["1.png"])
    with pytest.raises(ValueError, match=r"holds Train, Val; splits must be called train, and test or val"):
        ImageSource(tmp_path, "train")
    tree(tmp_path / "vehicles", bus=["1.png"], car=["1.png"], train=["1.png"], notes=["1.txt"])
    with pytest.raises(ValueError, match=r"train has no folders of classes, and bus, car beside it images too; if"):
        ImageSource(tmp_path / "vehicles", "train")
    tree(tmp_path / "vehicles", test=["1.png"])  # then it is a split
    assert shown(ImageSource(tmp_path / "vehicles", "train"))[2] == {"entries beside the splits": 3}
    tree(tmp_path / "both", ant=["1.png"])
    shards(tmp_path / "both", train=pairs("0"))
    with pytest.raises(ValueError, match=r"holds shards \(train-0\.tar\) and images in folders"):
        ImageSource(tmp_path / "both", "train")


def test_names_from_anywhere_are_printed_without_control_characters(tmp_path, caplog):
    tree(tmp_path, **{"a\x1b[31m": ["1\n.txt", "2.png"], "b": [f"{i}.png" for i in range(99)]})
    (tmp_path / "a\x1b[31m" / "2.png").write_bytes(b"")
    source = images.load_split(str(tmp_path), "train", 32)
    assert source.classes == ["a\\x1b[31m", "b"]
    assert "1\\n.txt" in source.account
    for text in (source.account, *caplog.messages):
        assert text.isprintable()


# --- classes of the training split ----------------------------------------------------------------------------------


def test_class_numbers_follow_the_training_split(tmp_path):
    tree(tmp_path / "f" / "train", ant=["1.png"], bee=["1.png"], cow=["1.png"])
    tree(tmp_path / "f" / "test", cow=["1.png"], bee=["1.png"])
    shards(tmp_path / "names", train=pairs("ant", "bee", "cow"), test=pairs("bee", "cow"))
    shards(tmp_path / "numbers", train=pairs("0", "1", "2"), test=pairs("1\n", "2"))
    for name, classes in (("f", ["ant", "bee", "cow"]), ("names", ["ant", "bee", "cow"]), ("numbers", ["0", "1", "2"])):
        probe, test = images.load_labelled(str(tmp_path / name), 32, AugmentConfig(), seed=0)
        assert (test.labels.tolist(), test.classes, probe.classes) == ([1, 2], classes, classes), name
        assert images.load_split(str(tmp_path / name), "test", 32).labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("train", "test", "names", "unseen"),
    [
        (("ant", "bee"), ("bee", "owl", "owl", "yak"), None, "'owl' and 1 more such, which 3 test images"),
        (("0", "1"), ("1", "5"), None, "'5', which 1 test images"),
        (("0", "2"), ("2", "1"), None, "'1', which 1 test images"),
        (("0", "1"), ("1", "2"), ["a", "b", "c"], "'c', which 1 test images"),
        (("ant", "bee"), ("bee", "0"), None, "'0', which 1 test images"),
    ],
)
def test_a_class_that_training_never_saw_is_refused_or_left_out(tmp_path, train, test, names, unseen):
    data = shards(tmp_path, names=names, train=pairs(*train), test=pairs(*test))
    with pytest.raises(
        ValueError, match=rf"^data: no training image has class {unseen} have, the first .*test-0\.tar:"
    ):
        images.load_labelled(str(data), 32, AugmentConfig(), seed=0)
    _, found = images.load_labelled(str(data), 32, AugmentConfig(), seed=0, leave_out_unseen=True)
    assert [found.classes[n] for n in found.labels] == ["b" if names else test[0]]
    assert f"{len(test) - 1} images of classes that training lacks" in found.account
    assert found.images[:, 0, 0, 0].tolist() == [0]


def test_numbers_that_no_image_has_are_no_classes(tmp_path):
    one = shards(tmp_path / "one", train=pairs("3", "3"), test=pairs("3"))
    with pytest.raises(ValueError, match=r"the probe split of .* has no labels of 2 or more classes"):
        images.load_labelled(str(one), 32, AugmentConfig(), seed=0)
    two = shards(tmp_path / "two", train=pairs("1", "2"), test=pairs("2"))
    probe, _ = images.load_labelled(str(two), 32, AugmentConfig(), seed=0)
    assert (probe.labels.tolist(), probe.classes) == ([1, 2], ["0", "1", "2"])


def test_of_two_folders_to_test_on_the_one_with_classes_is_taken_and_the_other_named(tmp_path):
    tree(tmp_path / "train", ant=["1.png"], bee=["1.png"])
    tree(tmp_path / "val", bee=["1.png"])
    tree(tmp_path, test=["1.png", "2.png"])
    source = ImageSource(tmp_path, "test")
    assert (source.labels, source.samples.name(0)) == ([1], f"{tmp_path}/val/bee/1.png")
    assert f"left out: 1 other folders to test on ({tmp_path}/test)" in source.account()
    tree(tmp_path / "test", ant=["1.png"])
    assert f"left out: 1 other folders to test on ({tmp_path}/val)" in ImageSource(tmp_path, "test").account()


def test_another_normal_form_of_a_name_is_the_same_class(tmp_path):
    composed, apart = "caf\u00e9", "cafe\u0301"
    tree(tmp_path / "train", **{composed: ["1.png"], "tea": ["1.png"]})
    tree(tmp_path / "test", **{apart: ["1.png"]})
    assert ImageSource(tmp_path, "test").labels == [0]


# --- pixels -------------------------------------------------------------------------------------------------------


def test_grey_of_more_bits_keeps_its_shades():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = torch.from_numpy(ramp.copy()).expand(3, -1, -1)
    wide = ramp.astype(np.uint16) * 257
    deep = {
        "PNG": encoded(wide), "TIFF": encoded(wide, "TIFF"),
        "big-endian TIFF": encoded(Image.frombytes("I;16B", (16, 16), wide.astype(">u2").tobytes()), "TIFF"),
        "PGM": b"P5 16 16 65535\n" + wide.astype(">u2").tobytes(),
        "32-bit TIFF": encoded(wide.astype(np.int32), "TIFF"),
        "float TIFF to 1": encoded((ramp / 255).astype(np.float32), "TIFF"),
        "float TIFF to 255": encoded(ramp.astype(np.float32), "TIFF"),
    }  # fmt: skip
    for name, content in deep.items():
        assert torch.equal(to_rgb(content), wanted), name
    for odd in (wide.astype(np.int32) * 2, ramp.astype(np.float32) - 1, np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(ValueError, match=r"has grey values in \[.*\]; need \[0, "):
            to_rgb(encoded(odd, "TIFF"))


def test_orientation_is_an_option(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    values = np.zeros((32, 32, 3), np.uint8)
    values[:16, :16] = 255
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(encoded(values, "JPEG", quality=100, exif=exif))
    asis, upright = (images.load_split(str(tmp_path), "train", 32, upright=u).images[0, 0] > 128 for u in (False, True))
    assert [bool(x) for x in (asis[4, 4], asis[4, 27], upright[4, 4], upright[4, 27])] == [True, False, False, True]


def test_an_image_above_the_pixel_limit_is_damaged_like_any_other(tmp_path, monkeypatch, caplog):
    tree(tmp_path, a=[f"{i:03}.png" for i in range(100)])
    (tmp_path / "a" / "100.png").write_bytes(picture(1, size=(70, 70)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    found = images.load_split(str(tmp_path), "train", 32)
    assert (found.damaged, len(found.labels)) == (1, 101)
    assert "101 images, 1 classes, 1 damaged, each replaced by the next one" in found.account
    assert "exceeds limit" in caplog.text


def test_the_names_of_before_are_still_there():
    from fused_nce.train import sources as before

    assert before.to_rgb is to_rgb
    assert before.FolderSource is before.ShardSource is ImageSource
