"""What people type and what their files hold: the value that they mean, or one line that names file or setting."""

import json
import linecache
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fused_nce import cli
from fused_nce.train import command, config, files, options
from fused_nce.train.methods.amdim import AMDIMConfig
from fused_nce.train.report import runlog


def parsed(tmp_path, text, *argv):
    (tmp_path / "c.yaml").write_text(text)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    return command.parse("amdim", [*argv, "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])[0]


def test_the_command_line_wins_wherever_it_stands(tmp_path):
    """Over files, which win over the preset."""
    (tmp_path / "d.yaml").write_text("optim: {lr: 0.125, epochs: 3}\nseed: 5")
    argv = ["--preset=digits", "--lr", "0.25", f"--config={tmp_path / 'd.yaml'}", "--seed=7"]
    settings = parsed(tmp_path, "optim:\n  lr: 0.5\n  batch_size: 9\n", *argv)
    found = settings.optim.lr, settings.seed, settings.optim.epochs, settings.optim.batch_size
    assert found == (0.25, 7, 3, 9)
    assert (settings.preset, settings.augment.geometry) == ("digits", "affine")
    assert parsed(tmp_path, "optim:\n  lr: 0.5\n", *argv[3:]).optim.lr == 0.5  # the later file


MEANS = [
    ("seed: 010", "seed", 10),
    ("data: 2024_01", "data", "2024_01"),
    ("data: 010", "data", "010"),
    ("data: 2024-01-31", "data", "2024-01-31"),
    ("data: on", "data", "on"),
    ("optim:\n  lr: 1e-3", "optim.lr", 1e-3),
    ("optim.lr: 5", "optim.lr", 5.0),
    ("optim:\n  milestones: [010, 20]", "optim.milestones", (10, 20)),
    ("optim:\n  milestones: 7", "optim.milestones", (7,)),
    ("loss:\n  pairs:\n  - 1>5\n  - '5>5'", "loss.pairs", ("1>5", "5>5")),
    ("loss: {clip: null, backend: ~}", "loss.clip", None),
    ("optim:\n# all by default\nseed: 3", "seed", 3),
    ("run: {tensorboard: false}", "run.tensorboard", False),
    ("method: amdim\nseed: 2", "seed", 2),
]


@pytest.mark.parametrize(("text", "key", "value"), MEANS)
def test_a_file_means_what_the_command_line_does(tmp_path, text, key, value):
    found = parsed(tmp_path, text)
    for name in key.split("."):
        found = getattr(found, name)
    assert (found, type(found)) == (value, type(value))


REFUSED = [
    ("optim: {lr: 1}\nseed: 1\noptim: {epochs: 3}", "optim stands twice, in lines 1 and 3"),
    ("optim: {lr: 1}\noptim.lr: 2", "optim.lr stands twice, in lines 1 and 2"),
    ("seed: one", "seed: must be a whole number, got one"),
    *(
        (f"seed: {text}", f"seed: must be a whole number, got {text}")
        for text in ("1:30", "1_000", "0x10", "0o7", "0b1", "1e3", "٣")
    ),
    *((f"probes: {text}", f"probes: must be true or false, got {text}") for text in ("on", "yes", "1")),
    ("channels_last: off", "channels_last: must be true or false or null, got off"),
    ("optim: {lr: 1:30.5}", "optim.lr: must be a number, got 1:30.5"),
    ("optim: {betas: [0.5, 1_0]}", "optim.betas: must be a number, got 1_0"),
    ("run: {threads: 2024-01-31}", "run.threads: must be auto or a whole number, got 2024-01-31"),
    ("optim: 3", "optim: must be a section, got 3"),
    ("optim: {epochss: 3}", "--optim.epochss: no such option; did you mean --optim.epochs?"),
    ("method: simclr", "method: must be amdim here, got simclr"),
    ("- 1", "must hold settings, as `seed: 1`, got [1]"),
    ("", "must hold settings, as `seed: 1`, got nothing"),
    ("{[:\n\t- x", "is no YAML: line 2, column 1: while scanning for the next token, found character '\\t' that"),
    ("a: &a [*a]", ""),
    ("\x00", "is no YAML: unacceptable character #x0000"),
    ("seed: 1\n---\nseed: 2", "is no YAML: line 2, column 1: expected a single document in the stream, but found"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_a_file_that_cannot_be_used_is_one_line_with_its_name(tmp_path, capsys, text, words):
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main(["train", "amdim", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fused-nce: config: {tmp_path / 'c.yaml'}: cannot be used: {words}")
    assert not (tmp_path / "run").exists()


def test_the_command_line_reads_values_as_a_file_does(tmp_path, capsys):
    for words in (["--seed=1:30"], ["--seed", "1:30"]):
        assert cli.main(["train", "amdim", *words, "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == "fused-nce: seed: must be a whole number, got 1:30\n"


def test_a_missing_or_binary_file_of_settings_is_one_line(tmp_path, capsys):
    (tmp_path / "b.yaml").write_bytes(b"seed: \xff\xfe")
    said = {"no.yaml": "No such file or directory\n", "": "Is a directory\n", "b.yaml": "'utf-8' codec can't decode"}
    for path, words in said.items():
        assert cli.main(["train", "amdim", "--config", str(tmp_path / path)]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"fused-nce: config: {tmp_path / path}: cannot be used: {words}")
        assert line.count("\n") == 1


def test_a_run_reads_back_as_it_was_saved(tmp_path):
    saved = parsed(tmp_path, "data: '010'\nloss: {clip: null}", "--preset=digits")
    assert config.load(tmp_path / "run") == saved
    again = command.parse(
        "amdim", ["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "another")]
    )[0]
    assert again == saved
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_settings_that_a_runs_file_lacks_are_said(tmp_path, caplog):
    saved = parsed(tmp_path, "optim: {lr: 0.25}")
    path = tmp_path / "run" / "config.yaml"
    kept = [line for line in path.read_text().splitlines(keepends=True) if not line.startswith("  lr:")]
    assert config.load(path.parent) == saved
    assert not caplog.records
    path.write_text("".join(kept))
    assert config.load(path.parent).optim.lr == AMDIMConfig().optim.lr != 0.25
    assert caplog.messages == [f"{path} lacks settings, which have their defaults: optim.lr {AMDIMConfig().optim.lr}"]


@pytest.fixture
def broken(tmp_path):
    """A run whose files are no files of a run; what each command says names the file."""
    parsed(tmp_path, "seed: 1")
    run = tmp_path / "run"
    (run / "log.jsonl").write_text('{"step": 1}\n')
    (run / "eval.json").write_text("{}")
    (run / "fine-tuned.safetensors").write_bytes(b"x")
    return run


DAMAGE = [
    ("config.yaml", b"", ["eval"]),
    ("config.yaml", b"- 1\n", ["eval"]),
    ("config.yaml", b"\xff", ["fine-tune"]),
    ("config.yaml", b"method: byol\n", ["eval"]),
    ("config.yaml", b"method: amdim\nextra: 1\n", ["eval"]),
    ("config.yaml", b"method: amdim\nseed: -1\n", ["eval"]),
    ("eval.json", b"{", ["compare"]),
    ("eval.json", b"{}", ["compare"]),
    ("eval.json", b"[]", ["compare"]),
]


@pytest.mark.parametrize(("name", "content", "argv"), DAMAGE)
def test_a_damaged_file_of_a_run_is_one_line_with_its_name(broken, capsys, name, content, argv):
    (broken / name).write_bytes(content)
    assert cli.main([*argv, str(broken)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fused-nce: {broken / name}: ")


def test_damaged_logs_and_classifiers_are_named(broken):
    from fused_nce.train import export, teacher

    (broken / "log.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"log\.jsonl holds no step"):
        runlog.read_log(broken)
    with pytest.raises(ValueError, match=r"fine-tuned\.safetensors: cannot be used: SafetensorError: "):
        teacher.classes(str(broken))
    (broken / "config.json").write_text(json.dumps({"run": {"method": "amdim", "seed": "x"}}))
    with pytest.raises(ValueError, match=r"config\.json: cannot be used: .*seed"):
        export.load_encoder(broken)


def planted(monkeypatch, line, file="fused_nce/planted.py"):
    """A command that is a line of a file."""
    path = str(Path(cli.__file__).parents[1] / file)
    text = f"def main(argv):\n    {line}\n"
    monkeypatch.setitem(linecache.cache, path, (len(text), None, text.splitlines(True), path))
    code: dict[str, Any] = {}
    exec(compile(text, path, "exec"), code)
    monkeypatch.setattr(command, "main", code["main"])


@pytest.mark.parametrize("kind", ["ValueError", "TypeError", "RuntimeError", "OSError", "ImportError", "MemoryError"])
def test_what_is_refused_is_one_line_and_status_2(monkeypatch, capsys, kind):
    planted(monkeypatch, f"raise {kind}('seed: must be 1,\\ngot \\x1b[2J')")
    assert cli.main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "seed: must be 1, got \\x1b[2J" in line


def test_a_package_that_is_missing_is_named_with_the_command_that_adds_it(monkeypatch, capsys):
    planted(monkeypatch, "import nowhere_at_all")
    monkeypatch.setattr(sys.modules["fused_nce.doctor"], "missing", lambda: {"train": ["safetensors", "tqdm"]})
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err.endswith("No module named 'nowhere_at_all'; add: pip install safetensors tqdm\n")


SLIPS = {
    "IndexError": "[][1]", "KeyError": "{}['x']", "ValueError": "int('x')", "AssertionError": "assert 0",
    "TypeError": "len(1)", "RuntimeError": "import torch; torch.zeros(2) @ torch.zeros(3)",
}  # fmt: skip


def test_an_error_of_another_package_is_a_bug(monkeypatch):
    planted(monkeypatch, "raise ValueError('x')", "elsewhere/planted.py")
    assert cli.main(["train"]) == 1


@pytest.mark.parametrize("kind", SLIPS)
def test_a_bug_shows_its_traceback_and_says_so(monkeypatch, capsys, kind):
    planted(monkeypatch, SLIPS[kind])
    assert cli.main(["train"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith(f"fused-nce: this is a bug of fused_nce, please report it: {kind}: ")
    monkeypatch.setenv("FUSED_NCE_DEBUG", "1")
    with pytest.raises(eval(kind)):
        cli.main(["train"])


def test_nothing_that_steers_a_terminal_is_printed(tmp_path, capsys):
    assert files.printable("a\x1b[2Jb\n\u202ec\udcff é") == "a\\x1b[2Jb\\n\\u202ec\\udcff é"
    name = tmp_path / "a\x1b[2J\nb"
    assert cli.main(["train", "amdim", "--data", str(name), "--out", str(tmp_path / "r\x1b")]) == 2
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2J\\nb" in printed
    assert "\x1b" not in printed
    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        cli._log_to_terminal()
        line = root.handlers[0].format(logging.makeLogRecord({"msg": "image %s", "args": ("\x07\n",)}))
    finally:
        root.handlers = before
    assert line == "image \\x07\\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text(path, "first")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "second")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "first"


def test_settings_of_every_kind_are_typed_as_the_file_has_them(tmp_path):
    (tmp_path / "c.yaml").write_text("a: 0x10\nb: ['1', 1, x y, null]\nc: {d: 'yes'}\n")
    assert options.read(tmp_path / "c.yaml") == {"a": "0x10", "b": '["1", 1, "x y", null]', "c.d": "yes"}


@pytest.mark.parametrize(("rank", "size"), command.RANKS.items())
def test_a_rank_counts_only_among_several_processes(monkeypatch, rank, size):
    for name in (*command.RANKS, *command.RANKS.values()):
        monkeypatch.delenv(name, raising=False)
    assert command._first_process()
    for number, count, first in (("1", None, True), ("1", "1", True), ("1", "2", False), ("0", "2", True)):
        monkeypatch.setenv(rank, number)
        monkeypatch.setenv(size, count) if count else monkeypatch.delenv(size, raising=False)
        assert command._first_process() == first
    monkeypatch.setenv(rank, "1")
    if rank != "RANK":  # a launcher's own place goes before that of the job around it
        monkeypatch.setenv("RANK", "0")
        for count in "12":
            monkeypatch.setenv("WORLD_SIZE", count)
            assert command._first_process()
