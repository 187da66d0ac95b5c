"""The loop: exact resume, signals, logs, checkpoints that cannot be written."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fused_nce.train import words
from fused_nce.train.data import loader
from fused_nce.train.saving import checkpoint
from fused_nce.train.saving.resumed import check_data
from tests.marks import nightly_but
from tests.train.pictures import write_images
from tests.train.runs import KEYS, TINY, assert_the_same, differing, log, resumed, tensors, trainer, untimed

WAYS = [[], ["--optim.accumulate=2"], ["--precision=fp32", "--optim.schedule=step"], ["--model.mixture=3"]]


@pytest.mark.parametrize("extra", nightly_but(WAYS[:1], WAYS))
def test_resume_is_exact(tmp_path, extra):
    """13 updates at once against 6 and 7: weights, moments, classifiers and log, bit by bit."""
    assert trainer(tmp_path / "a", "--max-steps=13", *extra).run() == "finished"
    trainer(tmp_path / "b", "--max-steps=6", *extra).run()
    torch.manual_seed(999)  # nothing may depend on the state of the new process
    again = resumed(tmp_path / "b", "--max-steps=13")
    assert again.step == 6
    again.run()
    assert_the_same(tmp_path / "b", tmp_path / "a", 13)
    kept = {name.split("/")[0] for name in tensors(tmp_path / "b", 13)}
    assert kept == {"model", "optimizer", "optimizer-adam", "probes"}


@pytest.mark.nightly
def test_resume_is_exact_for_images_that_are_read_as_they_go(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 24)
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)
    extra = ["--data", str(tmp_path / "images"), "--augment.geometry=crop", "--run.workers=1"]
    trainer(tmp_path / "a", "--max-steps=5", *extra).run()
    trainer(tmp_path / "b", "--max-steps=2", *extra).run()
    resumed(tmp_path / "b", "--max-steps=5", "--run.workers=0").run()
    assert differing(tensors(tmp_path / "b", 5), tensors(tmp_path / "a", 5)) == []


def test_crops_that_a_resume_draws_otherwise_are_said(caplog):
    """Those of held images come from the run's generator, those of others from a seed of each."""
    data = {"count": 1, "classes": {}, "digest": None, "beside": {}, "seeded": True}
    for before, said in ((True, 0), (None, 0), (False, 1)):
        check_data(Path("a"), {"step": 1, "data": {**data, "seeded": before}}, data, False)
        assert caplog.text.count("the images are read as they go, which were held: crops are not those") == said


@pytest.mark.parametrize("dropped", nightly_but(["rng", "optimizer"], ["rng", "optimizer", "position", "meter"]))
def test_each_part_of_the_state_matters(tmp_path, dropped, monkeypatch):
    """Controls for the test above: leaving one part out changes the result."""
    trainer(tmp_path / "a", "--max-steps=7").run()
    trainer(tmp_path / "b", "--max-steps=3").run()
    if dropped == "rng":
        monkeypatch.setattr(checkpoint, "restore_rng", lambda *_: None)
    if dropped == "optimizer":
        monkeypatch.setattr(checkpoint, "unpack_optimizer", lambda *_: None)
    again = resumed(tmp_path / "b", "--max-steps=7")
    if dropped == "position":
        before = again.loader.batches
        again.loader.batches = lambda position: before(0)
    if dropped == "meter":
        again.meter.sums.zero_()
    again.run()
    same = all(torch.equal(a, b) for a, b in zip(*(tensors(tmp_path / n, 7).values() for n in "ab"), strict=True))
    assert same == (dropped == "meter")
    assert untimed(log(tmp_path / "b")) != untimed(log(tmp_path / "a"))


def test_resume_after_a_kill_drops_the_lines_after_the_checkpoint(tmp_path):
    trainer(tmp_path / "a", "--max-steps=6").run()
    whole = (tmp_path / "a" / "log.jsonl").read_text()
    later = whole.splitlines()[0].replace('"step": 4', '"step": 99')
    (tmp_path / "a" / "log.jsonl").write_text(whole + later + '\n{"step": 10')
    resumed(tmp_path / "a", "--max-steps=8").run()
    assert [line["step"] for line in log(tmp_path / "a")] == [4, 8]


def test_log_lines(tmp_path):
    run = trainer(tmp_path / "a", "--max-steps=9")
    run.run()
    lines = log(tmp_path / "a")
    assert [line["step"] for line in lines] == [4, 8, 9]
    for line in lines:
        assert line.keys() >= KEYS
        assert all(line[key] is not None for key in KEYS)
        assert line["loss"] == pytest.approx(line["nce"] + line["penalty"], rel=1e-5)
        assert 0 < line["loss_share"] < 1
        assert line["images_per_s"] > 0
        assert 0 <= line["linear_acc"] <= 1
    assert (tmp_path / "a" / "tensorboard").is_dir()


def test_accumulation_averages_the_gradient(tmp_path):
    """Two passes of 8: the gradient of the mean of their losses."""
    run = trainer(tmp_path / "a", "--optim.accumulate=2", "--precision=fp32")
    grads = {}
    for optimizer in run.optimizers.values():
        optimizer.step = lambda: grads.update({n: p.grad.clone() for n, p in run.module.named_parameters()})
    state = torch.get_rng_state()
    buffers = [b.clone() for b in run.module.buffers()]
    run._update(run.loader.batches(0), False)
    torch.set_rng_state(state)
    for buffer, value in zip(run.module.buffers(), buffers, strict=True):
        buffer.data.copy_(value)
    batches = run.loader.batches(0)
    for _ in range(2):
        images, labels, _ = next(batches)
        (run.module(run.views(images), labels)[0] / 2).backward()
    for name, p in run.module.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    run = trainer(tmp_path / "a", "--max-steps=5", "--run.save_minutes=0")
    tries, real = [], checkpoint.save

    def full(*args, **options):
        tries.append(args[1])
        if len(tries) <= 2:
            raise OSError(28, "No space left on device")
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    run.run()
    assert tries == [1, 2, 3, 4, 5]
    assert checkpoint.newest(tmp_path / "a").name == "step_00000005"
    assert "No space left" in caplog.text
    assert "MB free" in caplog.text


def test_three_failed_checkpoints_in_a_row_stop_the_run(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    run = trainer(tmp_path / "a", "--max-steps=9", "--run.save_minutes=0")
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="checkpoint: 3 in a row could not be written"):
        run.run()


@pytest.mark.parametrize("way", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_run_resumes(tmp_path, way):
    run = trainer(tmp_path / "a", "--max-steps=9")
    update = run._update

    def signalled(*given):
        if run.step == 2:
            signal.raise_signal(getattr(signal, way))
        return update(*given)

    run._update = signalled
    assert run.run() == "interrupted"
    assert resumed(tmp_path / "a").step == 3


def test_ctrl_c_saves_and_exits_0_and_the_run_resumes(tmp_path):
    """It reaches the whole process group, the readers of images included."""
    out = tmp_path / "a"
    write_images(tmp_path / "images", 24)
    extra = ["--data", str(tmp_path / "images"), "--augment.geometry=crop", "--run.workers=1"]
    launch = [sys.executable, "-m", "fused_nce.cli", "train", "amdim", *TINY, *extra]
    process = subprocess.Popen(
        [*launch, "--epochs=100000", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert time.monotonic() < deadline, "no log line in 120 s"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "interrupted at step" in printed
    assert "Traceback" not in printed
    assert resumed(out).step == int(checkpoint.newest(out).name[5:]) >= 4


def test_a_time_limit_stops_the_run_and_saves(tmp_path):
    run = trainer(tmp_path / "a", "--max-minutes=0.00001")
    assert run.run() == "reached 1e-05 minutes"
    assert checkpoint.newest(tmp_path / "a").name == "step_00000001"


def test_an_injected_loss_without_statistics_trains_and_logs_null(tmp_path):
    from types import SimpleNamespace

    class Distance(torch.nn.Module):
        def forward(self, view1, view2):
            loss = sum((view1[k].float() - view2[k].float()).square().mean() for k in ("f1", "f5", "f7"))
            return SimpleNamespace(loss=loss, nce=loss.detach(), penalty=0 * loss.detach(), stats={})

    run = trainer(tmp_path / "a", "--max-steps=4")
    run.model.loss = Distance()
    run.run()
    line = log(tmp_path / "a")[-1]
    assert line["top1"] is None
    assert line["loss"] > 0


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "fused_nce")
    for name, updates, lines in (("a", 3, 0), ("b", 2, 1)):
        caplog.clear()
        trainer(tmp_path / name, "--optim.warmup_updates=3", f"--max-steps={updates}")
        said = "optim.warmup_updates 3: the run has 2 updates, and its rate does not come to optim.lr"
        assert caplog.messages.count(said) == lines


@pytest.mark.parametrize("above", [None, math.nan])
def test_the_bar_shows_the_loss_where_an_estimator_has_no_chance_level(above):
    line = {"loss": 1.25, "linear_acc": None, "images_per_s": 9.0, "loss_share": 0.5, "peak_memory_mb": 7.0}
    shown = words.postfix(line | {"nce_minus_chance": above})
    assert shown == {"loss": "1.250", "img/s": "9", "loss time": "50.0% of step", "peak": "7MB"}
    assert words.postfix(line | {"nce_minus_chance": -2.0}).get("nce-chance") == "-2.000"
