"""The command lines' parser: jsonargparse, with every error in one line, and files of settings as options.

A file means what the command line does: each scalar is the text that follows an option, so that YAML's own ideas of it
(010 is 8, 2024_01 is 202401, 1:30 is 90, on is true) play no part. What stands on the command line wins.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_loader

from fused_nce.train.files import reading

UNKNOWN = re.compile(r"unrecognized arguments: (\S+)")
BAD_VALUE = re.compile(r'Parser key "([^"]+)":?\s*(.*)', re.S)
# jsonargparse's words for a value of the wrong kind, and ours.
WORDS = (
    (re.compile(r"Expected an? <class '(\w+)'>\. Got value: (.*)", re.S), "must be {}, got {}"),
    (re.compile(r"Expected an? typing\.Literal\[(.*?)\]\. Got value: (.*)", re.S), "must be one of {}, got {}"),
    (
        re.compile(r".*Union.*d a <class '(\w+)'>.*d an? typing\.Literal\[(.*?)\].*value: (.*)", re.S),
        "must be {} or {}, got {}",
    ),
)
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}  # as one says them
# What is no option, as a pattern, of which a hint can say more.
DEVICE, BARE = r"--(\w+\.)*(device|gpu|cuda|cpu)s?", r"(?!-).*"
NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
PLAIN = (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"[tT]rue|TRUE|[fF]alse|FALSE"),
    ("int", r"[-+]?[0-9]+"),
    ("float", NUMBER),
)


class Loader(yaml.SafeLoader):
    """What a text stands for by YAML 1.2's rules, whose whole numbers are decimal and whose dates are text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  (its own, instead of YAML 1.1's)


for tag, pattern in PLAIN:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), None)
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
set_loader("fused-nce", lambda text: yaml.load(text, Loader=Loader), exceptions=(yaml.YAMLError,))


class Parser(ArgumentParser):
    """Raises `ValueError` instead of printing forty lines of usage and leaving."""

    fixed: dict[str, str] = {}  # noqa: RUF012  what a file may say too, if it says the same
    hints: dict[str, str] = {  # noqa: RUF012  for what is no option
        DEVICE: "this command runs on the CPU",
        BARE: "every option begins with --",
    }

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, parser_mode="fused-nce", **options)

    def parse_args(self, args: Any = None, *rest: Any, **named: Any) -> Any:
        """A list may be written as `a,b` or `a`, not only as `[a,b]`; `--config FILE` stands for its settings."""
        return super().parse_args(None if args is None else self._checked(self._opened(args)), *rest, **named)

    def parse_file(self, path: str | Path) -> Any:
        """The settings of a file alone, with defaults for the rest.

        Raises:
            ValueError: naming the file.
        """
        with reading(path):
            return super().parse_args(self._checked(self._words(read(path))))

    def _opened(self, args: Sequence[str]) -> list[str]:
        """The words with those of the files that they name in front."""
        files, words, given = [], [], iter(args)
        for word in given:
            name, equals, value = word.partition("=")
            if name != "--config":
                words.append(word)
            elif equals or (value := next(given, "")):
                try:
                    self.parse_file(value)  # for errors that name it
                except ValueError as error:
                    raise ValueError(f"config: {error}") from error
                files += self._words(read(value))
            else:
                self.error("argument --config: expected one argument")
        return files + words

    def _words(self, values: dict[str, str]) -> list[str]:
        words = []
        for key, text in values.items():
            if key in self.fixed:
                if text != self.fixed[key]:
                    raise ValueError(f"{key}: must be {self.fixed[key]} here, got {text}")
            elif any(name.startswith(f"--{key}.") for name in self._option_string_actions):
                if text:  # an empty section changes nothing
                    raise ValueError(f"{key}: must be a section, got {text}")
            elif f"--{key}" in self._option_string_actions:
                words.append(f"--{key}={text}")
            else:
                self.error(f"unrecognized arguments: --{key}")
        return words

    def _checked(self, args: Sequence[str]) -> list[str]:
        found: list[str] = []
        option, hint = "", None  # that await their value
        for word in args:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                action = self._option_string_actions.get(name)
                option, hint = (
                    name[2:],
                    getattr(action, "_typehint", None) if getattr(action, "nargs", 0) is None else None,
                )
                if equals and hint is not None:
                    word, hint = f"{name}={_value(option, value, hint)}", None
            elif hint is not None:
                word, hint = _value(option, word, hint), None
            found.append(word)
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse for whatever it refuses."""
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        said = one_line(str(message), names, self.hints)
        raise ValueError(f"{said}; usage: {self.usage}" if "are required" in said else said) from ex


def read(path: str | Path) -> dict[str, str]:
    """The settings of a YAML file by dotted name, each as one types it on the command line.

    Raises:
        ValueError: naming the file: it cannot be read, holds no settings, or one of them twice.
    """
    found: dict[str, str] = {}
    with reading(path):
        try:
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"is no YAML: {_where(error)}") from error
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"must hold settings, as `seed: 1`, got {_typed(root) if root else 'nothing'}")
        _collect(root, "", found, {})
    return found


def _where(error: Any) -> str:
    """Place and cause of what YAML's parser cannot read."""
    mark, causes = getattr(error, "problem_mark", None), [getattr(error, name, None) for name in ("context", "problem")]
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + (", ".join(filter(None, causes)) or str(error))


def _collect(node: Any, prefix: str, found: dict[str, str], lines: dict[str, int]) -> None:
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{name} stands twice, in lines {lines[name]} and {line}")
        lines[name] = line
        if isinstance(value, yaml.MappingNode):
            _collect(value, f"{name}.", found, lines)
        else:
            found[name] = _typed(value)


def _typed(node: Any, *, within: bool = False) -> str:
    """A value as one types it; within a list, text is in quotes."""
    if isinstance(node, yaml.SequenceNode):
        return f"[{', '.join(_typed(item, within=True) for item in node.value)}]"
    text: str = node.value
    return json.dumps(text) if within and node.tag.endswith(":str") else text


def _value(name: str, text: str, hint: Any) -> str:
    """The text of an option, in brackets where a list is wanted.

    Raises:
        ValueError: a number or a switch is wanted and it is none as `PLAIN` has them. jsonargparse reads those by YAML
            1.1's rules, for which 1:30 is 90, 1_0 is 10 and `on` is true.
    """
    text = _bracket(text) if _is_list(hint) else text
    kinds = _kinds(hint)
    if kinds and not kinds.isdisjoint(("int", "float", "bool")):
        for kind, value in _scalars(text):  # fault: yaml-1-1
            if not kinds.intersection((kind, value, *(["float"] if kind == "int" else []))):
                wanted = [KINDS.get(x, x) for x in sorted(sorted(kinds), key="null".__eq__)]
                raise ValueError(f"{name}: must be {' or '.join(wanted)}, got {value}")
    return text


def _kinds(hint: Any) -> set[str]:
    """The plain kinds of scalars that a type allows, and the words; empty if it allows others too."""
    if get_origin(hint) is Literal:
        return set(map(str, get_args(hint)))
    parts = [part for part in get_args(hint) if part is not ...]
    if not parts:
        return {{int: "int", float: "float", bool: "bool", types.NoneType: "null"}.get(hint, "")} - {""}
    found = [_kinds(part) for part in parts]
    return set().union(*found) if all(found) else set()


def _scalars(text: str) -> Iterator[tuple[str, str]]:
    """The kind and the text of each scalar of a value."""
    try:
        nodes = [yaml.compose(text, Loader=Loader)]
    except yaml.YAMLError:
        return  # refused by jsonargparse
    while nodes:
        node = nodes.pop(0)
        if isinstance(node, yaml.SequenceNode):
            nodes = [*node.value, *nodes]
        elif isinstance(node, yaml.ScalarNode):
            yield node.tag.rpartition(":")[2], node.value


def _is_list(hint: Any) -> bool:
    """Whether a value of this type is a sequence: `Sequence[str]`, `tuple[float, ...]`, `list[int] | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_list(part) for part in get_args(hint))
    return get_origin(hint) in (list, tuple, Sequence)


def _bracket(value: str) -> str:
    return value if value[:1] in ("[", "(", "") or value == "null" else f"[{value}]"


def one_line(message: str, options: list[str], hints: dict[str, str]) -> str:
    """jsonargparse's message as the option, what it needs and what it got, or the nearest option to a misspelt one."""
    if found := UNKNOWN.search(message):
        name = found[1].partition("=")[0]
        for pattern, hint in hints.items():
            if re.fullmatch(pattern, name):
                return f"{name}: no such option; {hint.format(name)}"
        near = difflib.get_close_matches(name, options, 1) or difflib.get_close_matches(
            name.lstrip("-"), [option.rpartition(".")[2].lstrip("-") for option in options], 1
        )
        full = next((option for option in options if near and option.endswith(near[0])), None)
        return f"{name}: no such option; " + (f"did you mean {full}?" if full else "--help lists them")
    if found := BAD_VALUE.search(message):
        key, rest = found[1], found[2]
        matches = ((words, match.groups()) for pattern, words in WORDS if (match := pattern.match(rest)))
        ours = (words.format(*(KINDS.get(x, x) for x in needed), value) for words, (*needed, value) in matches)
        return f"{key}: {' '.join(next(ours, rest).split())}"
    return " ".join(message.split())


def parser(**options: Any) -> Parser:
    """A parser whose usage is one line: the full one names fifty options that `--help` describes anyway."""
    return Parser(usage=f"{options['prog']} [options]", **options)
