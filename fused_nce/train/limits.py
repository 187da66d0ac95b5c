"""What a setting may be: a rule stands beside each field of a settings dataclass, and `check` applies them all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field, fields, is_dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

MAX_SEED = 2**32 - 1  # NumPy's limit


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    need: str
    holds: Callable[[Any], bool]


def number(need: str, holds: Callable[[Any], bool]) -> Rule:
    """A finite number that passes a test; NaN and infinity never do."""
    return Rule(need, lambda v: type(v) in (int, float) and math.isfinite(v) and holds(v))


def optional(rule: Rule) -> Rule:
    return Rule(f"null or {rule.need}", lambda v: v is None or rule.holds(v))


def each(rule: Rule) -> Rule:
    return Rule(f"each {rule.need}", lambda values: all(map(rule.holds, values)))


def span(rule: Rule) -> Rule:
    return Rule(
        f"smallest <= largest, each {rule.need}", lambda v: len(v) == 2 and all(map(rule.holds, v)) and v[0] <= v[1]
    )


def one_of(values: tuple[Any, ...]) -> Rule:
    return Rule(f"one of {', '.join(map(str, values))}", lambda v: v in values)


ABOVE_0 = number("above 0", lambda v: v > 0)
AT_LEAST_0 = number("at least 0", lambda v: v >= 0)
AT_LEAST_1 = number("at least 1", lambda v: v >= 1)
SEED = number(f"in [0, {MAX_SEED}]", lambda v: 0 <= v <= MAX_SEED)
SHARE = number("in [0, 1]", lambda v: 0 <= v <= 1)
POSITIVE_SHARE = number("in (0, 1]", lambda v: 0 < v <= 1)
BELOW_1 = number("in [0, 1)", lambda v: 0 <= v < 1)

JITTER = Rule(
    "brightness, contrast and saturation at least 0, hue in [0, 0.5]",
    lambda v: len(v) == 4 and all(map(AT_LEAST_0.holds, v)) and v[3] <= 0.5,
)
MILESTONES = Rule(
    "rising epochs from 1 on",
    lambda v: all(map(AT_LEAST_1.holds, v)) and all(a < b for a, b in pairwise(v)),
)


def setting(default: Any, rule: Rule) -> Any:
    """A field of a settings dataclass, with the rule that its value must keep."""
    return field(default=default, metadata={"rule": rule})


def rules(settings: Any, prefix: str = "") -> dict[str, Rule]:
    """The rules of a settings dataclass and of the dataclasses in it, by dotted name."""
    found: dict[str, Rule] = {}
    for each_field in fields(settings):
        name, value = prefix + each_field.name, getattr(settings, each_field.name)
        if is_dataclass(value):
            found |= rules(value, f"{name}.")
        elif "rule" in each_field.metadata:
            found[name] = each_field.metadata["rule"]
    return found


def check(settings: Any, prefix: str = "") -> None:
    """Refuse the first setting that breaks its rule, or a choice that is none of those that its type names.

    Args:
        settings: a configuration dataclass, or a part of one.
        prefix: of the settings' names, such as "augment.".

    Raises:
        ValueError: naming the setting, what it must be and what it is.
    """
    hints = get_type_hints(type(settings))
    for each_field in fields(settings):
        name, value = prefix + each_field.name, getattr(settings, each_field.name)
        if is_dataclass(value):
            check(value, f"{name}.")
            continue
        choices = get_args(hints[each_field.name]) if get_origin(hints[each_field.name]) is Literal else None
        rule = one_of(choices) if choices else each_field.metadata.get("rule")
        if rule is not None:
            check_one(name, value, rule)


def check_one(name: str, value: Any, rule: Rule) -> None:
    """Refuse a value that breaks a rule.

    Raises:
        ValueError: naming it, what it must be and what it is.
    """
    if not rule.holds(value):
        raise ValueError(f"{name}: must be {rule.need}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as one types it: `[0.9, 1.5]`, `null`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return "null" if value is None else repr(value) if value == "" else str(value)
