"""`python -m bench.notebooks [NAME…]`: run the notebooks of `notebooks/` and keep what their cells print.

A notebook's cells run in one namespace, in an empty folder; no Jupyter is needed to run them, and none to read them.
Each cell keeps a digest of the code that ran up to it: what it shows is of that code and no other.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.host import ROOT

FOLDER = ROOT / "notebooks"


def run(path: Path, folder: Path) -> dict[str, Any]:
    """Run one in a folder; the notebook with what its cells printed. What a cell raises is raised."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": path.stem}
    before, code = Path.cwd(), hashlib.sha256()
    os.chdir(folder)
    try:
        for number, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
            code.update("".join(cell["source"]).encode())
            cell["metadata"]["ran"] = code.hexdigest()[:16]
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"{path.name}, cell {number + 1}", "exec"), names)
            text = printed.getvalue()
            cell["outputs"] = (
                [{"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}] if text else []
            )
            cell["execution_count"] = number + 1
    finally:
        os.chdir(before)
    return notebook


def main(argv: Sequence[str]) -> int:
    """Run and write."""
    for path in [FOLDER / f"{name}.ipynb" for name in argv] or sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, Path(folder))
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"ran {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
