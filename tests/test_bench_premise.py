"""The study of the number of negatives: its runs differ in nothing else, and go on where they stopped."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bench import premise
from fused_nce import measure
from fused_nce.train import command

RUNS = [premise.Run(name, count, 3, 2) for name, arm in premise.ARMS.items() for count in arm.counts]
RUNS += [premise.Run(name, count, 3, 8, 8192) for name in ("amdim", "dim-nce", "dim-jsd") for count in premise.MORE]


@pytest.mark.parametrize("run", RUNS)
def test_an_update_has_the_same_images_whatever_a_loss_compares(run, tmp_path):
    arguments = premise.command(run, "digits", tmp_path / "run")
    settings = command.parse(arguments[1], arguments[2:])[0]
    settings.check()
    compared = settings.local_batch(1)
    assert compared * settings.optim.accumulate == run.images
    assert settings.seed == 3
    batches = premise.TRAINING // compared
    assert settings.run.max_steps == {512: 194, 8192: 48}[run.images]
    assert batches // settings.optim.accumulate * run.epochs >= settings.run.max_steps
    arm = premise.ARMS[run.name]
    assert (settings.model.queue_size if arm.queue else compared) == run.negatives
    assert arm.tap in settings.taps


def test_runs_that_are_done_are_kept_and_a_started_one_goes_on(tmp_path, monkeypatch):
    told: list[list[str]] = []
    threads: set[str] = set()
    real = subprocess.run

    def run(arguments, **options):
        if "fused_nce.cli" not in arguments:  # git
            return real(arguments, **options)
        told.append(arguments[3:])
        threads.add(options["env"]["OMP_NUM_THREADS"])
        if told[-1][0] == "eval":
            probes = [
                {"probe": probe, "labels": "all", "accuracy_pct": 50.0 + i} for i, probe in enumerate(premise.PROBES)
            ]
            made = {"processor": "A CPU", "torch": "2.14.1", "commit": f"{len(told)}234567890", "cores": 2}
            found = {"probes": probes, "training": {"steps": 194, "minutes": 1.234}, "environment": made}
            Path(arguments[4]).mkdir(parents=True, exist_ok=True)
            Path(arguments[4], "eval.json").write_text(json.dumps(found))
        return None

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(measure, "cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "moco-16-1-epochs-2/checkpoints/step_00000004").mkdir(parents=True)
    out = tmp_path / "premise.json"
    options = ["--data=x", f"--runs={tmp_path}", f"--out={out}", "--arms", "moco", "--negatives", "16", "--seeds=2"]
    assert premise.main(options) == 0
    assert [words[0] for words in told] == ["train", "eval"] * 2
    assert told[0][1] == "moco"
    assert told[2][1:] == ["moco", "--resume", str(tmp_path / "moco-16-1-epochs-2")]
    first = out.read_text()
    assert premise.main([*options, f"--runs={tmp_path / 'elsewhere'}"]) == 0  # the record is enough
    assert len(told) == 4
    assert out.read_text() == first
    others = json.loads(first)["runs"]
    others[0] |= {"arm": "amdim", "negatives": 8192, "images": 8192, "updates": 48}
    out.write_text(json.dumps({"runs": others}))  # what is not asked for stays
    assert premise.main(options) == 0  # one is missing, and its run is there
    assert len(told) == 4
    assert "| MoCo, queue | 194 × 512 | 16 | 50.0 ± 0.0 | 51.0 ± 0.0 | 2 |" in premise.block(out)
    assert "| AMDIM | 48 × 8,192 | 8,192 | 50.0 | 51.0 | 1 |" in premise.block(out)
    assert "A CPU, torch 2.14.1, commit 2234567; A CPU, torch 2.14.1, commit 4234567." in premise.block(out)
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert premise.block(tmp_path / "none.json").startswith("No record is committed yet")
    assert threads == {"6"}
    assert premise.main([*options, "--jobs=2", f"--out={tmp_path / 'two'}", f"--runs={tmp_path / 'both'}"]) == 0
    assert threads == {"6", "3"}
    assert [row["seed"] for row in json.loads((tmp_path / "two").read_text())["runs"]] == [0, 1]


def test_the_plan_is_images_by_flop_by_rate(capsys, tmp_path):
    plan = ["--plan", "--largest", f"--out={tmp_path / 'none.json'}"]
    assert premise.main([*plan, "--arms", "amdim", "moco", "--gflop-per-s=1000"]) == 0
    said = capsys.readouterr().out
    minutes = 48 * 8192 * (4 / 3 * 1.223 + 8192 * 0.304e-3) / 1000 / 60
    assert f"| AMDIM | 48 × 8,192 | 8,192 | {minutes:.0f} | 3 |" in said
    assert "\n9 runs" in said
    with pytest.raises(SystemExit):
        premise.main([])
