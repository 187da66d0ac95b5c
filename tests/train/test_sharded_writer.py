"""The writer of sharded checkpoints in one process: what it refuses, and what a failed save leaves."""

import errno
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from fused_nce.train.sharding import Writer


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_save_while_another_is_pending_is_refused_and_leaves_it_alone(tmp_path, group):
    go, kept = threading.Event(), []

    def complete(folder, step, state):
        assert go.wait(60)
        kept.append((step, [path.name for path in folder.iterdir()]))

    writer = Writer(tmp_path, complete)
    values = {"model": {"weight": torch.ones(3)}}
    writer.save(1, values, {})
    with pytest.raises(RuntimeError, match="checkpoint: step 2 cannot be saved before `wait`"):
        writer.save(2, values, {})
    go.set()
    writer.wait()
    assert kept == [(1, ["shard-00001-model-00001-of-00001.safetensors"])]
    writer.save(2, values, {})
    writer.wait()
    assert [step for step, _ in kept] == [1, 2]


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
