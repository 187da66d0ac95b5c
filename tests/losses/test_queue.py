"""The ring of keys against a list of everything that ever went in."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from fused_nce import MemoryQueue, moco_nce
from tests.refusals import unlike

FLOAT: Any = 2.0


def contents(queue):
    """The keys from the oldest to the newest."""
    fill, pointer = int(queue.fill), int(queue.pointer)
    order = [(pointer - fill + i) % queue.size for i in range(fill)]
    return queue.keys[order]


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_batch_size_wraps_without_loss(size, dtype):
    torch.manual_seed(0)
    queue, seen = MemoryQueue(size, 3, dtype=dtype, labels=True), torch.empty(0, 3)
    labels = torch.empty(0, dtype=torch.int64)
    for i, batch in enumerate((3, 1, 5, 2, 17, 4, 8)):
        new = torch.randn(batch, 3)
        queue.update(new, torch.full((batch,), i))
        seen, labels = torch.cat((seen, new)), torch.cat((labels, torch.full((batch,), i)))
        assert torch.equal(contents(queue), seen[-size:].to(dtype))
        kept = queue.state_dict()["labels"]
        assert sorted(kept[kept >= 0].tolist()) == sorted(labels[-size:].tolist())
        assert int(queue.fill) == min(size, len(seen))
        assert queue.filled().shape[0] == min(size, len(seen))


def test_until_it_has_turned_it_holds_unit_vectors():
    queue = MemoryQueue(16, 8)
    queue.update(torch.nn.functional.normalize(torch.randn(3, 8), dim=1))
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(16))
    queue.reset()
    assert int(queue.fill) == int(queue.pointer) == 0
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(16))


def test_state_continues_where_it_was():
    torch.manual_seed(0)
    one, two = (MemoryQueue(5, 3, labels=True) for _ in range(2))
    one.update(torch.randn(7, 3), torch.arange(7))
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    for queue in (one, two):
        queue.update(torch.ones(3, 3), torch.zeros(3, dtype=torch.int64))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_compiled_step_has_no_break_and_equals_eager():
    torch._dynamo.reset()
    torch.manual_seed(0)
    queues = [MemoryQueue(12, 4), MemoryQueue(12, 4)]
    queues[1].load_state_dict(queues[0].state_dict())

    def step(queue, q, k):
        loss = moco_nce(q, k, queue.keys, backend="chunked").loss
        queue.update(k)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (5, 4, 7):
        q, k = torch.randn(2, batch, 4)
        losses = [f(queue, q, k) for f, queue in zip((step, compiled), queues, strict=True)]
        torch.testing.assert_close(losses[0], losses[1])
        assert torch.equal(queues[0].keys, queues[1].keys)


ERRORS = [
    (lambda: MemoryQueue(0, 3), ValueError, r"^size: got 0, need >= 1$"),
    (lambda: MemoryQueue(FLOAT, 3), TypeError, r"^size: got float, need an int$"),
    (lambda: MemoryQueue(2, 3, dtype=torch.int8), TypeError, r"^dtype: got torch.int8, need float64, .*$"),
    (lambda: MemoryQueue(2, 3).update(torch.ones(2, 4)), ValueError, r"^keys: got width D = 4, need .* 3$"),
    (lambda: MemoryQueue(2, 3).update(torch.ones(2, 3), torch.arange(2)), ValueError, r"^labels: got some, .*$"),
    (lambda: MemoryQueue(2, 3, labels=True).update(torch.ones(2, 3)), ValueError, r"^labels: got none, .*$"),
]


def test_messages():
    assert unlike(ERRORS) == []
