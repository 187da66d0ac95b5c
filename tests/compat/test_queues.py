"""Other projects' queues, read where they are and gone on with."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_nce.compat import moco, pml
from fused_nce.compat.queues import memory_queue


class Encoder(nn.Module):
    """(N, 5) to (N, num_classes)."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.fc = nn.Linear(5, num_classes)

    def forward(self, x):
        return self.fc(x)


class Bank(nn.Module):
    """lightly's buffers."""

    bank: torch.Tensor
    bank_ptr: torch.Tensor

    def __init__(self, size, dim):
        super().__init__()
        self.register_buffer("bank", nn.functional.normalize(torch.randn(size, dim), dim=1), persistent=False)
        self.register_buffer("bank_ptr", torch.tensor([size - 2]), persistent=False)


def test_moco_goes_on_in_the_same_slots():
    """The builder, its state and a parallel model's state: keys in rows; then each takes the same batches."""
    torch.manual_seed(0)
    net = moco.MoCo(Encoder, dim=4, K=7)
    net(torch.randn(3, 5), torch.randn(3, 5))
    parallel = {f"module.{name}": x for name, x in net.state_dict().items()}
    queues = [memory_queue(net), memory_queue(net.state_dict()), memory_queue(parallel, "module.")]
    before = net.queue.clone()
    net(torch.randn(6, 5), torch.randn(6, 5))
    new = [(3 + i) % 7 for i in range(6)]
    for queue in queues:
        assert torch.equal(queue.keys, before.T)
        assert (int(queue.pointer), int(queue.fill)) == (3, 7)
        queue.update(net.queue.T[new])
        assert torch.equal(queue.keys, net.queue.T)
        assert int(queue.pointer) == int(net.queue_ptr)


def test_lightly_as_a_module_a_loss_or_a_persistent_state():
    bank = Bank(6, 3)
    loss = nn.Module()
    loss.add_module("memory_bank", bank)
    state = {"criterion.bank": bank.bank, "criterion.bank_ptr": bank.bank_ptr}
    for queue in (memory_queue(bank), memory_queue(loss), memory_queue(state, "criterion.")):
        assert torch.equal(queue.keys, bank.bank)
        assert (int(queue.pointer), int(queue.fill)) == (4, 6)
        assert queue.labels is None
        queue.update(torch.ones(3, 3))
        assert queue.keys[:1].eq(1).all()
    assert not bank.bank.eq(1).any()


@pytest.mark.parametrize("batches", [(3,), (3, 4), (3, 5, 2)])
def test_a_memory_with_labels(batches):
    """pytorch-metric-learning's: half full, full to the last slot, wrapped; by the module, our state and upstream's."""
    memory = pml.CrossBatchMemory(pml.NTXentLoss(), 3, 7)
    for n in batches:
        memory(torch.randn(n, 3), torch.randint(0, 2, (n,)))
    total = sum(batches)
    upstream = dict(memory.state_dict())  # a plain dict has no metadata
    for source in (memory, memory.state_dict(), upstream):
        queue = memory_queue(source)
        fill = min(total, 7)
        assert int(queue.fill) == fill
        # Upstream saves no pointer: of a full memory it is not known, and 0 as good as any.
        assert int(queue.pointer) == (total % 7 if source is not upstream or total <= 7 else 0)
        assert torch.equal(queue.keys[:fill], memory.embedding_memory[:fill])
        assert queue.labels is not None
        assert torch.equal(queue.labels[:fill], memory.label_memory[:fill])
        assert (queue.labels[fill:] == -1).all()
        torch.testing.assert_close(queue.keys[fill:].norm(dim=1), torch.ones(7 - fill))


def test_what_is_no_queue_is_refused():
    with pytest.raises(ValueError, match=r"^source: got keys bias, weight, need queue, bank or embedding_memory of"):
        memory_queue(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=r"^source: got Linear, need queue"):
        memory_queue(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^source: got a bank of shape \(0,\), need \(K, D\)"):
        memory_queue({"bank": torch.empty(0), "bank_ptr": torch.zeros(1)})


@pytest.mark.nightly
def test_the_packages_own():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed", exc_type=ImportError)
    upstream = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    loss = lightly.NTXentLoss(0.2, memory_bank_size=(9, 4))
    loss(torch.randn(4, 4, requires_grad=True), torch.randn(4, 4))
    queue = memory_queue(loss)
    assert torch.equal(queue.keys, loss.memory_bank.bank)
    assert int(queue.pointer) == int(loss.memory_bank.bank_ptr) == 4
    memory = upstream.CrossBatchMemory(upstream.NTXentLoss(), 4, 9)
    memory(torch.randn(5, 4), torch.randint(0, 2, (5,)))
    for source in (memory, memory.state_dict()):
        queue = memory_queue(source)
        assert (int(queue.pointer), int(queue.fill)) == (5, 5)
        assert torch.equal(queue.keys[:5], memory.embedding_memory[:5])
