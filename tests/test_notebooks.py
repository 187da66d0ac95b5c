"""The notebooks run from their first cell to their last, and are kept with what their code as it stands prints."""

import json

import pytest

from bench import notebooks

PATHS = sorted(notebooks.FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    found = notebooks.run(path, tmp_path)
    kept = json.loads(path.read_text(encoding="utf-8"))
    for cell, before in zip(found["cells"], kept["cells"], strict=True):
        printed = [bool(x.get("outputs")) for x in (cell, before)]  # whose digits may differ from machine to machine
        assert (printed[0], cell["metadata"]) == (printed[1], before["metadata"]), "run python -m bench.notebooks"


def test_there_are_four():
    assert len(PATHS) == 4
