"""The notebooks run from their first cell to their last, and are kept with output where a cell prints."""

import json

import pytest

from bench import notebooks

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    found = notebooks.run(path, tmp_path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    for cell, before in zip(found["cells"], kept["cells"], strict=True):
        assert bool(cell.get("outputs")) == bool(before.get("outputs")), (
            "python -m bench.notebooks keeps what it prints"
        )


def test_there_are_four():
    assert len(PATHS) == 4
