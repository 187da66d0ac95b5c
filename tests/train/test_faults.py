"""What goes wrong around a run, and what is left of it: the failure table of docs/reliability.md, row by row."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from fused_nce import cli
from fused_nce.models.encoders import backbones
from fused_nce.train import command, config, loop
from fused_nce.train.loop import Trainer
from fused_nce.train.machine.interrupt import SAME_S, Interrupt
from fused_nce.train.monitor import journal
from fused_nce.train.saving import checkpoint, lock, trained_on
from tests.train.pictures import write_images
from tests.train.runs import TINY, differing, log, resumed, tensors, trainer

FULL = OSError(errno.ENOSPC, "No space left on device")


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- epochs and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "accumulate", "updates"), [(4, 2, 14), (1, 4, 1), (3, 4, 5), (2, 14, 1)])
def test_epochs_are_counted_in_batches(tmp_path, epochs, accumulate, updates):
    write_images(tmp_path / "images", 56)  # 7 batches of 8
    run = trainer(
        tmp_path / "a", f"--data={tmp_path / 'images'}", f"--epochs={epochs}", f"--optim.accumulate={accumulate}",
        "--run.log_every=1", "--probes=false",
    )  # fmt: skip
    assert run.end == updates
    run.run()
    assert [line["epoch"] for line in log(tmp_path / "a")] == [
        round((i + 1) * accumulate / 7, 4) for i in range(updates)
    ]


def test_more_passes_than_batches_are_refused(tmp_path):
    write_images(tmp_path / "images", 56)
    with pytest.raises(ValueError, match=r"optim\.accumulate: must be at most the 14 batches of 2 epochs, got 15"):
        trainer(tmp_path / "a", f"--data={tmp_path / 'images'}", "--epochs=2", "--optim.accumulate=15")


def spoil(path):
    (path / "model.safetensors").write_bytes(b"")


def test_only_whole_checkpoints_count_and_the_one_just_written_stays(tmp_path):
    def save(step):
        checkpoint.save(tmp_path, step, {"model": {"x": torch.full((3,), float(step))}}, {"step": step}, keep=2)
        return [int(path.name[5:]) for path in checkpoint.steps(tmp_path)]

    assert [save(step) for step in (2, 4, 6)] == [[2], [2, 4], [4, 6]]
    for path in checkpoint.steps(tmp_path):
        if path.name != "step_00000004":
            spoil(path)
    checkpoint.save(tmp_path, 8, {"model": {"x": torch.zeros(1)}}, {}, keep=2)
    spoil(checkpoint.steps(tmp_path)[-1])
    assert save(5) == [4, 5, 6, 8]  # back from the damaged ones: neither 4 nor 5 goes
    assert checkpoint.newest(tmp_path).name == "step_00000005"
    assert save(6) == [5, 6, 8]
    assert save(8) == [6, 8]
    assert [checkpoint.damage(path) for path in checkpoint.steps(tmp_path)] == [None, None]


def test_a_run_goes_back_behind_damage_and_its_new_checkpoints_stay(tmp_path):
    whole = trainer(tmp_path / "a", "--max-steps=6", "--run.save_minutes=0", "--run.keep=3")
    whole.run()
    wanted = {key: value.clone() for key, value in tensors(tmp_path / "a", 6).items()}  # else mapped from the file
    for path in checkpoint.steps(tmp_path / "a")[-2:]:
        spoil(path)
    again = resumed(tmp_path / "a", "--run.keep=2", "--max-steps=5", "--run.save_minutes=99")
    assert again.step == 4
    again.run()
    assert checkpoint.newest(tmp_path / "a").name == "step_00000005"
    resumed(tmp_path / "a", "--max-steps=6").run()
    assert differing(tensors(tmp_path / "a", 6), wanted) == []


def test_layers_that_share_a_weight_are_saved(tmp_path):
    layer = torch.nn.Linear(3, 3)
    shared = torch.nn.ModuleDict({"a": layer, "b": torch.nn.Sequential(layer), "c": torch.nn.Linear(3, 3)})
    checkpoint.save(tmp_path, 1, {"model": shared.state_dict()}, {}, keep=2)
    other = torch.nn.ModuleDict({"a": (again := torch.nn.Linear(3, 3)), "b": torch.nn.Sequential(again)})
    other["c"] = torch.nn.Linear(3, 3)
    checkpoint.load_into(other, checkpoint.load_tensors(checkpoint.newest(tmp_path), "model"), "x")
    assert differing(other.state_dict(), shared.state_dict()) == []


# --- before the first update --------------------------------------------------------------------------------------

BASE = ["--preset=digits", "--batch-size=4", "--max-steps=1", "--model.image_size=32"]
UNFIT = [("vit_b_32", "AssertionError: Wrong image height"), ("inception_v3", "RuntimeError: ")]


@pytest.mark.parametrize(("name", "words"), UNFIT)
def test_an_encoder_that_does_not_fit_the_images_is_named_before_the_first_update(tmp_path, capsys, name, words):
    out = f"--out={tmp_path / 'run'}"
    assert cli.main(["train", "simclr", *BASE, f"--model.backbone={name}", out]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fused-nce: model: {name} cannot be trained on batches of 4 inputs of 3 x 32 x 32: {words}")
    assert not (tmp_path / "run").exists()


class Odd(torch.nn.Module):
    """An encoder whose output is no tensor, whose weights cannot be saved, or whose pass fails in training alone."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = torch.nn.Linear(3 * 32 * 32, 16), how
        if how == "unsaved":
            self.register_buffer("table", torch.zeros(2).to_sparse())

    def forward(self, x):
        y = self.layer(x.flatten(1))
        if self.training and self.how == "tuple":
            return SimpleNamespace(logits=y)
        if self.training and self.how == "batch":
            raise ValueError("Expected more than 1 value per channel when training")
        return y


@pytest.mark.parametrize("how", ["tuple", "batch", "unsaved", "fine"])
def test_what_cannot_be_trained_or_saved_ends_before_the_first_update(tmp_path, capsys, monkeypatch, how):
    monkeypatch.setattr(backbones, "_torchvision", lambda name: (Odd(how), 16))
    argv = ["train", "simclr", *BASE, "--model.backbone=odd", f"--out={tmp_path / 'run'}"]
    assert cli.main(argv) == (0 if how == "fine" else 2)
    if how != "fine":
        assert "model: odd cannot be trained on batches of 4" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_rehearsal_leaves_no_trace(tmp_path, monkeypatch):
    trainer(tmp_path / "a", "--max-steps=3", "--model.use_bn=true").run()
    monkeypatch.setattr(loop, "rehearse", lambda *_: {})
    trainer(tmp_path / "b", "--max-steps=3", "--model.use_bn=true").run()
    assert differing(tensors(tmp_path / "a", 3), tensors(tmp_path / "b", 3)) == []


@pytest.mark.parametrize("name", ["googlenet"])
def test_torchvisions_classifiers_with_a_second_output_are_encoders(name):
    model, width = backbones.backbone(name)
    assert model.train()(torch.zeros(2, 3, 64, 64)).shape == (2, width)


def test_the_environment_has_no_say_in_a_step(tmp_path, monkeypatch, caplog):
    trainer(tmp_path / "a", "--max-steps=2").run()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    trainer(tmp_path / "b", "--max-steps=2").run()
    assert differing(tensors(tmp_path / "a", 2), tensors(tmp_path / "b", 2)) == []
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is not followed" in caplog.text
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"ACCELERATE_USE_FSDP: must be unset for this trainer"):
        trainer(tmp_path / "c")


# --- data ---------------------------------------------------------------------------------------------------------


def test_a_resume_on_other_data_or_to_an_earlier_end_says_so_and_changes_no_file(tmp_path, capsys):
    write_images(tmp_path / "images", 24)
    out = tmp_path / "run"
    assert cli.main(["train", "amdim", *TINY, f"--data={tmp_path / 'images'}", "--max-steps=2", f"--out={out}"]) == 0
    (tmp_path / "images" / "a" / "0.png").unlink()
    (tmp_path / "images" / "b").rename(tmp_path / "images" / "c")
    before = content(out)
    assert cli.main(["train", "amdim", f"--resume={out}", "--max-steps=3"]) == 2
    said = capsys.readouterr().err
    changes = "images 24 -> 23; classes gone: b; classes new: c; images of classes: a 12 -> 11"
    assert f"have changed since step 2 ({changes})" in said
    assert content(out) == before
    again = ["train", "amdim", f"--resume={out}", "--allow-changed", "data"]
    for said in ("\nfinished at step 3", "\nnothing left to train: finished at step 3"):
        assert cli.main([*again, "--max-steps=3"]) == 0
        assert said in capsys.readouterr().out
        assert log(out)[-1]["step"] == 3  # in a window that is not full
    assert cli.main([*again, "--max-steps=2"]) == 2
    assert "(run.max_steps, optim.epochs) is update 2, need at least the 3 that" in capsys.readouterr().err


def test_what_changed_in_words():
    def found(names, labels, digest="d", teacher="t"):
        loader = SimpleNamespace(classes=names, labels=torch.tensor(labels), count=len(labels), digest=digest)
        return trained_on.facts(loader, {"teacher": teacher})

    old = found(["a", "b"], [0, 0, 1, -1])
    own = {"count": 4, "classes": {"a": 2, "b": 1}, "digest": "d"}
    assert old == {**own, "beside": {"teacher": "t"}, "seeded": None} == json.loads(json.dumps(old))
    for new, words in (
        (old, []),
        (found(["a", "b"], [0, 0, 1, -1], "e"), ["names or labels of some images, with the same counts"]),
        (found(["a", "b"], [0, 1, 1, -1]), ["images of classes: a 2 -> 1, b 1 -> 2"]),
        (found(["b", "a"], [1, 1, 0, -1]), ["the order of the classes"]),
        (found(["a", "b"], [0, 0, 1]), ["images 4 -> 3"]),
        (found(["a", "b"], [0, 0, 1], teacher="u"), ["images 4 -> 3", "teacher"]),
    ):
        assert trained_on.changes(old, new) == words
        assert trained_on.changes({}, new) == []  # a checkpoint of an earlier version
    assert trained_on.changes(old | {"rate": 8000}, old | {"rate": 16000}) == ["Hz 8000 -> 16000"]
    assert trained_on.changes(own, old | {"rate": 16000}) == []  # a checkpoint that knows no more of its data


# --- the disk -----------------------------------------------------------------------------------------------------


def test_a_log_that_cannot_be_written_is_said_and_the_lines_after_it_are_whole(tmp_path, monkeypatch, caplog):
    real, calls = os.write, []

    def full(file, data):
        calls.append(file)
        if len(calls) == 1:
            raise FULL
        return real(file, data[:3]) if len(calls) == 2 else real(file, data)

    book = journal.Journal(tmp_path, 0)
    monkeypatch.setattr(os, "write", full)
    for step in (1, 2, 3):
        book.write({"step": step, "loss": float("nan")})
    monkeypatch.undo()
    book.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 3, "loss": null}\n'
    assert "a line could not be written ([Errno 28]" in caplog.text
    assert "lacks 2 lines" in caplog.text


def test_a_log_without_its_folder_closes_no_file_of_others(tmp_path):
    """A descriptor that is closed twice is by then that of a reader's pipe, say, and the run hangs at its end."""
    (tmp_path / "a").mkdir()
    book = journal.Journal(tmp_path / "a", 0)
    shutil.rmtree(tmp_path / "a")
    book.write({"step": 1})
    with (tmp_path / "other").open("w") as other:
        for step in (2, 3):
            book.write({"step": step})
        other.write("whole")
        other.flush()
    assert (tmp_path / "other").read_text() == "whole"
    (tmp_path / "a").mkdir()
    book.write({"step": 4})
    book.close()
    assert book.lost == 3
    assert log(tmp_path / "a") == [{"step": 4}]


def test_the_readers_end_with_the_run_whoever_keeps_its_frame(tmp_path, monkeypatch):
    """As an error of TensorBoard's thread does, whose traceback has the loop's frame."""
    write_images(tmp_path / "images", 24)
    words = ("--max-steps=1", "--run.workers=1", "--augment.geometry=crop", "--probes=false")
    run = trainer(tmp_path / "a", f"--data={tmp_path / 'images'}", *words)
    opened = run.loader.batches
    kept = []

    def batches(position):
        kept.append(opened(position))
        return kept[-1]

    monkeypatch.setattr(run.loader, "batches", batches)
    run.run()
    with pytest.raises(StopIteration):
        next(kept[0])


def test_tensorboard_that_fails_is_left_out(tmp_path, caplog, monkeypatch):
    run = trainer(tmp_path / "a", "--max-steps=8")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", lambda *args: (_ for _ in ()).throw(FULL))
    assert run.run() == "finished"
    assert [line["step"] for line in log(tmp_path / "a")] == [4, 8]
    assert caplog.text.count("TensorBoard: no more events are written") == 1


def test_a_log_keeps_its_other_lines_where_one_is_damaged(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n\xff\n{"step": 2}\n{"step": 9}\n{"st')
    journal.Journal(tmp_path, 4).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_full_disk_while_weights_are_written_is_an_error_of_the_disk(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*given):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: .*No space left"):
        checkpoint.save(tmp_path, 1, {"model": {"x": torch.zeros(1)}}, {}, keep=2)
    assert checkpoint.steps(tmp_path) == []


def test_a_deleted_folder_is_made_anew_and_said(tmp_path, caplog):
    run = trainer(tmp_path / "a", "--max-steps=8", "--run.save_minutes=0", "--run.tensorboard=false")
    real, out = run._update, tmp_path / "a"

    def update(*args):
        if run.step == 3:
            os.system(f"rm -r {out}")
        return real(*args)

    run._update = update
    assert run.run() == "finished"
    assert "was deleted; it is made anew" in caplog.text
    assert command.lost(run) == ", its folder was deleted and made anew at step 4, without the log before"
    assert [line["step"] for line in log(out)] == [4, 8] or [line["step"] for line in log(out)] == [8]
    assert resumed(out, "--max-steps=9").step == 8


# --- who else is there --------------------------------------------------------------------------------------------


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    out = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from fused_nce.train.saving import lock\n"
        "lock.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    trainer(out, "--max-steps=1").run()
    lock.release(out)
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = content(out)
        for argv in ([f"--resume={out}"], [*TINY, f"--out={out}", "--overwrite"]):
            assert cli.main(["train", "amdim", *argv]) == 2
            assert f"out: {out} is being trained by process {other.pid} on " in capsys.readouterr().err
        assert content(out) == before
    finally:
        other.kill()
        other.wait()
    assert (out / lock.LOCK_NAME).exists()  # what a crash leaves behind holds nothing up
    assert cli.main(["train", "amdim", f"--resume={out}", "--max-steps=2"]) == 0
    assert not (out / lock.LOCK_NAME).exists()


def test_a_run_killed_before_its_first_line_does_not_block_its_folder(tmp_path):
    trainer(tmp_path / "a", "--max-steps=1")
    lock._held.clear()  # as after a kill: the file is there, and nobody holds it
    trainer(tmp_path / "a", "--max-steps=1").run()
    lock._held.clear()
    with pytest.raises(ValueError, match="holds a run already"):
        trainer(tmp_path / "a")


def test_a_run_that_fails_before_its_first_update_leaves_its_folder_free(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("kept")
    argv = ["train", "amdim", *TINY, "--max-steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", lambda *args: (_ for _ in ()).throw(FULL))
        for out in (tmp_path, tmp_path / "new"):
            assert cli.main([*argv, f"--out={out}"]) == 2
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine.txt").read_text() == "kept"
    assert cli.main([*argv, f"--out={tmp_path}"]) == 0


# --- signals and processes that die -------------------------------------------------------------------------------


def test_a_second_signal_within_a_save_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested
            interrupt._at -= 2 * SAME_S
            with interrupt.held():
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nohup_stays():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


SECOND = """
import os, signal, sys, time
from fused_nce.train.machine.interrupt import Interrupt
with Interrupt() as interrupt:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # at once: the same wish
    time.sleep(1.1)
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached", flush=True)
"""


def test_a_later_second_signal_ends_the_process():
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("alive\n", -signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_reader_that_dies_ends_the_run_with_all_of_it_saved(tmp_path, capsys, number):
    write_images(tmp_path / "images", 24)
    extra = [f"--data={tmp_path / 'images'}", "--augment.geometry=crop", "--run.workers=1", "--optim.accumulate=2"]
    trainer(tmp_path / "whole", *extra, "--max-steps=5").run()
    out, started = tmp_path / "run", time.monotonic()
    real = Trainer._passes

    def passes(self, batches):
        if self.step == 3:
            import multiprocessing

            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, number)
        return real(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_passes", passes)
        assert cli.main(["train", "amdim", *TINY, *extra, "--max-steps=5", f"--out={out}"]) == 2
    said = capsys.readouterr().err
    assert "data: a process that reads" in said
    assert "Traceback" not in said
    assert checkpoint.newest(out).name == "step_00000003"
    assert time.monotonic() - started < 100  # not the reader's time limit
    resumed(out, "--max-steps=5").run()
    assert differing(tensors(out, 5), tensors(tmp_path / "whole", 5)) == []


def test_images_that_another_process_cannot_read_end_this_one_with_its_run_saved(tmp_path):
    write_images(tmp_path / "images", 24)
    run = trainer(tmp_path / "a", f"--data={tmp_path / 'images'}", "--augment.geometry=crop", "--run.workers=0")
    real = run._agree
    run._together = False
    run._agree = lambda *flags: (run.step == 2,) if len(flags) == 1 else real(*flags)
    with pytest.raises(RuntimeError, match=r"data: another process cannot read .*; it says why"):
        run.run()
    assert checkpoint.newest(tmp_path / "a").name == "step_00000002"


def test_an_error_within_an_update_leaves_nothing_of_it(tmp_path, monkeypatch):
    trainer(tmp_path / "a", "--max-steps=4", "--optim.accumulate=2").run()
    run = trainer(tmp_path / "b", "--max-steps=4", "--optim.accumulate=2")
    real, calls = run._differentiate, []

    def differentiate(*args):
        calls.append(args)
        if len(calls) == 6:
            raise MemoryError("of the third update, second pass")
        return real(*args)

    run._differentiate = differentiate
    with pytest.raises(MemoryError):
        run.run()
    assert checkpoint.newest(tmp_path / "b").name == "step_00000002"
    resumed(tmp_path / "b").run()
    assert differing(tensors(tmp_path / "b", 4), tensors(tmp_path / "a", 4)) == []


def test_the_weights_of_half_an_update_are_not_saved(tmp_path):
    run = trainer(tmp_path / "a", "--max-steps=4", "--run.save_minutes=0")
    real = run.optimizers["optimizer"].step

    def step():
        real()
        if run.step == 2:
            raise RuntimeError("between an update and its count")

    run.optimizers["optimizer"].step = step
    with pytest.raises(RuntimeError, match="between"):
        run.run()
    assert checkpoint.newest(tmp_path / "a").name == "step_00000002"


def test_settings_are_written_only_where_a_resume_is_accepted(tmp_path, monkeypatch):
    trainer(tmp_path / "a", "--max-steps=1").run()
    lock.release(tmp_path / "a")
    before = content(tmp_path / "a")
    monkeypatch.setattr(checkpoint, "restore_rng", lambda state, place: (_ for _ in ()).throw(OSError("of another")))
    assert cli.main(["train", "amdim", f"--resume={tmp_path / 'a'}", "--run.keep=7"]) == 2
    assert content(tmp_path / "a") == before
    monkeypatch.undo()
    assert cli.main(["train", "amdim", f"--resume={tmp_path / 'a'}", "--run.keep=7"]) == 0
    assert config.load(tmp_path / "a").run.keep == 7
