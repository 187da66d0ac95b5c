"""What `make test-upstream` makes of a suite: fetched at its commit, run twice, compared with the list both ways."""

from __future__ import annotations

import subprocess

import pytest

from tests.compat import suites

SUITE = """import os

def test_same():
    assert True

def test_alone():
    assert os.environ["UPSTREAM_ALONE"]

def test_ours():
    assert not os.environ["UPSTREAM_ALONE"]
"""


def test_differences_are_listed_both_ways():
    alone, ours = {"a.x": True, "a.y": True, "a.z": False}, {"a.x": True, "a.y": False, "a.z": True}
    assert suites.differences(alone, ours, {"a.y": "why"}) == []
    assert suites.differences(alone, {"a.x": True}, {}) == ["a.y: passes alone only"]
    assert suites.differences(alone, alone, {"a.y": "why"}) == ["a.y: is listed, and does not differ"]
    assert suites.differences({"a.x": False}, {}, {}) == ["no test passes alone"]
    assert set(suites.DIFFERENT) <= set(suites.SUITES)


@pytest.mark.nightly
def test_a_suite_is_fetched_run_and_compared(tmp_path, monkeypatch, capsys):
    source = tmp_path / "owner" / "name"
    (source / "tests").mkdir(parents=True)
    (source / "tests" / "test_it.py").write_text(SUITE)
    me = ["-c", "user.name=x", "-c", "user.email=x@y.z"]
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "x"], ["config", "uploadpack.allowFilter", "1"]):
        subprocess.run(["git", *words], cwd=source, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, check=True, capture_output=True, text=True).stdout
    monkeypatch.setenv("SUITES_FROM", f"file://{tmp_path}")
    monkeypatch.setitem(suites.SUITES, "it", suites.Suite("owner/name", head.strip(), "tests/test_{}.py", ("it",)))
    places = (str(tmp_path), str(tmp_path / "work"))
    assert suites.main(*places, "it") == 1
    assert "test_alone: passes alone only" in capsys.readouterr().out
    monkeypatch.setitem(suites.DIFFERENT, "it", {"test_alone": "because"})
    assert suites.main(*places, "it") == 0
    assert "it: of 3 tests 2 pass alone, 2 with ours" in capsys.readouterr().out
