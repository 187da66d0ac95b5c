"""Files of a run and of settings, broken at random: the values that they hold, or one error that names the file."""

import json
import random

import pytest

from fused_nce.train import command, config, export, files, options, teacher
from fused_nce.train.monitor import journal
from fused_nce.train.report import runlog
from fused_nce.train.saving import checkpoint
from tests.train.test_export import make_run

PIECES = [b"{", b"[", b"&a *a", b"\n", b": ", b"\x00", b"- ", b"1e999", b"null", b"<<: "]


def broken(whole, draw):
    """A file after a bad disk, a killed editor or a wrong download."""
    content, kind = bytearray(whole), draw.randrange(5)
    place = draw.randrange(len(content) + 1)
    if kind == 0:
        del content[place:]
    elif kind == 1:
        content[place:place] = draw.randbytes(draw.randrange(1, 9))
    elif kind == 2:
        del content[place : place + draw.randrange(1, 40)]
    elif kind == 3:
        content[place:place] = draw.choice(PIECES)
    else:
        content = bytearray(draw.randbytes(draw.randrange(200)))
    return bytes(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was exported and evaluated."""
    folder = tmp_path_factory.mktemp("broken")
    run = make_run(folder / "run", "amdim", "--model.ndf=4", "--model.n_rkhs=16", "--model.n_depth=1")
    (run / "log.jsonl").write_text("".join(f'{{"step": {i}, "loss": 1.5, "nce": null}}\n' for i in range(1, 9)))
    result = {"data_name": "digits", "method": "amdim", "probes": [], "taps": ["f1"], "training": {"steps": 2}}
    (run / "eval.json").write_text(json.dumps(result | {"protocol": []}))
    export.export(str(run), str(folder / "out"), onnx=False)
    return run


READERS = {
    "config.yaml": lambda run: config.load(run),
    "config.yaml as --config": lambda run: options.read(run / "config.yaml"),
    "eval.json": lambda run: files.read_json(run / "eval.json"),
    "log.jsonl": lambda run: runlog.read_log(run),
    "log.jsonl of a resume": lambda run: journal.Journal(run, 4).close(),
    "fine-tuned.safetensors": lambda run: teacher.classes(str(run)),
    "config.json": lambda run: export.load_encoder(run.parent / "out"),
    "model.safetensors": lambda run: export.load_encoder(run.parent / "out"),
    "MANIFEST.json": lambda run: checkpoint.load_model(run),
    "state.json": lambda run: checkpoint.load_model(run),
}
SLOW = {"config.yaml", "config.json", "model.safetensors", "MANIFEST.json", "state.json"}


@pytest.mark.parametrize("count", [6, pytest.param(800, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_read_or_named(run, name, count):
    word = name.partition(" ")[0]
    folder = {"config.json": run.parent / "out", "model.safetensors": run.parent / "out"}.get(word, run)
    if word in ("MANIFEST.json", "state.json"):
        folder = checkpoint.steps(run)[-1]
    path = folder / word
    whole = path.read_bytes() if path.exists() else (run.parent / "out" / "model.safetensors").read_bytes()
    existed, draw, said = path.exists(), random.Random(count), []
    try:
        for _ in range(count if name in SLOW else 8 * count):
            path.write_bytes(broken(whole, draw))
            try:
                READERS[name](run)
            except ValueError as error:
                said.append(str(error))
    finally:
        path.write_bytes(whole) if existed else path.unlink()
    named = word if folder != checkpoint.steps(run)[-1] else "checkpoint"
    assert [line for line in said if named not in line or "\n" in line] == []
    assert said or name == "log.jsonl of a resume"  # which keeps the lines that are whole


@pytest.mark.nightly
def test_broken_settings_on_the_command_line_are_one_line(tmp_path, run):
    whole, draw, said = (run / "config.yaml").read_bytes(), random.Random(0), []
    for number in range(400):
        (tmp_path / "c.yaml").write_bytes(broken(whole, draw))
        try:
            command.parse("amdim", ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / str(number))])
        except ValueError as error:
            said.append(str(error))
    assert [line for line in said if "\n" in line] == []
    assert len(said) > 200
