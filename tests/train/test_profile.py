"""`--profile`: a few updates, their parts, and a trace; the updates are those of a run without it."""

import gzip
import json
import re

import torch

from fused_nce import cli
from fused_nce.train.profile import Profile
from tests.train.runs import TINY, tensors, trainer


def test_profile_says_where_an_update_went(tmp_path, capsys):
    """Parts add up to the update, the trace has each of them, and the weights are the run's own."""
    assert cli.main(["train", "amdim", *TINY, "--out", str(tmp_path / "a"), "--profile"]) == 0
    said = capsys.readouterr().out
    rows = {m[1]: (float(m[2]), float(m[3])) for m in re.finditer(r"^(\S+) +([\d.]+) +([\d.]+)%$", said, re.M)}
    parts = ("data", "views", "encoder", "probes", "loss", "backward", "checks", "optimizer", "rest")
    assert all(rows[name][0] > 0 for name in parts), said
    assert abs(sum(rows[name][1] for name in parts) - 100) < 1
    assert rows["backward"][1] > 10
    assert re.search(r"\b(convolution_backward|addmm|mm)\b", said), said
    with gzip.open(tmp_path / "a" / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert names >= {f"update: {name}" for name in parts}

    plain = trainer(tmp_path / "b", f"--max-steps={Profile.count}")
    plain.run()
    ours, theirs = (tensors(tmp_path / run, Profile.count) for run in "ab")
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_profile_of_a_run_that_ends_before(tmp_path, capsys):
    assert cli.main(["train", "amdim", *TINY, "--out", str(tmp_path), "--max-steps=3", "--profile"]) == 0
    assert "profile: no table, it takes 16 updates, got 3" in capsys.readouterr().out
