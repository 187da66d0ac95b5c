"""A run's settings as YAML: `RUN/config.yaml`, dotted keys, and what differs between two runs."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fused_nce.train import files, methods
from fused_nce.train.method import Method

CONFIG_NAME = "config.yaml"
MAX_NAMED = 4  # settings in a warning
log = logging.getLogger("fused_nce")
FIRST = "amdim"  # the only method there was before runs named theirs


def to_dict(config: Method) -> dict[str, Any]:
    """Plain lists, dicts, numbers and strings, for YAML and JSON."""
    return {"method": config.method, **_plain(dataclasses.asdict(config))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def from_dict(values: dict[str, Any]) -> Method:
    """The inverse of `to_dict`; an unknown or missing key, or a value of another type, is an error."""
    method, parser = _parser(values.get("method", FIRST))
    return instantiate(method, parser, parser.parse_object({k: v for k, v in values.items() if k != "method"}))


def _parser(name: str) -> tuple[type[Method], Any]:
    method: Any = methods.get(name)  # a class, which mypy takes for as hashable as its instances
    return method, _parser_of(method)


@functools.cache  # it takes longer to make than to use
def _parser_of(method: type[Method]) -> Any:
    from fused_nce.train import options

    parser = options.parser(prog=method.method)
    parser.fixed = {"method": method.method}
    parser.add_class_arguments(method)
    return parser


def instantiate(method: type[Method], parser: Any, namespace: Any) -> Method:
    """A method's dataclass of a parsed namespace, checked."""
    # jsonargparse 4.49 renamed it and warns about the old name.
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    values = make(namespace)
    names = {f.name for f in dataclasses.fields(method)}
    config = method(**{key: value for key, value in vars(values).items() if key in names})
    config.check()
    return config


def save(config: Method, run_dir: str | Path) -> Path:
    """Write `RUN/config.yaml`, whole or not at all."""
    import yaml

    path = Path(run_dir) / CONFIG_NAME
    files.write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))
    return path


def load(run_dir: str | Path) -> Method:
    """The configuration of a run; a setting that its file lacks has its default, with a warning.

    Raises:
        ValueError: if the folder holds no run, or a file that cannot be used.
    """
    from fused_nce.train import options

    path = Path(run_dir) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"run: {run_dir} holds no {CONFIG_NAME}; it must be the folder of a training run")
    written = options.read(path)
    with files.reading(path):
        method, parser = _parser(written.get("method", FIRST))
    values = parser.parse_file(path)
    with files.reading(path):
        found = instantiate(method, parser, values)
    # fault: config-lacks
    lacking = [f"{k} {v}" for k, v in flatten(to_dict(found)).items() if k not in written and k != "method"]
    if lacking:  # the run of an older version, or a file that has lost lines
        more = f" and {len(lacking) - MAX_NAMED} more" if len(lacking) > MAX_NAMED else ""
        log.warning("%s lacks settings, which have their defaults: %s", path, ", ".join(lacking[:MAX_NAMED]) + more)
    return found


def differences(saved: Method, wanted: Method) -> list[str]:
    """`key: saved -> wanted` for each setting outside `run` that differs."""
    old, new = flatten(to_dict(saved)), flatten(to_dict(wanted))
    return [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k) and k[:4] != "run."]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
