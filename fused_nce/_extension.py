"""Load the C++ kernels, ``fused_nce._C``, but only where they fit the Python and the torch that are running.

A C++ extension built for one torch and loaded into another fails with an undefined symbol or, worse, does not fail.
So the build leaves a stamp beside the library, written last, and the stamp is compared before anything is loaded.
``setup.py`` executes this file by its path to write the stamp: it may import neither torch nor the package at the top.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse

PACKAGE = Path(__file__).resolve().parent
STAMP_NAME = "_C.stamp.json"


def running() -> dict[str, Any]:
    """What a build must agree with: each entry that differs would make the library unloadable or unsafe."""
    import torch

    return {
        "fused_nce": runpy.run_path(str(PACKAGE / "_version.py"))["__version__"],  # the ops' schemas
        "torch": str(torch.__version__),  # with its local part: +cpu and +cu130 are two builds
        "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
        "python": sysconfig.get_config_var("SOABI"),
        "machine": platform.machine(),
    }


def mismatch(stamp: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first thing on which a build and the running process disagree, or None where they fit."""
    for name, value in now.items():
        if stamp.get(name) != value:
            return f"built for {name} {stamp.get(name)}, but {name} {value} is running"
    return None


def find_compiler() -> str | None:
    """A C++ compiler that can build and link a program, or None. ``CXX`` decides alone where it is set."""
    source = "#include <vector>\nint main() { return static_cast<int>(std::vector<int>(1).size()) - 1; }\n"
    chosen = os.environ.get("CXX")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source, encoding="utf-8")
        for candidate in [chosen] if chosen else ["c++", "g++", "clang++"]:
            command = [*shlex.split(candidate), str(path), "-o", str(path.with_suffix(""))]
            if shutil.which(command[0]) and subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return candidate
    return None


def rebuild_command() -> str:
    """The one pip command that builds the kernels for the environment that is running.

    It says nothing of build isolation: an isolated build brings a setuptools that is new enough, which not every torch
    does, and ``setup.py`` finds the torch that is installed all the same.
    """
    pip = f"{shlex.quote(sys.executable)} -m pip install --no-deps"
    root = PACKAGE.parent
    if (root / "setup.py").is_file() and not (root / "PKG-INFO").is_file():  # a checkout, used where it lies
        return f"{pip} -e {shlex.quote(str(root))}"
    try:  # where pip took it from, when that was not an index (PEP 610)
        record = json.loads(importlib.metadata.distribution("fused-nce").read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        record = {}
    url = str(record.get("url", ""))
    source = "--no-binary fused-nce fused-nce"
    if url.startswith("file://"):
        source = shlex.quote(unquote(urlparse(url).path))
    elif "vcs_info" in record:
        source = shlex.quote(f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}")
    return f"{pip} --no-cache-dir --force-reinstall {source}"


@functools.cache
def status() -> tuple[ModuleType | None, str]:
    """The kernels, or why there are none.

    Returns:
        ``(module, "")``, or ``(None, reason)``, where the reason is one line ending in the command that mends it.
    """
    return load(PACKAGE / STAMP_NAME)


def load(stamp_path: Path) -> tuple[ModuleType | None, str]:
    """``status`` for a given stamp file, without its cache."""
    command = rebuild_command()
    if not stamp_path.is_file():
        built = list(stamp_path.parent.glob("_C*.so")) + list(stamp_path.parent.glob("_C*.pyd"))
        if built:
            return None, f"{built[0].name} has no stamp, so its build was interrupted; rebuild it: {command}"
        return None, f"installed without C++ kernels; with torch and a C++ compiler (g++) at hand, add them: {command}"
    try:
        stamp = json.loads(stamp_path.read_text(encoding="utf-8"))
        if not isinstance(stamp, dict):
            raise ValueError(f"a JSON {type(stamp).__name__}, not an object")
    except ValueError as error:
        return None, f"the C++ kernels' stamp {stamp_path} cannot be read ({error}); rebuild them: {command}"
    difference = mismatch(stamp, running())
    if difference:
        return None, f"the C++ kernels were {difference}; rebuild them: {command}"
    try:
        return importlib.import_module("fused_nce._C"), ""
    except (ImportError, RuntimeError) as error:  # torch reports a failed registration as a RuntimeError
        first_line = str(error).partition("\n")[0]
        return None, f"the C++ kernels do not load ({first_line}); rebuild them: {command}"
