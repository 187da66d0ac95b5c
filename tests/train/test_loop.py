"""The loop: exact resume, skipped updates, signals, logs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as TF

from fused_nce.train import checkpoint, command, loader, rng, step
from fused_nce.train.loop import Diverged, Trainer

TINY = [
    "--preset=digits",
    "--model.ndf=4",
    "--model.n_rkhs=16",
    "--model.n_depth=1",
    "--batch-size=8",
    "--run.log_every=4",
]
TIMES = {"time_s", "images_per_s", "loss_share", "loss_ms", "peak_memory_mb"}
KEYS = TIMES | {"step", "epoch", "loss", "nce", "nce_minus_chance", "penalty", "top1", "linear_acc", "mlp_acc", "lr"}


def trainer(out, *argv):
    return Trainer(*_positional(command.parse([*TINY, "--out", str(out), *argv])))


def resumed(out, *argv):
    settings, run_dir, resume = command.parse(["--resume", str(out), *argv])
    return Trainer(settings, run_dir, resume=resume)


def _positional(parsed):
    return parsed[:2]


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tensors(out, step):
    folder = out / "checkpoints" / f"step_{step:08d}"
    return {f"{p.stem}/{k}": v for p in folder.glob("*.safetensors") for k, v in load_file(p).items()}


def untimed(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.mark.parametrize("extra", [[], ["--optim.accumulate=2"], ["--precision=fp32", "--optim.schedule=step"]])
def test_resume_is_exact(tmp_path, extra):
    """13 updates at once against 6 and 7: weights, moments, classifiers and log, bit by bit."""
    assert trainer(tmp_path / "a", "--max-steps=13", *extra).run() == "finished"
    trainer(tmp_path / "b", "--max-steps=6", *extra).run()
    torch.manual_seed(999)  # nothing may depend on the state of the new process
    again = resumed(tmp_path / "b", "--max-steps=13")
    assert again.step == 6
    again.run()
    ours, theirs = tensors(tmp_path / "b", 13), tensors(tmp_path / "a", 13)
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[0] for name in ours} == {"model", "optimizer", "probes"}
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert untimed(log(tmp_path / "b")) == untimed(log(tmp_path / "a"))


def test_resume_is_exact_for_images_that_are_read_as_they_go(tmp_path, monkeypatch):
    for i in range(24):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        values = torch.randint(256, (3, 40, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        TF.to_pil_image(values).save(folder / f"{i}.png")
    monkeypatch.setattr(loader, "decoded_bytes", lambda source, size: 1 << 40)
    extra = ["--data", str(tmp_path / "images"), "--augment.geometry=crop", "--run.workers=1"]
    trainer(tmp_path / "a", "--max-steps=5", *extra).run()
    trainer(tmp_path / "b", "--max-steps=2", *extra).run()
    resumed(tmp_path / "b", "--max-steps=5", "--run.workers=0").run()
    ours, theirs = tensors(tmp_path / "b", 5), tensors(tmp_path / "a", 5)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.parametrize("dropped", ["rng", "optimizer", "position", "meter"])
def test_each_part_of_the_state_matters(tmp_path, dropped, monkeypatch):
    """Controls for the test above: leaving one part out changes the result."""
    trainer(tmp_path / "a", "--max-steps=7").run()
    trainer(tmp_path / "b", "--max-steps=3").run()
    if dropped == "rng":
        monkeypatch.setattr(rng, "restore", lambda state: None)
    if dropped == "optimizer":
        monkeypatch.setattr(checkpoint, "unpack_optimizer", lambda optimizer, values: None)
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
    run.optimizer.step = lambda: grads.update({n: p.grad.clone() for n, p in run.module.named_parameters()})
    state = torch.get_rng_state()
    buffers = [b.clone() for b in run.module.buffers()]
    run._update(run.loader.batches(0), False)
    torch.set_rng_state(state)
    for buffer, value in zip(run.module.buffers(), buffers, strict=True):
        buffer.data.copy_(value)
    batches = run.loader.batches(0)
    for _ in range(2):
        images, labels, _ = next(batches)
        (run.module(*run.views(images), labels)[0] / 2).backward()
    for name, p in run.module.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-6)


class Poison:
    """The views of some updates are NaN."""

    def __init__(self, views, bad):
        self.views, self.bad, self.calls = views, bad, 0

    def __call__(self, images):
        self.calls += 1
        one, two = self.views(images)
        return (one * float("nan"), two) if self.calls in self.bad else (one, two)


def test_updates_that_are_not_finite_are_skipped_without_a_trace(tmp_path):
    run = trainer(tmp_path / "a", "--max-steps=8")
    run.views = Poison(run.views, {3, 4, 5})
    run.run()
    assert run.skipped == 3
    assert log(tmp_path / "a")[-1]["skipped"] == 3
    saved = tensors(tmp_path / "a", 8)
    assert all(bool(v.isfinite().all()) for v in saved.values())
    assert int(saved["model/encoder.head5.out_norm.num_batches_tracked"]) == 2 * 5


def test_a_run_without_a_single_update_is_no_success(tmp_path, capsys, monkeypatch):
    run = trainer(tmp_path / "a", "--max-steps=3")
    run.views = Poison(run.views, {1, 2, 3})
    with pytest.raises(Diverged, match="all 3 updates were skipped"):
        run.run()
    assert checkpoint.steps(tmp_path / "a") == []
    whole = Trainer.__init__

    def poisoned(self, *args, **options):
        whole(self, *args, **options)
        self.views = Poison(self.views, bad)

    monkeypatch.setattr(Trainer, "__init__", poisoned)
    bad = {1, 2, 3}
    assert command.main(["amdim", *TINY, "--max-steps=3", "--out", str(tmp_path / "b")]) == 1
    assert "all 3 updates were skipped" in capsys.readouterr().err
    bad = {2}
    assert command.main(["amdim", *TINY, "--max-steps=3", "--out", str(tmp_path / "c")]) == 0
    assert "1 of 3 updates skipped (loss or gradient not finite)" in capsys.readouterr().out


def test_a_broken_probe_does_not_hold_up_the_encoder(tmp_path):
    """With every gradient of the probes infinite, the encoder goes through the very weights of a healthy run."""
    healthy = trainer(tmp_path / "a", "--max-steps=5")
    healthy.run()
    run = trainer(tmp_path / "b", "--max-steps=5")
    before = {name: p.clone() for name, p in run.probes.state_dict().items()}
    run.probes.linear.weight.register_hook(lambda grad: grad * float("inf"))
    run.run()
    assert (run.skipped, run.probes_skipped) == (0, 5)
    assert log(tmp_path / "b")[-1]["probes_skipped"] == 5
    ours, theirs = run.model.state_dict(), healthy.model.state_dict()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert [k for k, v in run.probes.state_dict().items() if not torch.equal(v, before[k])] == []
    assert command.lost(run) == ", the online probes skipped 5"


@pytest.mark.parametrize("pairs", ["1>5,1>7,5>5", "1>5", "7>7", "5>7", "1>1"])
def test_ddp_is_told_of_unused_parameters_exactly_where_there_are_some(tmp_path, pairs):
    run = trainer(tmp_path / "a", f"--loss.pairs=[{pairs}]")
    images, labels, _ = next(run.loader.batches(0))
    run.module(*run.views(images), labels)[0].backward()
    unused = [name for name, p in run.module.named_parameters() if p.grad is None]
    assert step.leaves_some_unused(run.config.loss.pairs) == bool(unused)
    assert run.accelerator.ddp_handler.find_unused_parameters == bool(unused)


def test_the_fourth_in_a_row_stops_with_a_dump_and_without_a_checkpoint(tmp_path):
    run = trainer(tmp_path / "a", "--max-steps=20")
    run._save()
    run.views = Poison(run.views, {3, 4, 5, 6})
    with pytest.raises(Diverged, match=r"not finite for 4 updates in a row \(step 6"):
        run.run()
    assert [p.name for p in checkpoint.steps(tmp_path / "a")] == ["step_00000000"]
    dump = json.loads((tmp_path / "a" / "nan_dump" / "step_00000006_rank_0.json").read_text())
    assert len(dump["images"]) == 8
    rng.restore(dump["rng"])


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_0_and_the_run_resumes(tmp_path, number):
    out = tmp_path / "a"
    command_line = [
        sys.executable,
        "-m",
        "fused_nce.cli",
        "train",
        "amdim",
        *TINY,
        "--epochs=100000",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert time.monotonic() < deadline, "no log line in 120 s"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "interrupted at step" in printed
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


def distributed(*argv):
    """Two processes on this machine, over gloo."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "fused_nce.cli",
    ]
    done = subprocess.run(
        [*launch, "train", "amdim", *map(str, argv)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.nightly  # launches ten processes; beside a second test worker one once aborted at exit
def test_two_processes_train_resume_exactly_and_refuse_to_be_one(tmp_path):
    for out, first in (("a", "6"), ("b", "3")):
        status, printed = distributed(*TINY, f"--out={tmp_path / out}", f"--max-steps={first}")
        assert status == 0, printed
    status, printed = distributed(f"--resume={tmp_path / 'b'}", "--max-steps=6")
    assert status == 0, printed
    ours, theirs = tensors(tmp_path / "b", 6), tensors(tmp_path / "a", 6)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert untimed(log(tmp_path / "b")) == untimed(log(tmp_path / "a"))
    with pytest.raises(ValueError, match="was saved by 2 processes; got 1, need the same"):
        resumed(tmp_path / "a")


@pytest.mark.nightly  # as above
@pytest.mark.parametrize("pairs", ["1>5", "7>7"])
def test_two_processes_train_pairs_that_leave_a_head_unused(tmp_path, pairs):
    status, printed = distributed(*TINY, f"--loss.pairs=[{pairs}]", f"--out={tmp_path / 'a'}", "--max-steps=4")
    assert status == 0, printed
    assert log(tmp_path / "a")[-1]["step"] == 4
