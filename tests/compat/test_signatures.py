"""Adapters have upstream's words, and the migration page is a diff of two lines a project whose names are there."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from tests.compat import packages
from tests.compat.signatures import UPSTREAM, of, parameters

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)\n```", PAGE, re.S)
OURS, KEYWORD = "fused_nce.compat", inspect.Parameter.KEYWORD_ONLY


def adapter(name):
    project, _, thing = name.partition(".")
    return getattr(importlib.import_module(f"{OURS}.{project}"), thing)


@pytest.mark.parametrize("name", UPSTREAM)
def test_ours_begins_with_upstreams_words(name):
    """Same names, order and defaults; what is ours alone comes after, and by keyword unless upstream had it once."""
    theirs = UPSTREAM[name]
    for text, call in ((theirs.words, False), (theirs.call, True)):
        if text is None:
            continue
        wanted, found = parameters(text), of(adapter(name), call)
        named = [x[::2] for x in wanted if x[0] != "**"]
        assert [x[::2] for x in found[: len(named)]] == named
        assert "**" in [x[0] for x in wanted] or "**" not in [x[0] for x in found]
        extra = {x[0] for x in found[len(named) :] if x[1] is not KEYWORD and x[0] != "**"}
        assert extra <= {"chunk_size"}  # of open_clip's main


@pytest.mark.parametrize("name", [name for name, x in UPSTREAM.items() if x.on_pypi])
def test_these_are_upstreams_words(name):
    """Of the packages that `make test-compat` installs."""
    theirs = UPSTREAM[name]
    project, _, thing_name = name.partition(".")
    thing = getattr(packages.or_skip(project), thing_name)
    assert [x[::2] for x in of(thing, False)] == [x[::2] for x in parameters(theirs.words)]
    if theirs.call is not None:
        assert [x[::2] for x in of(thing, True)] == [x[::2] for x in parameters(theirs.call)]


def test_the_migration_page_is_two_lines_a_project():
    """Each takes names from upstream's module and gives the same from ours; all projects of the table are there."""
    shown = set()
    for diff in DIFFS:
        before, after = diff.splitlines()
        if "builder" in before:
            assert (before, after) == ("-    model = moco.builder.MoCo(", "+    model = fused_nce.compat.moco.MoCo(")
            shown.add("moco.MoCo")
            continue
        theirs = re.fullmatch(r"-from ([\w.]+) import ([\w, ]+)", before)
        ours = re.fullmatch(rf"\+from {OURS}\.(\w+) import ([\w, ]+)", after)
        assert theirs is not None
        assert ours is not None
        assert theirs[2] == ours[2]
        for thing in ours[2].split(", "):
            name = f"{ours[1]}.{thing}"
            adapter(name)
            if name in UPSTREAM:
                assert UPSTREAM[name].module == theirs[1]
            shown.add(name)
    assert {name.partition(".")[0] for name in UPSTREAM} == {name.partition(".")[0] for name in shown}
    missing = {name for name in UPSTREAM if name not in shown and name.partition(".")[2] not in PAGE}
    assert not missing
