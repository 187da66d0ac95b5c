"""A tree of files is listed once; what changed is seen by the times of its folders, and links are looked at anew."""

import json
import logging
import os
import time

import pytest

from fused_nce.train.data import listing
from fused_nce.train.data.folders import FolderSamples
from fused_nce.train.data.members import IMAGE

HOUR_NS = 3600 * 10**9


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fused_nce"


@pytest.fixture
def scanned(tmp_path, monkeypatch):
    """The folders that are read, until pytest takes away its own."""
    real, seen = os.scandir, []

    def scandir(folder):
        seen.append(os.path.basename(folder))
        return real(folder)

    with monkeypatch.context() as patched:
        patched.setattr(listing.os, "scandir", scandir)
        yield seen


@pytest.fixture(autouse=True)
def now(monkeypatch):
    """What time it is: an hour later, so that nothing is new, unless a test says another time."""
    said = [lambda real=time.time_ns: real() + HOUR_NS]
    monkeypatch.setattr(listing.time, "time_ns", lambda: said[0]())
    return said


def plant(root, classes, each):
    """Hard links to a few files."""
    root.mkdir()
    for i in range(classes):
        folder = root / f"n{i:04d}"
        folder.mkdir()
        first = folder / "0.jpg"
        first.write_bytes(b"x")
        for j in range(1, each):
            os.link(first, folder / f"{j}.jpg")


def found(root):
    samples = FolderSamples(root, "train", IMAGE)
    return samples.digest(), len(samples), str(samples.account)


def test_twenty_thousand_files_are_listed_once(tmp_path, cache, scanned, caplog):
    root = tmp_path / "many"
    plant(root, 20, 1000)
    scanned.clear()
    with caplog.at_level(logging.INFO, logger="fused_nce"):
        start = time.process_time()
        first = found(root)
        anew_s = time.process_time() - start
        assert scanned == ["many", *(f"n{i:04d}" for i in range(20))]
        scanned.clear()
        assert found(root) == first
    assert scanned == []
    assert first[1:] == (20_000, "")
    assert anew_s < 20_000 * 100e-6  # 3 µs a file where nothing else runs
    (file,) = cache.iterdir()
    lines = [line for line in caplog.messages if "listed in" in line]
    assert [line.partition(" s, ")[2] for line in lines] == [
        f"{n} of these read anew (the other folders as {file} has them)" for n in (21, 0)
    ]
    assert lines[0].startswith(f"{root}: 20,000 files in 21 folders listed in ")


def test_each_change_is_seen_and_reads_its_folder_alone(tmp_path, cache, scanned, monkeypatch):
    root = tmp_path / "some"
    plant(root, 3, 4)
    (tmp_path / "away.jpg").write_bytes(b"x")
    (root / "n0001/link.jpg").symlink_to(tmp_path / "away.jpg")
    monkeypatch.setattr(listing, "MIN_FILES", 1)

    def added():
        (root / "n0000/new.jpg").write_bytes(b"x")

    def restored():
        """tar and rsync give a folder the time that it has elsewhere."""
        before = os.stat(root / "n0000")
        (root / "n0000/newer.jpg").write_bytes(b"x")
        os.utime(root / "n0000", ns=(before.st_atime_ns, before.st_mtime_ns))

    def gone():
        (root / "n0001/2.jpg").unlink()

    def renamed():
        (root / "n0002/1.jpg").rename(root / "n0002/9.jpg")

    def folder():
        (root / "n0000/below").mkdir()
        (root / "n0000/below/0.jpg").write_bytes(b"x")

    def link():
        (tmp_path / "away.jpg").unlink()

    def nothing():
        pass

    before = found(root)
    for change, read in (
        (added, ["n0000"]), (restored, ["n0000"]), (gone, ["n0001"]), (renamed, ["n0002"]),
        (folder, ["n0000", "below"]), (link, []), (nothing, []),
    ):  # fmt: skip
        change()
        scanned.clear()
        after = found(root)
        assert scanned == read, change.__name__
        assert (after == before) == (change is nothing)
        monkeypatch.setenv("FUSED_NCE_LISTINGS", "0")
        assert found(root) == after
        monkeypatch.delenv("FUSED_NCE_LISTINGS")
        before = after


def test_what_changed_just_now_small_trees_and_damaged_files_are_read_anew(tmp_path, cache, scanned, monkeypatch, now):
    root = tmp_path / "some"
    plant(root, 2, 3)
    whole = found(root)
    assert not cache.exists()  # small
    monkeypatch.setattr(listing, "MIN_FILES", 1)
    time.sleep(0.05)
    os.utime(root / "n0001")  # within a tick of now, so that another change could have the same time
    monkeypatch.setattr(listing, "TOO_NEW_NS", 20_000_000)
    now[0] = lambda: os.stat(root / "n0001").st_ctime_ns + 1
    for read in (3, 1, 1):
        scanned.clear()
        assert found(root) == whole
        assert len(scanned) == read
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    for broken in (b"", b"[]", b"\xff", json.dumps({**kept, "": {"place": 1}}).encode(), b'{"": {"files": [1]}}'):
        file.write_bytes(broken)
        scanned.clear()
        assert found(root) == whole
        assert len(scanned) == 3
    monkeypatch.chdir(tmp_path)
    scanned.clear()
    assert found(root.relative_to(tmp_path))[0] == whole[0]  # the same tree by another name
    assert scanned == ["n0001"]


def test_what_no_run_has_used_for_long_is_forgotten(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(listing, "MIN_FILES", 1)
    long_ago = time.time() - 100 * 86_400
    cache.mkdir(parents=True)
    for name in ("listing-old.json", "listing-new.json", "other.json"):
        (cache / name).touch()
        if "new" not in name:
            os.utime(cache / name, (long_ago, long_ago))
    plant(tmp_path / "a", 2, 2)
    found(tmp_path / "a")
    (ours,) = {path.name for path in cache.iterdir()} - {"listing-new.json", "other.json"}
    os.utime(cache / ours, (long_ago, long_ago))
    found(tmp_path / "a")  # as it was, and used
    plant(tmp_path / "b", 2, 2)
    found(tmp_path / "b")
    left = {path.name for path in cache.iterdir()}
    assert left > {ours, "listing-new.json", "other.json"}
    assert len(left) == 4
