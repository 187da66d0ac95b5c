"""The upstream packages, as much of each as has the losses, where they are installed (`make test-compat`)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

METRIC = "pytorch_metric_learning"


def load(project: str) -> Any:
    """What users import the losses from.

    Raises:
        ImportError: it is not installed, or lacks what it needs.
    """
    if project == "open_clip":
        return _file("open_clip", "loss.py", name="open_clip.loss")
    if project == "bolts":
        return _bolts()
    if project == "solo":  # 1.0.2, the newest on PyPI
        files = {
            name: _file("solo", "losses", f"{name}.py", name=f"solo_{name}") for name in ("simclr", "moco", "nnclr")
        }
        return types.SimpleNamespace(**files)
    if project == "pml":
        parts = [vars(importlib.import_module(f"{METRIC}.{part}")) for part in ("losses", "utils.distributed")]
        return types.SimpleNamespace(**parts[0] | parts[1])
    return importlib.import_module({"lightly": "lightly.loss"}.get(project, project))


def or_skip(project: str) -> Any:
    """`load`, or a skip with the reason."""
    try:
        return load(project)
    except ImportError as error:
        pytest.skip(f"{project}: {error} (make test-compat installs it)")


def _file(package: str, *parts: str, name: str) -> types.ModuleType:
    """One file of a package as a module: what is around it imports tokenizers, trainers, other versions of torch."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package} is not installed")
    source = importlib.util.spec_from_file_location(name, Path(spec.origin).parent.joinpath(*parts))
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    sys.modules[source.name] = module
    source.loader.exec_module(module)
    return module


def _bolts() -> types.ModuleType:
    """Its losses, without the Lightning that they do not use."""
    stability = types.ModuleType("pl_bolts.utils.stability")
    stability.under_review = lambda: lambda x: x  # type: ignore[attr-defined]
    for name in ("pl_bolts.utils", "pl_bolts.models", "pl_bolts.models.vision"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[stability.__name__] = stability
    _file("pl_bolts", "models", "vision", "pixel_cnn.py", name="pl_bolts.models.vision.pixel_cnn")
    return _file("pl_bolts", "losses", "self_supervised_learning.py", name="pl_bolts.losses.self_supervised_learning")
