"""A run that version 0.1.0 saved, in `saved-run.tar.gz` (four updates), goes on and is evaluated by today's code."""

import json
import math
import tarfile
from pathlib import Path

import pytest

from fused_nce import cli

SAVED = Path(__file__).parent / "saved-run.tar.gz"
# What the version that saved it logged when it went on, on one thread. Another CPU's GEMM rounds in another order.
LOGGED = {6: 22.9049072265625, 8: 22.89664936065674}
STEPS_BEFORE = {2: 23.083882331848145, 4: 22.946494102478027}


@pytest.fixture
def saved(tmp_path):
    with tarfile.open(SAVED) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_an_older_run_goes_on_as_its_own_version_would(saved):
    assert cli.main(["train", "amdim", "--resume", str(saved), "--max-steps", "8"]) == 0
    lines = {line["step"]: line for line in map(json.loads, (saved / "log.jsonl").read_text().splitlines())}
    assert set(lines) == {*STEPS_BEFORE, *LOGGED}
    assert all(lines[step]["loss"] == loss for step, loss in STEPS_BEFORE.items())
    for step, loss in LOGGED.items():
        assert math.isclose(lines[step]["loss"], loss, rel_tol=1e-5)


def test_an_older_run_is_evaluated(saved):
    options = ["--protocols", "knn", "--baselines", "false", "--cost", "false"]
    assert cli.main(["eval", str(saved), *options]) == 0
    found = json.loads((saved / "eval.json").read_text())
    assert {(row["encoder"], row["probe"]) for row in found["probes"]} == {("trained", "knn")}
    assert all(20 < row["accuracy_pct"] <= 100 for row in found["probes"])  # chance is 10
