"""The command lines' parser: jsonargparse, with every error in one line."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Sequence
from typing import Any, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser

UNKNOWN = re.compile(r"unrecognized arguments: (\S+)")
BAD_VALUE = re.compile(r'Parser key "([^"]+)":?\s*(.*)', re.S)
# jsonargparse's words for a value of the wrong kind, and ours.
WORDS = (
    (re.compile(r"Expected an? <class '(\w+)'>\. Got value: (.*)", re.S), "must be {}, got {}"),
    (re.compile(r"Expected an? typing\.Literal\[(.*?)\]\. Got value: (.*)", re.S), "must be one of {}, got {}"),
    (re.compile(r".*Union.*<class '(\w+)'>, <class 'NoneType'>.*value: (.*)", re.S), "must be {} or null, got {}"),
)


class Parser(ArgumentParser):
    """Raises `ValueError` instead of printing forty lines of usage and leaving."""

    def parse_args(self, args: Any = None, *rest: Any, **named: Any) -> Any:
        """A list may be written as `a,b` or `a`, not only as `[a,b]`."""
        return super().parse_args(None if args is None else self._bracketed(args), *rest, **named)

    def _bracketed(self, args: Sequence[str]) -> list[str]:
        found, awaited = [], False
        for word in args:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                action = self._option_string_actions.get(name)
                awaited = action is not None and action.nargs is None and _is_list(getattr(action, "_typehint", None))
                word = f"{name}={_bracket(value)}" if awaited and equals else word
                awaited = awaited and not equals
            elif awaited:
                word, awaited = _bracket(word), False
            found.append(word)
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse for whatever it refuses."""
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        raise ValueError(one_line(str(message), names)) from ex


def _is_list(hint: Any) -> bool:
    """Whether a value of this type is a sequence: `Sequence[str]`, `tuple[float, ...]`, `list[int] | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_list(part) for part in get_args(hint))
    return get_origin(hint) in (list, tuple, Sequence)


def _bracket(value: str) -> str:
    return value if value[:1] in ("[", "(", "") or value == "null" else f"[{value}]"


def one_line(message: str, options: list[str]) -> str:
    """jsonargparse's message as the option, what it needs and what it got, or the nearest option to a misspelt one."""
    if found := UNKNOWN.search(message):
        name = found[1].partition("=")[0]
        near = difflib.get_close_matches(name, options, 1) or difflib.get_close_matches(
            name.lstrip("-"), [option.rpartition(".")[2].lstrip("-") for option in options], 1
        )
        full = next((option for option in options if near and option.endswith(near[0])), None)
        return f"{name}: no such option; " + (f"did you mean {full}?" if full else "--help lists them")
    if found := BAD_VALUE.search(message):
        key, rest = found[1], found[2]
        ours = (words.format(*value.groups()) for pattern, words in WORDS if (value := pattern.match(rest)))
        return f"{key}: {' '.join(next(ours, rest).split())}"
    return " ".join(message.split())


def parser(**options: Any) -> Parser:
    """A parser whose usage is one line: the full one names fifty options that `--help` describes anyway."""
    return Parser(usage=f"{options['prog']} [options]", **options)
