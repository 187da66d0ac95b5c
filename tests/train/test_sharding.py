"""FSDP2 in the loop: DDP's numbers, and checkpoints in parts that are written beside the training, for any reader."""

import json
import os
import signal
import time
from typing import Any

import pytest
from torch import multiprocessing

from fused_nce import cli
from fused_nce.train.loop import Diverged
from fused_nce.train.saving import checkpoint
from tests.train.runs import TINY, differing, log
from tests.train.test_processes import PLAIN, go

pytestmark = pytest.mark.nightly  # launches processes
FSDP = "--run.shard=fsdp2"
MINI = [*(word for word in PLAIN if "backbone" not in word), "--batch-size=8"]
ADAM = ("--optim.name=adam", "--optim.lr=1e-3", "--optim.warmup_updates=50")
WAYS = {
    "simclr": [*MINI, "--optim.name=lars", "--optim.trust=0.02", "--optim.accumulate=2"],
    "moco": [*MINI, "--model.splits=1", "--model.queue_size=48", "--checkpoint-activations=true"],
    "amdim": [*TINY, "--precision=fp32", "--run.log_every=1", *ADAM],
}


def saved(run, step):
    path = run / "checkpoints" / f"step_{step:08d}"
    assert checkpoint.damage(path) is None
    names = ["model", "optimizer"] + ["probes"] * ("probes: true" in (run / "config.yaml").read_text())
    return {f"{name}/{k}": v for name in names for k, v in checkpoint.load_tensors(path, name).items()}


def test_muon_trains_weights_of_fewer_rows_than_processes(tmp_path):
    """The discriminator ends in one: torch keeps no shards of it in what is computed from them."""
    options = ["--preset=digits", "--batch-size=8", "--run.log_every=1", "--run.threads=1", "--precision=fp32"]
    losses = []
    for name, sharded in (("whole", []), ("parts", [FSDP])):
        out = tmp_path / name
        go(tmp_path / f"of-{name}", 2, "aae", *options, "--optim.name=muon", f"--out={out}", "--max-steps=4", *sharded,
           patched=False)  # fmt: skip
        losses.append([line["loss"] for line in log(out)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_run_has_ddps_losses_and_weights_and_every_reader_takes_its_checkpoints(tmp_path, way):
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", [*WAYS[way], "--run.keep=9"]
    go(tmp_path / "0", 2, way, *options, f"--out={whole}", "--max-steps=4", patched=False)
    go(tmp_path / "1", 2, way, *options, f"--out={parts}", "--max-steps=4", FSDP, patched=False)
    assert [line["loss"] for line in log(parts)] == pytest.approx([line["loss"] for line in log(whole)], rel=1e-4)
    assert differing(saved(parts, 4), saved(whole, 4), rtol=1e-3, atol=1e-5) == []
    names = {path.name for path in (parts / "checkpoints/step_00000004").iterdir()}
    assert {f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)} | {
        "MANIFEST.json",
        "state.json",
    } == names
    model = checkpoint.load_model(parts)[0]
    assert differing({f"model/{k}": v for k, v in model.state_dict().items()},
                     {k: v for k, v in saved(parts, 4).items() if k.startswith("model/")}) == []  # fmt: skip
    # Two go on exactly; one takes it up as a whole, and two its file in parts again.
    again = tmp_path / "again"
    go(tmp_path / "2", 2, way, *options, f"--out={again}", "--max-steps=2", FSDP, patched=False)
    go(tmp_path / "3", 2, way, f"--resume={again}", "--max-steps=4", patched=False)
    assert differing(saved(again, 4), saved(parts, 4)) == []
    go(tmp_path / "4", 1, way, f"--resume={again}", "--max-steps=5", patched=False)
    assert (again / "checkpoints/step_00000005/model.safetensors").is_file()
    go(tmp_path / "5", 2, way, f"--resume={again}", "--max-steps=6", patched=False)
    assert log(again)[-1]["step"] == 6
    assert len(list((again / "checkpoints/step_00000006").glob("shard-*"))) == 2


def test_it_is_evaluated(tmp_path):
    run = tmp_path / "run"
    go(tmp_path / "0", 2, "amdim", *TINY, f"--out={run}", "--max-steps=8", FSDP, patched=False)
    assert cli.main(["eval", str(run), "--protocols", "knn", "--baselines", "false", "--cost", "false"]) == 0
    found = json.loads((run / "eval.json").read_text())["probes"]
    assert all(20 < row["accuracy_pct"] <= 100 for row in found)  # chance is 10


def slowly(run):
    """Writing takes longer than an update; says which updates were made meanwhile."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer: Any = HuggingFaceStorageWriter
    real, update = writer.write_data, run._update

    def write(*given):
        time.sleep(0.4)
        return real(*given)

    writer.write_data = write

    def noted(*given):
        pending = run.writer.pending
        result = update(*given)
        if pending is not None and not pending.done():
            (run.run_dir / f"meanwhile-{run.step}").touch()
        return result

    run._update = noted


def test_a_checkpoint_has_the_numbers_of_its_step_though_the_training_goes_on(tmp_path):
    run, steps = tmp_path / "run", range(1, 6)
    often = ["--run.save_minutes=0", "--run.keep=9", FSDP]
    go(tmp_path / "0", 2, "simclr", *WAYS["simclr"], f"--out={run}", "--max-steps=5", *often, hook=slowly)
    assert {path.name for path in run.glob("meanwhile-*")} == {f"meanwhile-{step}" for step in steps[1:]}
    for step in steps:
        straight = tmp_path / f"straight{step}"
        go(tmp_path / f"{step}", 2, "simclr", *WAYS["simclr"], f"--out={straight}", f"--max-steps={step}", FSDP)
        assert differing(saved(run, step), saved(straight, step)) == []


def killed(run):
    """The first process dies in the middle of its third checkpoint."""
    real = checkpoint.fingerprint

    def dying(path):
        if run.step >= 3 and ".tmp" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path)

    checkpoint.fingerprint = dying


def full(run, which=2):
    """The second process has no room for one of its checkpoints, the second unless told otherwise."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer: Any = HuggingFaceStorageWriter
    real, calls = writer.write_data, []

    def write(*given):
        calls.append(given)
        if len(calls) == which and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return real(*given)

    writer.write_data = write


def test_a_save_that_is_killed_or_fails_loses_no_checkpoint(tmp_path):
    for name, hook in (("killed", killed), ("full", full)):
        run = tmp_path / name
        often = [*WAYS["simclr"], f"--out={run}", "--max-steps=6", "--run.save_minutes=0", "--run.keep=9", FSDP]
        if hook is full:
            found = go(tmp_path / f"{name}0", 2, "simclr", *often, hook=hook)
            said = [line for line in found[0]["said"] if "checkpoint not saved" in line]
            assert len(said) == 1
            assert "No space left on device" in said[0]
            assert [int(path.name[5:]) for path in checkpoint.steps(run)] == [1, 3, 4, 5, 6]
            continue
        with pytest.raises((multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException)):
            go(tmp_path / f"{name}0", 2, "simclr", *often, hook=hook)
        assert checkpoint.newest(run).name == "step_00000002"
        assert len(list((run / "checkpoints").glob(".tmp-*-step_00000003"))) == 1
        go(tmp_path / f"{name}1", 2, "simclr", f"--resume={run}")
        assert log(run)[-1]["step"] == 6
        assert not list((run / "checkpoints").glob(".tmp-*"))


def without_data(run):
    """The second process cannot read on, while the first checkpoint is being written."""
    slowly(run)
    batches, type(run.loader).streamed = run.loader.batches, True

    def ending(position):
        real = batches(position)
        yield next(real)
        yield next(real)
        assert not run.writer.pending.done()
        if os.environ["RANK"] == "1":
            raise ValueError("no more data")
        yield next(real)

    run.loader.batches = ending


def test_data_that_end_while_a_checkpoint_is_written_leave_a_whole_one(tmp_path):
    run = tmp_path / "run"
    often = [*WAYS["simclr"], f"--out={run}", "--max-steps=6", "--run.save_minutes=0", FSDP]
    with pytest.raises(multiprocessing.ProcessRaisedException, match=r"no more data|another process cannot read"):
        go(tmp_path / "0", 2, "simclr", *often, hook=without_data)
    assert checkpoint.newest(run).name == "step_00000001"
    assert not list((run / "checkpoints").glob(".tmp-*"))


def diverging(run):
    """The loss is not finite while the first checkpoint is being written, for which there is no room."""
    full(run, which=1)
    slowly(run)
    real, ended = run._update, run.run

    def update(*given):
        if run.step == 1:
            assert not run.writer.pending.done()
            raise Diverged("not finite")
        return real(*given)

    def expected():
        with pytest.raises(Diverged, match="not finite"):
            ended()

    run._update, run.run = update, expected


def test_a_loss_that_is_not_finite_waits_for_the_checkpoint_that_is_being_written(tmp_path):
    options = [*WAYS["simclr"], f"--out={tmp_path / 'run'}", "--max-steps=6", "--run.save_minutes=0", FSDP]
    for found in go(tmp_path / "0", 2, "simclr", *options, hook=diverging):
        said = [line for line in found["said"] if "checkpoint not saved" in line]
        assert len(said) == 1
        assert "No space left on device" in said[0]
    assert list((tmp_path / "run/checkpoints").iterdir()) == []  # the room is given back
