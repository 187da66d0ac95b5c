"""The upstream packages, as much of each as has the losses, where they are installed (`make test-compat`)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

METRIC = "pytorch_metric_learning"
BARE = {  # what users import, of packages whose own beginnings import trainers, servers and other versions of libraries
    "FlagEmbedding": (
        "abc.finetune.embedder.AbsModeling",
        *(f"finetune.embedder.{x}.modeling" for x in ("encoder_only.base", "decoder_only.base", "decoder_only.icl")),
    ),
    "swift": ("loss.base", "loss.embedding"),
}


@functools.cache
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
    if project in BARE:
        return _bare(project)
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


def _bare(project: str) -> types.SimpleNamespace:
    """Some files of a package, whose folders are packages that hold these alone."""
    spec = importlib.util.find_spec(project)
    if spec is None or spec.origin is None:
        raise ImportError(f"{project} is not installed")
    found: dict[str, Any] = {}
    for name in BARE[project]:
        folders = name.split(".")[:-1]
        for i in range(len(folders) + 1):
            inner = ".".join((project, *folders[:i]))
            if inner not in sys.modules:
                sys.modules[inner] = types.ModuleType(inner)
                sys.modules[inner].__path__ = [str(Path(spec.origin).parent.joinpath(*folders[:i]))]
        if project == "swift" and "swift.utils" not in sys.modules:  # what it asks them: nothing is split, one process
            parallel, utils = types.ModuleType("swift.sequence_parallel"), types.ModuleType("swift.utils")
            parallel.sequence_parallel = types.SimpleNamespace(dp_group=None)  # type: ignore[attr-defined]
            utils.get_dist_setting = lambda: (0, 0, 1, 1)  # type: ignore[attr-defined]
            sys.modules |= {x.__name__: x for x in (parallel, utils)}
        inside = vars(importlib.import_module(f"{project}.{name}"))
        found |= inside
        vars(sys.modules[inner]).update({key: x for key, x in inside.items() if key[0] != "_"})
    return types.SimpleNamespace(**found)


def _bolts() -> types.ModuleType:
    """Its losses, without the Lightning that they do not use."""
    stability = types.ModuleType("pl_bolts.utils.stability")
    stability.under_review = lambda: lambda x: x  # type: ignore[attr-defined]
    for name in ("pl_bolts.utils", "pl_bolts.models", "pl_bolts.models.vision"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[stability.__name__] = stability
    _file("pl_bolts", "models", "vision", "pixel_cnn.py", name="pl_bolts.models.vision.pixel_cnn")
    return _file("pl_bolts", "losses", "self_supervised_learning.py", name="pl_bolts.losses.self_supervised_learning")
