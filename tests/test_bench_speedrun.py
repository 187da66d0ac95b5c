"""The speedrun: one command to an entry, the clock of a run entered by hand, the rules, and the table."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from datetime import datetime, timezone
from typing import Any

import pytest

from bench import host, speedrun, speedrun_table
from fused_nce import cli, measure
from fused_nce.train import methods
from fused_nce.train.methods import amdim
from fused_nce.train.saving import resumed as going_on
from tests.train.runs import TINY, log, resumed, trainer

REFERENCE = speedrun_table.REFERENCE_GFLOP_PER_S
BEGAN = 1_000_000_000.0  # 2001-09-09


class Here:
    """A process of ours, in this one."""

    def __init__(self, arguments):
        self.returncode = cli.main(arguments[3:])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def poll(self):
        return self.returncode

    wait = poll


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command's options, its run and the folder of its entry."""
    folder = tmp_path_factory.mktemp("speedrun")
    run, entries = folder / "run", folder / "entries"
    options = ["--data=digits", "--minutes=12", "--preset=digits", f"--out={run}", f"--entries={entries}", "--seed=3"]
    options += [*TINY, "--max-steps", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speedrun, "Popen", Here)
        patch.setattr(measure, "cores", lambda: 2)
        patch.setattr(measure, "started", time.time)
        assert speedrun.main(options) == 1  # the digits are not CIFAR-10
    return options, run, entries


@pytest.fixture
def entry(made):
    """As it would be of CIFAR-10, on a host as fast as the reference."""
    found = json.loads((made[2] / "amdim-12min-3.json").read_text())
    found["trained_on"]["count"], found["splits"]["test"], found["host"]["cores"] = 50_000, 10_000, 2
    found["trained_on"]["classes"] = dict.fromkeys(range(10), 5000)
    found["matrix_gflop_per_s"] = {"bf16": REFERENCE, "fp32": 200.0, "others_cpu_share": 0.0}
    return found | {"seconds": 700.0, "outside": []}


def test_one_command_trains_judges_and_enters(made, capsys):
    options, run, entries = made
    (path,) = entries.iterdir()
    found, lines = json.loads(path.read_text()), log(run)
    assert (found["rules"], found["minutes_allowed"], found["seed"], found["updates"]) == (1, 12, 3, 4)
    assert lines[-1]["time_s"] <= found["seconds"] < 600
    assert found["log"] == {key: [line[key] for line in lines] for key in ("step", "time_s", "loss")}
    judged = json.loads((run / "eval.json").read_text())["probes"]
    assert len(judged) == 4
    assert {(row["tap"], row["probe"]): round(row["accuracy_pct"], 2) for row in judged} == {
        (tap, probe): value for tap, probes in found["accuracy_pct"].items() for probe, value in probes.items()
    }
    assert found["matrix_gflop_per_s"].keys() == {"bf16", "fp32", "others_cpu_share"}
    assert 0 <= found["others_cpu_share"] <= 1
    assert (found["energy_j"] is None) == ("energy_why" in found)
    sizes = json.loads((run / "checkpoints/step_00000004/state.json").read_text())["data"]["classes"].values()
    assert found["outside"] == [
        "896 training images, need 50,000",
        f"10 classes of {min(sizes)} to {max(sizes)} images, need 10 of 5,000",
        "456 test images, need 10,000",
    ]
    assert (found["config"]["model"]["ndf"], found["clock"]) == (4, "of the process")
    assert "--data=path/to/digits" in found["command"]
    assert str(run) not in path.read_text()
    before = path.read_bytes()
    assert speedrun.main(options) == 1  # nothing is trained, nor written
    assert path.read_bytes() == before
    capsys.readouterr()
    for other, differs in (
        (["--seed=4"], "--seed 4 instead of 3"),
        (["--lr", "1", "--max-steps", "5"], "--max-steps 5 instead of 4, --lr 1 instead of its default"),
        (["--method=cpc"], "command fused-nce train cpc instead of fused-nce train amdim"),
    ):
        assert speedrun.main([*options, *other, "--name=amdim-12min-3"]) == 2
        said = f"speedrun: name: {run} was trained by another command: {differs}; need the same, or another --name\n"
        assert capsys.readouterr().err == said
    assert speedrun.main(["--enter", str(run), f"--entries={entries}", "--name=again"]) == 1
    assert "entered already" in capsys.readouterr().out
    assert list(entries.iterdir()) == [path]


def test_another_runs_entry_is_not_overwritten(made, entry, tmp_path, capsys):
    options, _, entries = made
    before = (entries / "amdim-12min-3.json").read_bytes()
    with pytest.raises(ValueError, match=r"^name: .*amdim-12min-3.json is another run's entry; need another --name$"):
        speedrun.write(entry | {"run_sha256": "0"}, "amdim-12min-3", entries)
    assert speedrun.main([*options, f"--out={tmp_path / 'new'}"]) == 2  # before it trains
    assert capsys.readouterr().err.startswith(f"speedrun: name: {entries}")
    assert not (tmp_path / "new").exists()
    assert (entries / "amdim-12min-3.json").read_bytes() == before


def test_the_rules(entry):
    assert speedrun.outside(entry) == []
    changed = {
        "12.02 minutes taken, need at most 12": {"seconds": 721.0},
        "4 cores, need at most 2": {"host": entry["host"] | {"cores": 4}},
        "8 cores, need at most 2": {"host": entry["host"] | {"most cores": 8}},  # of an earlier process
        "trained on Some GPU, need CPU": {"host": entry["host"] | {"device": "Some GPU"}},
        "trained on A GPU, need CPU": {"host": entry["host"] | {"devices": ["A GPU", "CPU"]}},
        "100 classes of 500 to 500 images, need 10 of 5,000": {  # CIFAR-100
            "trained_on": entry["trained_on"] | {"classes": dict.fromkeys(range(100), 500)}
        },
        "supcon trains with labels": {"method": "supcon"},
    }
    for text, values in changed.items():
        assert speedrun.outside(entry | values) == [text]
    rates = {"matrix_gflop_per_s": {"bf16": None, "fp32": REFERENCE / 4, "others_cpu_share": 0.05}}
    assert speedrun.outside(entry | rates | {"seconds": 2879.0}) == []  # a slower host has longer
    assert speedrun.outside(entry | rates | {"seconds": 2881.0}) == ["12.00 minutes taken, need at most 12"]
    fast = {"matrix_gflop_per_s": {"bf16": 4 * REFERENCE, "fp32": None, "others_cpu_share": 0.0}}
    assert speedrun.outside(entry | fast) == []  # and a faster one the clock's
    assert speedrun.outside(entry | {"matrix_gflop_per_s": None}) == []
    assert f"÷ {REFERENCE:.0f} GFLOP/s" in (host.ROOT / "docs/speedrun.md").read_text()
    labelled = {name for name in methods.METHODS if "labels" in methods.get(name).extras}
    assert labelled | {"distil"} == set(speedrun.LABELLED)


def test_the_clock_of_a_resumed_run_goes_on_while_it_rests(made, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(host, "matrix_rates", lambda: {"bf16": None, "fp32": REFERENCE, "others_cpu_share": 0.0})
    monkeypatch.setattr(measure, "started", lambda: BEGAN)
    trainer(run, "--max-steps", "2").run()
    monkeypatch.setattr(measure, "started", lambda: BEGAN + 400)
    resumed(run, "--max-steps", "4").run()
    with pytest.raises(ValueError, match=r"^run: .* holds no eval.json; evaluate it first: fused-nce eval "):
        speedrun.read(run)
    shutil.copy(made[1] / "eval.json", run)
    newest = run / "checkpoints/step_00000004"
    os.utime(newest / "MANIFEST.json", (BEGAN + 1234.5, BEGAN + 1234.5))
    found = speedrun.read(run)
    assert (found["began_utc"], found["seconds"]) == ("2001-09-09T01:46:40+00:00", 1234.5)
    assert (found["minutes_allowed"], found["clock"]) == (30, "of the run's files")
    assert speedrun.read(run, 12)["outside"][0] == "20.57 minutes taken, need at most 12"
    assert speedrun.read(run, None, (BEGAN, BEGAN + 700))["minutes_allowed"] == 12
    with pytest.raises(ValueError, match=r"^clock: 0 s, need at least the \d+ s that the log of "):
        speedrun.read(run, None, (BEGAN, BEGAN))
    for seconds, step, late in (
        (1e4, 2, 0),  # before it was resumed
        (1e4, 4, 300),  # of its last process
        (0.0, 4, 0),  # too short for its log
        (1e4, 4, 1),  # of the whole run: a process may seem to have started a tick before its parent looked at the time
    ):
        began = datetime.fromtimestamp(BEGAN + late, timezone.utc).isoformat()
        measured = {"seconds": seconds, "step": step, "began_utc": began, "matrix_gflop_per_s": None}
        (run / speedrun.MEASURED).write_text(json.dumps(measured))
        assert speedrun.read(run)["seconds"] == (1e4 if late == 1 else 1234.5)
    state = json.loads((newest / "state.json").read_text())
    del state["environment"]["began_utc"]
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"^clock: .* an older trainer's; need --clock START END$"):
        speedrun.read(run)


def test_a_checkpoint_keeps_the_most_cores_and_every_device_of_its_run(monkeypatch):
    state, extra = dict[str, Any](), []
    for cores, device in ((4, "CPU"), (2, "A GPU"), (1, "CPU"), (8, "CPU"), (2, "CPU")):
        monkeypatch.setattr(measure, "environment", lambda c=cores, d=device: {"cores": c, "device": d})
        state = {"environment": going_on.environment(state, 1)}
        extra.append([state["environment"].get(key) for key in ("most cores", "devices")])
    both = ["A GPU", "CPU"]
    assert extra == [[None, None], [4, both], [4, both], [None, both], [8, both]]
    old = going_on.environment({"environment": {"fused_nce": "0.1.0"}}, 1)  # an older version's
    assert old == {"cores": 2, "device": "CPU", "processes": 1}
    pinned = [("a", {0}), ("a", {5}), ("a", {5, 6}), ("b", {0})]
    monkeypatch.setattr(going_on, "gather_object", lambda mine: pinned)
    monkeypatch.setattr(measure, "cores", lambda among: among)
    assert going_on.environment({}, 4).items() >= {"cores": 4, "processes": 4}.items()


def test_the_presets_keep_their_time_at_the_pace_of_an_entry():
    first = speedrun_table.entries()["amdim-ndf-80-0"]
    log_s = first["log"]["time_s"][-1]
    for minutes, epochs in amdim.EPOCHS.items():
        taken = first["seconds"] - log_s + epochs * log_s / first["epochs"]
        assert 0.9 * 60 * minutes < taken < 60 * minutes
    assert "alone: {}, {} and {}.".format(*amdim.EPOCHS.values()) in (host.ROOT / "docs/speedrun.md").read_text()


def test_others_are_those_on_the_cores_that_it_may_use(tmp_path, monkeypatch):
    ticks = measure.core_ticks
    monkeypatch.setattr(host, "core_ticks", lambda: ticks(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(os, "times", lambda: (0.0,) * 5)
    stat = "cpu  {all} 0 0 {all} 0\ncpu0 {us} 0 0 {idle} 0 0 0 0\ncpu1 0 0 0 0 {idle} 0 0 {us}\ncpu2 {all} 0 0 0 0\n"
    (tmp_path / "stat").write_text(stat.format(all=10, us=10, idle=10))
    meter = host.BusyMeter()
    (tmp_path / "stat").write_text(stat.format(all=9999, us=110, idle=310))
    assert meter.share() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: found["training"].update(steps=3), "ends at different steps, .* resume it, then evaluate"),
        (lambda found: found["probes"].pop(), "was not judged by knn and linear; evaluate it first"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_refused(made, tmp_path, change, said):
    run = shutil.copytree(made[1], tmp_path / "run")
    found = json.loads((run / "eval.json").read_text())
    change(found)
    (run / "eval.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"^run: .* {said}"):
        speedrun.read(run)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--minutes", "12"], "need --data and --minutes, or --enter RUN"),
        (["--enter", "run", "--lr", "1"], "--enter: trains nothing, so leave out --lr 1"),
        (["--data", "x", "--minutes", "13"], "invalid choice: 13"),
    ],
)
def test_bad_options_are_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        speedrun.main(options)
    assert said in capsys.readouterr().err


def test_too_many_cores_are_refused_before_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "cores", lambda: 5)
    assert speedrun.main(["--data=digits", "--minutes=12", f"--out={tmp_path / 'run'}", f"--entries={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("speedrun: cores: may use 5, need at most 2: taskset")


def test_energy_is_that_of_the_packages_and_goes_round(tmp_path):
    def put(zone, **files):
        (tmp_path / zone).mkdir(exist_ok=True)
        for file, value in files.items():
            (tmp_path / zone / file).write_text(f"{value}\n")

    assert "shows no" in host.Energy(tmp_path).found()["energy_why"]
    put("intel-rapl:0", name="package-0", energy_uj=9_000_000, max_energy_range_uj=10_000_000)
    put("intel-rapl:0:0", name="core", energy_uj=0, max_energy_range_uj=10_000_000)
    put("intel-rapl:1", name="psys", energy_uj=0, max_energy_range_uj=10_000_000)
    energy = host.Energy(tmp_path)
    for value in (9_500_000, 500_000):
        for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
            put(zone, energy_uj=value)
        energy.look()
    assert energy.found() == {"energy_j": 1.5}
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    for _ in range(2):
        energy.look()
    assert energy.found()["energy_why"].endswith("energy_uj cannot be read: No such file or directory")
    assert host.Energy(tmp_path).found()["energy_why"].endswith("energy_uj cannot be read: No such file or directory")


def test_the_table_has_seeds_together_and_those_outside_the_rules_below(entry, tmp_path):
    folder = tmp_path / "speedrun"
    assert speedrun_table.block(folder).startswith("No entry is committed yet")
    for seed, knn in enumerate((70.0, 72.0, 71.0)):
        one = copy.deepcopy(entry) | {"seed": seed, "run_sha256": f"{seed}", "seconds": 600.0 + 60 * seed}
        one["config"]["seed"] = seed
        one["accuracy_pct"] = {"f1": {"knn": knn, "linear": 75.0}, "f7": {"knn": 60.0, "linear": 77.0}}
        speedrun.write(one, f"a-{seed}", folder)
        assert (speedrun_table.draw(folder) is None) == (seed == 0)
    slow = entry | {"run_sha256": "slow", "outside": ["99.00 minutes taken, need at most 12"]}
    speedrun.write(slow, "slow", folder)
    lines = speedrun_table.block(folder).splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| 12")]
    assert len(cells) == 2
    assert cells[0][1:5] == ["amdim", "muon", "30", "f1"]
    assert cells[0][5:9] == ["71.0 ± 1.0 (best 72.0)", "75.0 ± 0.0 (best 75.0)", "11.0", "11.0"]
    assert any(": bf16 850 GFLOP/s, fp32 200 GFLOP/s." in line for line in lines)
    assert [f"[seed {seed}](results/speedrun/a-{seed}.json)" in cells[1][-1] for seed in range(3)] == [True] * 3
    assert "given by hand" not in "\n".join(lines)
    speedrun.write(entry | {"run_sha256": "hand", "clock": "given"}, "hand", folder)
    assert "- The clock was given by hand, not measured: hand." in speedrun_table.block(folder).splitlines()
    assert lines[-1] == "- [slow](results/speedrun/slow.json): 99.00 minutes taken, need at most 12."
    assert "![Accuracy against minutes](results/speedrun.png)" in lines
    assert (tmp_path / "speedrun.png").stat().st_size > 10_000


def test_a_matrix_rate_is_none_beside_others(monkeypatch):
    for share, known in ((0.0, True), (0.3, False)):
        monkeypatch.setattr(host.BusyMeter, "share", lambda _, share=share: share)
        found = host.matrix_rates(64, 0.01)
        assert (found["fp32"] is not None) == known
        assert found["others_cpu_share"] == share
    assert speedrun_table.scaled_s({"seconds": 9.0, "matrix_gflop_per_s": found}) is None
