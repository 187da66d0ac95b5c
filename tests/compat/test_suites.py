"""What `make test-upstream` makes of a suite: fetched at its commit, run twice, compared with the list both ways."""

from __future__ import annotations

import subprocess

import pytest

from tests.compat import in_place, suites

SUITE = """import os
import lightly
from lightly.loss import NTXentLoss

def test_same():
    assert NTXentLoss().temperature == lightly.DCLLoss().temperature + 0.4

def test_alone():
    assert os.environ["UPSTREAM_ALONE"]

def test_ours():
    assert not os.environ["UPSTREAM_ALONE"]
"""

PACKAGE = """class NTXentLoss:
    temperature = 0.5

class DCLLoss:
    temperature = 0.1

DCLWLoss = DCLLoss
"""
LATE = """def __getattr__(name):
    from . import loss
    return getattr(loss, name)
"""


def test_what_is_called_is_noted(tmp_path, monkeypatch):
    class Kind:
        def __init__(self, number: int = 1) -> None:
            self.number = number

    class Heir(Kind):
        pass

    def function(number: int) -> int:
        return number + 1

    monkeypatch.setattr(in_place, "CALLED", tmp_path / "called")
    noted = in_place._noted(function)
    assert in_place._noted(Kind) is in_place._noted(Kind) is Kind
    assert Heir(3).number == 3
    assert not (tmp_path / "called").exists()
    assert (Kind(2).number, Kind().number, noted(4)) == (2, 1, 5)
    assert (tmp_path / "called").read_text().split() == ["Kind", "Kind", "function"]


def test_differences_are_listed_both_ways():
    alone, ours = {"a.x": True, "a.y": True, "a.z": False}, {"a.x": True, "a.y": False, "a.z": True}
    assert suites.differences(alone, ours, {"a.y": "why"}) == []
    assert suites.differences(alone, {"a.x": True}, {}) == ["a.y: passes alone only"]
    assert suites.differences(alone, alone, {"a.y": "why"}) == ["a.y: is listed, and does not differ"]
    assert suites.differences({"a.x": False}, {}, {}) == ["no test passes alone"]
    for test in ("a.T.test_loss", "a.T.test_loss[x.y-1]"):
        assert [suites.is_named(test, x) for x in ("test_loss", "T.test_loss", "test", "loss", "est_loss")] == [
            *(True, True, False, False, False)
        ]
    assert not suites.is_named("a.T.test_loss_of_more", "test_loss")
    assert suites.not_in_place({"A", "B"}, {"A", "C"}) == ["B: called alone, and never ours in its place"]
    assert suites.not_in_place({"A"}, {"A"}) == []
    assert suites.not_in_place((), ()) == ["calls nothing that ours replaces"]
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
    package = tmp_path / "packages" / "lightly"
    package.mkdir(parents=True)
    (package / "loss.py").write_text(PACKAGE)
    (package / "__init__.py").write_text("from .loss import DCLLoss")  # which nothing replaces
    places = (str(package.parent), str(tmp_path / "work"))
    assert suites.main(*places, "it") == 1
    told = capsys.readouterr().out
    assert "test_alone: passes alone only" in told
    assert "DCLLoss: called alone, and never ours in its place" in told
    monkeypatch.setitem(suites.DIFFERENT, "it", {"test_alone": "because"})
    assert suites.main(*places, "it") == 1
    (package / "__init__.py").write_text(LATE)
    capsys.readouterr()
    assert suites.main(*places, "it") == 0
    assert "it: of 3 tests 2 pass alone, 2 with ours: DCLLoss, NTXentLoss" in capsys.readouterr().out
