"""What each setting may be, as a table: one rule a setting, and the few that join two."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
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

# Every number among the settings that the methods share; each method has a table for its own. A test compares the keys.
RULES: Mapping[str, Rule] = {
    "data": Rule("'digits', a folder or shards", bool),
    "seed": number(f"in [0, {MAX_SEED}]", lambda v: 0 <= v <= MAX_SEED),
    "augment.flip_p": SHARE,
    "augment.geometry_p": SHARE,
    "augment.translate_px": AT_LEAST_0,
    "augment.degrees": number("in [0, 180]", lambda v: 0 <= v <= 180),
    "augment.shift": SHARE,
    "augment.zoom": span(ABOVE_0),
    "augment.shear_degrees": number("in [0, 90)", lambda v: 0 <= v < 90),
    "augment.crop_area": span(POSITIVE_SHARE),
    "augment.crop_ratio": span(ABOVE_0),
    "augment.jitter": JITTER,
    "augment.jitter_p": SHARE,
    "augment.gray_p": SHARE,
    "augment.blur_p": SHARE,
    "augment.blur_sigma": span(ABOVE_0),
    "augment.mean": each(SHARE),
    "augment.std": each(ABOVE_0),
    "optim.epochs": AT_LEAST_1,
    "optim.batch_size": number("at least 2 (the negatives are the other images)", lambda v: v >= 2),
    "optim.accumulate": AT_LEAST_1,
    "optim.lr": ABOVE_0,
    "optim.betas": each(BELOW_1),
    "optim.eps": ABOVE_0,
    "optim.momentum": BELOW_1,
    "optim.trust": ABOVE_0,
    "optim.weight_decay": AT_LEAST_0,
    "optim.warmup_updates": AT_LEAST_0,
    "optim.milestones": MILESTONES,
    "optim.gamma": POSITIVE_SHARE,
    "scale.negatives": optional(number("at least 2", lambda v: v >= 2)),
    "run.max_steps": optional(AT_LEAST_1),
    "run.max_minutes": optional(ABOVE_0),
    "run.log_every": AT_LEAST_1,
    "run.save_minutes": AT_LEAST_0,
    "run.keep": number("at least 2 (a damaged checkpoint needs one before it)", lambda v: v >= 2),
    "run.workers": AT_LEAST_0,
    "run.memory_limit_mb": AT_LEAST_1,
}


def check(settings: Any, prefix: str = "", rules: Mapping[str, Rule] = RULES) -> None:
    """Refuse the first setting that breaks its rule, or a choice that is none of those that its type names.

    Args:
        settings: a configuration dataclass, or a part of one.
        prefix: of the settings' names, such as "augment.".
        rules: by full name.

    Raises:
        ValueError: naming the setting, what it must be and what it is.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value, f"{name}.", rules)
            continue
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else None
        rule = one_of(choices) if choices else rules.get(name)
        if rule is not None and not rule.holds(value):
            raise ValueError(f"{name}: must be {rule.need}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value as one types it: `[0.9, 1.5]`, `null`."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return "null" if value is None else repr(value) if value == "" else str(value)
