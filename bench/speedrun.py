"""`python -m bench.speedrun --data CIFAR10 --minutes 12`: an encoder without labels, on two cores, against the clock.

`fused-nce train` runs in a process of its own; the clock runs from its start to its end, when the encoder is saved.
`fused-nce eval` judges it, and the entry is `docs/results/speedrun/NAME.json`. Options that are not listed go to
`fused-nce train`. `--enter RUN` enters a run of any method that was trained and evaluated by hand; its clock is what
its own files tell, pauses included. No entry is overwritten. docs/speedrun.md has the rules.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any

import yaml

from bench import host, speedrun_table
from bench.speedrun_table import ENTRIES
from fused_nce import measure

RULES = 1
MINUTES = (12, 30, 60)
CORES, IMAGES, TEST_IMAGES, CLASSES = 2, 50_000, 10_000, 10
LABELLED = ("supcon", "distil")  # methods that train with labels, or after a classifier
PROGRAM = [sys.executable, "-m", "fused_nce.cli"]
JUDGED = ("--protocols=knn,linear", "--baselines=false", "--cost=false")
MEASURED = "speedrun.json"  # in a run's folder: what was measured while it trained
LOOK_S = 10.0  # a counter of energy wraps round after some minutes
Entry = dict[str, Any]


def train(arguments: Sequence[str], run: Path) -> None:
    """Train, and leave in the run's folder what was measured meanwhile.

    Raises:
        ValueError: the training failed; it has said why.
    """
    rates, energy, meter = host.matrix_rates(), host.Energy(), host.BusyMeter()
    began, start = datetime.now(timezone.utc), time.perf_counter()
    with Popen([*PROGRAM, *arguments]) as process:
        while process.poll() is None:
            with suppress(TimeoutExpired):
                process.wait(LOOK_S)
            energy.look()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise ValueError(f"run: fused-nce train ended with {process.returncode}; there is nothing to enter")
    found = {
        "began_utc": began.isoformat(timespec="seconds"), "seconds": round(seconds, 2), "clock": "of the process",
        "command": _shown(arguments), "step": _state(run)["step"], "others_cpu_share": round(meter.share(), 4),
        "matrix_gflop_per_s": rates, **energy.found(),
    }  # fmt: skip
    (run / MEASURED).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _shown(arguments: Sequence[str]) -> list[str]:
    """The command, without folders of this machine."""
    data = next(word.partition("=")[2] for word in arguments if word.startswith("--data="))
    hidden = {"data": f"path/to/{Path(data).name}", "out": "RUN"}
    return [
        "fused-nce",
        *(re.sub(r"^(--(data|out))=.*", lambda found: f"{found[1]}={hidden[found[2]]}", word) for word in arguments),
    ]


def _options(command: Sequence[str]) -> dict[str, str]:
    """Option → its values."""
    found, name = {"command": ""}, "command"
    for word in command:
        if word.startswith("--"):
            name, _, word = word.partition("=")
            found[name] = ""
        found[name] = f"{found[name]} {word}".strip()
    return found


def _same(wanted: Sequence[str], kept: Sequence[str], run: Path) -> None:
    """Refuse a run that another command trained.

    Raises:
        ValueError: naming what differs.
    """
    new, old = _options(wanted), _options(kept)
    differ = [
        f"{name} {' instead of '.join(of.get(name, 'its default') or 'on' for of in (new, old))}"
        for name in {**new, **old}
        if new.get(name) != old.get(name)
    ]
    if differ:
        said = ", ".join(differ)
        raise ValueError(f"name: {run} was trained by another command: {said}; need the same, or another --name")


def _newest(run: Path) -> Path:
    found = sorted(run.glob("checkpoints/step_*/MANIFEST.json"), key=lambda path: int(path.parent.name[5:]))
    if not found:
        raise ValueError(f"run: {run} holds no checkpoint; need the folder of a run that is trained")
    return found[-1].parent


def _state(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_newest(run) / "state.json").read_text(encoding="utf-8"))
    return found


def clock(run: Path, given: Sequence[float] | None, trained_s: float) -> Entry:
    """When the run's first process started, and the seconds until its encoder was saved.

    Args:
        run: its folder.
        given: start and end in seconds since 1970, by whoever enters a run whose files do not tell.
        trained_s: that its log has.

    Raises:
        ValueError: the files do not tell, or what is told is shorter than the training.
    """
    state, measured = _state(run), run / MEASURED
    told = state.get("environment", {}).get("began_utc")
    if given is None and measured.exists():
        found: Entry = json.loads(measured.read_text(encoding="utf-8"))
        # Of the whole run, not of its last process. A start is known to a tick, so it may seem to be a second early.
        whole = told and datetime.fromisoformat(told) >= datetime.fromisoformat(found["began_utc"]) - timedelta(0, 1)
        if whole and found["step"] == state["step"] and found["seconds"] >= trained_s:
            return {key: value for key, value in found.items() if key != "step"}
    if given is None and told is None:
        raise ValueError(f"clock: {run} does not say when it began, an older trainer's; need --clock START END")
    start, end = given or (datetime.fromisoformat(told).timestamp(), (_newest(run) / "MANIFEST.json").stat().st_mtime)
    if end - start < trained_s:
        raise ValueError(f"clock: {end - start:.0f} s, need at least the {trained_s:.0f} s that the log of {run} has")
    here = {key: state.get("environment", {}).get(key) for key in ("processor", "cores")}
    same = here == {"processor": measure.processor(), "cores": measure.cores()}
    return {
        "began_utc": datetime.fromtimestamp(start, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(end - start, 2), "clock": "given" if given else "of the run's files", "command": None,
        "others_cpu_share": None, "matrix_gflop_per_s": host.matrix_rates() if same else None,
        "energy_j": None, "energy_why": "not measured while it trained",
    }  # fmt: skip


def read(run: Path, minutes: int | None = None, given: Sequence[float] | None = None) -> Entry:
    """The entry of a run that is trained and evaluated.

    Raises:
        ValueError: naming what it lacks.
    """
    judged = run / "eval.json"
    need = f"evaluate it first: fused-nce eval {run} {JUDGED[0]}"
    if not judged.exists():
        raise ValueError(f"run: {run} holds no eval.json; {need}")
    state, text = _state(run), (run / "config.yaml").read_text(encoding="utf-8")
    raw = (run / "log.jsonl").read_text(encoding="utf-8")
    result, log = json.loads(judged.read_text(encoding="utf-8")), [json.loads(line) for line in raw.splitlines()]
    steps = {"log": log[-1]["step"], "checkpoint": state["step"], "evaluation": result["training"]["steps"]}
    if len(set(steps.values())) > 1:
        raise ValueError(f"run: {run} ends at different steps, {steps}; resume it, then {need}")
    accuracy: dict[str, dict[str, float]] = {}
    for row in result["probes"]:
        if row["encoder"] == "trained" and row["labels"] == "all" and row["probe"] in speedrun_table.PROBES:
            accuracy.setdefault(row["tap"], {})[row["probe"]] = round(row["accuracy_pct"], 2)
    if not accuracy or any(found.keys() != speedrun_table.PROBES.keys() for found in accuracy.values()):
        raise ValueError(f"run: {run} was not judged by knn and linear; {need}")
    settings = yaml.safe_load(text)
    own = re.sub(r"(?m)^data: .*\n", "", text)
    found = {
        "rules": RULES, "minutes_allowed": minutes, **clock(run, given, log[-1]["time_s"]),
        "accuracy_pct": accuracy, "splits": result["splits"],
        "method": settings["method"], "preset": settings["preset"], "seed": settings["seed"],
        "epochs": result["epochs"], "updates": state["step"], "parameters": result["parameters"],
        "images_per_s": result["training"]["images_per_s"], "host": state["environment"],
        "trained_on": state["data"], "config": settings | {"data": f"path/to/{Path(settings['data']).name}"},
        "run_sha256": hashlib.sha256((own + raw).encode()).hexdigest(),
        "log": {key: [line[key] for line in log] for key in ("step", "time_s", "loss")},
    }  # fmt: skip
    taken = speedrun_table.counted_s(found) / 60
    found["minutes_allowed"] = minutes or next((allowed for allowed in MINUTES if taken <= allowed), MINUTES[-1])
    return found | {"outside": outside(found)}


def outside(entry: Entry) -> list[str]:
    """How an entry does not keep the rules; such a one is kept, and not ranked."""
    taken, machine = speedrun_table.counted_s(entry) / 60, entry["host"]
    cores = max(machine["cores"], machine.get("most cores", 0))  # of all processes of a resumed run
    other = [device for device in machine.get("devices", [machine["device"]]) if device != "CPU"]
    sizes = list(entry["trained_on"]["classes"].values())
    shown = f"{len(sizes)} classes of {min(sizes, default=0):,} to {max(sizes, default=0):,} images"
    asked = {
        f"{taken:.2f} minutes taken, need at most {entry['minutes_allowed']}": taken > entry["minutes_allowed"],
        f"{cores} cores, need at most {CORES}": cores > CORES,
        f"trained on {', '.join(other)}, need CPU": bool(other),
        f"{entry['method']} trains with labels": entry["method"] in LABELLED,
        f"{entry['trained_on']['count']:,} training images, need {IMAGES:,}": entry["trained_on"]["count"] != IMAGES,
        f"{shown}, need {CLASSES} of {IMAGES // CLASSES:,}": sizes != [IMAGES // CLASSES] * CLASSES,
        f"{entry['splits']['test']:,} test images, need {TEST_IMAGES:,}": entry["splits"]["test"] != TEST_IMAGES,
    }
    return [text for text, broken in asked.items() if broken]


def write(entry: Entry, name: str, folder: Path) -> Path:
    """Keep an entry; the file of a run that has one already stays as it is.

    Raises:
        ValueError: the name is another entry's.
    """
    path = folder / f"{name}.json"
    for other, kept in speedrun_table.entries(folder).items():
        if kept["run_sha256"] == entry["run_sha256"]:
            print(f"entered already: {folder / other}.json")
            return folder / f"{other}.json"
    if path.exists():
        raise ValueError(f"name: {path} is another run's entry; need another --name")
    folder.mkdir(parents=True, exist_ok=True)
    rest = json.dumps({key: value for key, value in entry.items() if key != "log"}, indent=1)[:-2]
    path.write_text(f'{rest},\n "log": {json.dumps(entry["log"])}\n}}\n', encoding="utf-8")  # a number a line is long
    print(f"wrote {path}")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Train, judge and enter, whatever of it is not done yet; 1: outside the rules, 2: cannot be entered."""
    parser = argparse.ArgumentParser(prog="python -m bench.speedrun", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", help="CIFAR-10 as shards or folders")
    parser.add_argument("--minutes", type=int, choices=MINUTES, help="with --enter the first that are enough")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default="amdim")
    parser.add_argument("--preset", help="default: cifar10-MINUTESmin")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/speedrun/NAME)")
    parser.add_argument("--enter", type=Path, metavar="RUN", help="a run that is trained and evaluated")
    parser.add_argument("--clock", type=float, nargs=2, metavar=("START", "END"), help="of it, in seconds since 1970")
    parser.add_argument("--name", help="of the entry (default: METHOD-MINUTESmin-SEED, or the run's)")
    parser.add_argument("--entries", type=Path, default=ENTRIES, help="folder of the entries")
    o, more = parser.parse_known_args(argv)
    if o.enter is None and (o.data is None or o.minutes is None):
        parser.error("need --data and --minutes, or --enter RUN")
    if o.enter is not None and (more or o.data or o.out or o.preset):
        parser.error(f"--enter: trains nothing, so leave out {' '.join(more) or '--data, --out and --preset'}")
    name = o.name or (o.enter.resolve().name if o.enter else f"{o.method}-{o.minutes}min-{o.seed}")
    run = o.enter or o.out or host.ROOT / "runs/speedrun" / name
    try:
        if o.enter is None:
            _make(o, more, name, run)
        entry = read(run, o.minutes, o.clock)
        entry = json.loads(write(entry, name, o.entries).read_text(encoding="utf-8"))
    except ValueError as error:
        print(f"speedrun: {error}", file=sys.stderr)
        return 2
    speedrun_table.draw(o.entries)
    print(f"{entry['seconds'] / 60:.2f} minutes of {entry['minutes_allowed']}")
    for tap, found in entry["accuracy_pct"].items():
        print(f"{tap}: kNN-200 {found['knn']:.2f} %, linear {found['linear']:.2f} %")
    for text in entry["outside"]:
        print(f"outside the rules: {text}", file=sys.stderr)
    return int(bool(entry["outside"]))


def _make(o: argparse.Namespace, more: Sequence[str], name: str, run: Path) -> None:
    """The run, trained and judged."""
    shared = [f"--data={o.data}", f"--preset={o.preset or f'cifar10-{o.minutes}min'}", f"--seed={o.seed}"]
    arguments = ["train", o.method, *shared, f"--out={run}", *more]
    if (run / MEASURED).exists():
        _same(_shown(arguments), json.loads((run / MEASURED).read_text(encoding="utf-8"))["command"], run)
    else:
        if (o.entries / f"{name}.json").exists():  # before the training, not after it
            raise ValueError(f"name: {o.entries / name}.json is another run's entry; need another --name or --seed")
        if measure.cores() > CORES:
            raise ValueError(f"cores: may use {measure.cores()}, need at most {CORES}: taskset -c 0,1 python -m ...")
        train(arguments, run)
    if not (run / "eval.json").exists():
        with Popen([*PROGRAM, "eval", str(run), *JUDGED]) as judge:
            judge.wait()
        if judge.returncode:
            raise ValueError(f"run: {run} could not be evaluated")


if __name__ == "__main__":
    sys.exit(main())
