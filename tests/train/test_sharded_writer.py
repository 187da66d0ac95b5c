"""The writer of sharded checkpoints in one process: what it refuses, what a failed save leaves, who waits for it."""

import errno
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from fused_nce.train.loop import Diverged
from fused_nce.train.machine.interrupt import Interrupt
from fused_nce.train.methods.amdim import AMDIMConfig
from fused_nce.train.saving.saves import Saves
from fused_nce.train.saving.sharding import Writer
from tests.train.runs import trainer


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_save_while_another_is_pending_is_refused_and_leaves_it_alone(tmp_path, group):
    (tmp_path / "plain").touch()  # with the mode that the umask says
    mode = (tmp_path / "plain").stat().st_mode & 0o777
    go, kept = threading.Event(), []

    def complete(folder, step, state):
        assert go.wait(60)
        kept.append((step, [(path.name, path.stat().st_mode & 0o777) for path in folder.iterdir()]))

    (tmp_path / ".tmp-parts").mkdir()  # of a save that was killed
    writer = Writer(tmp_path, complete)
    values = {"model": {"weight": torch.ones(3)}}
    assert not (tmp_path / ".tmp-parts").exists()
    writer.save(1, values, {})
    name = writer.temporary
    with pytest.raises(RuntimeError, match="checkpoint: step 2 cannot be saved before `wait`"):
        writer.save(2, values, {})
    go.set()
    writer.wait()
    assert kept == [(1, [("shard-00001-model-00001-of-00001.safetensors", mode)])]
    writer.save(1, values, {})
    assert writer.temporary != name  # which another node may still know, as the folder that is a checkpoint by now
    writer.wait()
    assert [step for step, _ in kept] == [1, 1]
    assert not name.exists()


def test_a_disk_that_stays_full_ends_the_run_after_three_saves_that_fail_beside_it(tmp_path, group, caplog):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    interrupt, begun = Interrupt(), list[int]()
    writer, found = Writer(tmp_path, full), Saves(tmp_path, AMDIMConfig(), interrupt)

    def save():
        assert interrupt._held
        begun.append(len(begun) + 1)
        writer.save(begun[-1], {"model": {"weight": torch.ones(3)}}, {})

    for _ in range(3):
        found.due(writer.wait, save)
    with pytest.raises(OSError, match="checkpoint: 3 in a row could not be written"):
        found.due(writer.wait, save)
    assert (begun, writer.pending, interrupt._held) == ([1, 2, 3, 4], None, False)
    assert caplog.text.count("checkpoint not saved ([Errno 28] No space left on device") == 3
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_gives_its_room_back_at_once(tmp_path, group, monkeypatch):
    real = HuggingFaceStorageWriter.write_data

    def write(*given):
        real(*given).wait()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write)
    writer = Writer(tmp_path, lambda *given: None)
    writer.save(1, {"model": {"weight": torch.ones(3)}}, {})
    with pytest.raises(OSError, match="No space left on device"):
        writer.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "calls"), [(Diverged("not finite"), ["wait"]), (ValueError("no more data"), ["wait", "save", "wait"])]
)
def test_an_error_waits_for_the_checkpoint_that_is_being_written(tmp_path, caplog, error, calls):
    """A second one would take its folder, and the run's lock would be let go under it."""
    run, seen = trainer(tmp_path / "a", "--probes=false", "--max-steps=3"), []

    def wait():
        seen.append("wait")
        if len(seen) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def fail(*given):
        raise error

    def update(*given):
        run._update = fail
        return real(*given)

    real, run._update = run._update, update
    run.writer = SimpleNamespace(wait=wait, save=lambda *given: seen.append("save"))
    with pytest.raises(type(error), match=str(error)):
        run.run()
    assert seen == calls
    assert "checkpoint not saved ([Errno 28] No space left on device" in caplog.text
