"""Which split a name means: one rule for shards, for globs of them and for folders."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fused_nce.train.data.members import hidden

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TRAIN, TESTS = "train", ("test", "val")  # of both to test on, the first choice first
# Lone words, in any case: of `cifar10train-0`, `trainA` and `imagenetVal`, not of `trainer`, `contest` and `interval`.
START = r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
WORD = re.compile(START + r"(?i:(train)(ing|val)?|(test)(ing)?|(val)(id(ation)?)?)(?:[-_ ]?(?i:set))?(?![a-z])")
ANYWHERE = re.compile(r"(train)(ing)?|(test)(ing)?|(val)(id(ation)?)?", re.IGNORECASE)
SYNONYMS = {"test": ("test", "testing"), "val": ("val", "valid", "validation")}


class Shards(NamedTuple):
    """The shards of a folder or a glob, sorted.

    Attributes:
        train: to train on.
        tests: to test on, a list for each name that there is.
        aside: not trained on: of no split, in a folder; of another, among what a glob matches.
    """

    train: list[Path]
    tests: list[list[Path]]
    aside: list[Path]


def split_of(name: str) -> str | None:
    """Of a name: "train", "test" or "val", by the word that it begins with, or the only one in it; None without."""
    found = [(match.start(), next(filter(None, match.group(1, 3, 5))).lower()) for match in WORD.finditer(name)]
    clear = found and (found[0][0] == 0 or len({split for _, split in found}) == 1)
    return found[0][1] if clear else None


def is_split(name: str) -> bool:
    """Whether it is the name of a split alone: `Train`, `validation`, `test_set`."""
    return WORD.fullmatch(name) is not None


def alike(names: Iterable[str]) -> list[str]:
    """Two names that only such a word tells apart, wherever it stands: of training, and of testing; else none."""
    forms: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for name in names:
        for match in ANYWHERE.finditer(name):
            form = f"{name[: match.start()]}*{name[match.end() :]}"
            forms[match[1] is not None].setdefault(re.sub(r"\d+", "0", form).lower(), name)
    both = next((form for form in forms[True] if form in forms[False]), None)
    return [] if both is None else [forms[True][both], forms[False][both]]


def shards_in(folder: Path) -> list[Path]:
    """Those of all splits, sorted."""
    return sorted(p for p in folder.iterdir() if p.name.endswith(SHARD_SUFFIXES) and not hidden(p.name))


def find_shards(pattern: str) -> Shards:
    """The shards of a folder, or of a glob, in whose last part "train" stands for the split.

    Raises:
        ValueError: for names of a training and of another split that only a part of a word tells apart.
    """
    path = Path(pattern)
    found = _of_folder(shards_in(path)) if path.is_dir() else _of_glob(path)
    if two := alike(p.name for p in found.train if split_of(p.name) is None):
        raise ValueError(
            f"data: {' and '.join(two)} at {pattern} look like two splits; their names must have train, and test or "
            "val, as a word of its own, the first or the only one, such as train-0.tar and test-0.tar"
        )
    return found


def _of_folder(shards: list[Path]) -> Shards:
    beside = any(p.name.startswith(TRAIN) for p in shards)  # then `testclean-0` is as good as `trainclean-0`
    inside = {split: [p for p in shards if split_of(p.name) == split] for split in (TRAIN, *TESTS)}
    begun = {
        split: [p for p in shards if p.name.startswith(split) and (beside or p in inside[split])] for split in inside
    }
    tests = _groups(begun) or _groups(inside)
    train = begun[TRAIN] or (inside[TRAIN] if tests else [])
    if not train:  # all but another split's
        named = {p for split in TESTS for p in inside[split]}
        train = [p for p in shards if p not in named]
    taken = {p for group in (train, *tests) for p in group}
    return Shards(train, tests, [p for p in shards if p not in taken])


def _groups(found: dict[str, list[Path]]) -> list[list[Path]]:
    return [found[split] for split in TESTS if found[split]]


def _of_glob(path: Path) -> Shards:
    own = _matches(path)
    named = _of_folder(own).tests
    others = {p for p in own if split_of(p.name) in TESTS}.union(*named)
    train = [p for p in own if p not in others] or own  # test shards alone: they were asked for
    tests = dict[str, list[Path]]()
    for split, words in SYNONYMS.items():
        found = {p for word in words for name in _instead(path.name, word) for p in _matches(path.with_name(name))}
        tests[split] = sorted(found.difference(train, *tests.values()))
    aside = [] if train is own else sorted(others)
    return Shards(train, _groups(tests) or (named if aside else []), aside)


def _matches(path: Path) -> list[Path]:
    return sorted(p for p in map(Path, glob.glob(str(path))) if p.name.endswith(SHARD_SUFFIXES))


def _instead(base: str, word: str) -> list[str]:
    """The last part of a glob with another word for train, in the same case."""

    def other(match: re.Match[str]) -> str:
        was = match[0]
        return word.upper() if was.isupper() else word.capitalize() if was[0].isupper() else word

    lone = re.compile(START + r"(?i:train(ing|val)?)(?![a-z])")
    found = (lone if lone.search(base) else re.compile(TRAIN)).sub(other, base)
    return [found] if found != base else []
