"""MoCo's builder: what a trainer sees of its logits, the queue, the state, and several processes."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils import _pytree as pytree

from fused_nce.compat import moco
from tests.compat.harness import both

CROSS_ENTROPY = nn.functional.cross_entropy


class Encoder(nn.Module):
    """Features, BatchNorm and a last layer called fc."""

    def __init__(self, num_classes=8, width=6):
        super().__init__()
        self.body, self.norm, self.fc = nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, num_classes)

    def forward(self, x):
        """(N, 5) to (N, num_classes)."""
        return self.fc(self.norm(self.body(x)).relu())


def model(seed=0, **options):
    torch.manual_seed(seed)
    return moco.MoCo(Encoder, **{"dim": 8, "K": 37, **options})


def views(n=10, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, generator=g) for _ in range(2)]


@both
def test_the_loss_is_cross_entropy_of_the_logits(at):
    """Of any reduction, by the encoder's parameters."""
    seed, pick = at.seed, at.pick
    net = model(seed, dim=pick.choice((3, 8)), K=pick.randint(1, 40), T=pick.choice((0.07, 0.5)), mlp=seed % 2 == 0)
    net = net.to(at.dtype)
    out, labels = net(*(x.to(at.dtype) for x in views(pick.randint(2, 9), seed)))
    reduction = pick.choice(("mean", "sum", "none"))
    losses = [nn.CrossEntropyLoss(reduction=reduction)(x, labels) for x in (out, out.full().double())]
    grads = [torch.autograd.grad(x.sum(), list(net.encoder_q.parameters()), retain_graph=True) for x in losses]
    within = 1e-4 if at.dtype == torch.float32 else 1e-9
    torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=within, atol=within)
    largest = max(float(x.abs().max()) for x in grads[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=within, atol=within * largest)
    assert labels.tolist() == [0] * len(out)


def test_what_is_asked_of_the_logits_holds_none_of_them(monkeypatch, caplog):
    """A trainer's accuracy: the same classes as of the logits, across panels too."""
    monkeypatch.setattr(moco, "PANEL", 9)
    out, labels = model()(*views())
    full = out.full()
    monkeypatch.setattr(moco.MoCoLogits, "full", lambda _: pytest.fail("the logits were made"))
    for k in (1, 5, 9):
        values, classes = out.topk(k, 1, True, True)
        assert torch.equal(classes, full.topk(k)[1])
        torch.testing.assert_close(values, full.topk(k)[0])
        torch.testing.assert_close(
            torch.autograd.grad(values.sum(), out._q, retain_graph=True),
            torch.autograd.grad(full.topk(k)[0].sum(), out._q, retain_graph=True),
        )
    assert torch.equal(torch.topk(out, 5)[1], full.topk(5)[1])
    assert torch.equal(out.argmax(dim=1), full.argmax(1))
    assert torch.equal(torch.topk(input=out, k=5)[1], full.topk(5)[1])
    assert torch.equal(torch.argmax(input=out, dim=1), full.argmax(1))
    assert (out.shape, out.size(1), len(out), out.dim(), out.ndim) == (full.shape, 38, 10, 2, 2)
    assert (out.dtype, out.device, out.requires_grad, out.detach().requires_grad) == (
        full.dtype,
        full.device,
        True,
        False,
    )
    assert out.float() is out
    torch.testing.assert_close(CROSS_ENTROPY(out.detach(), labels), CROSS_ENTROPY(full, labels).detach())
    assert not caplog.records


def test_all_else_is_asked_of_the_real_logits(caplog):
    out, labels = model()(*views())
    full = out.full()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(out[:, 0], full[:, 0])
    assert "holding the (10, 38) logits for indexing" in caplog.text
    for ask in (
        lambda x: x.softmax(dim=1),
        lambda x: torch.log_softmax(x, 1),
        lambda x: 2 * x + 1,
        lambda x: x / 3 - 1,
        lambda x: x.topk(2, 0)[0],
        lambda x: CROSS_ENTROPY(x, labels.clone()),
        lambda x: CROSS_ENTROPY(x, labels, label_smoothing=0.1),
        lambda x: CROSS_ENTROPY(x, labels, weight=torch.rand(38, generator=torch.Generator().manual_seed(0))),
    ):
        assert torch.equal(ask(out), ask(full))
    plain, _ = model(logits="full")(*views())
    assert torch.equal(plain, full)
    with pytest.raises(AttributeError):
        _ = out._nothing
    places = (torch.empty(10, 2), torch.empty(10, 2, dtype=torch.int64))
    assert torch.equal(torch.topk(out.detach(), 2, out=places)[1], full.topk(2)[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_labels_that_were_written_to_are_read(mode):
    """Also of what was made of the logits before and after; a copy of the labels is no less written to."""
    with mode():
        out, labels = model()(*views())
        before = out.detach()
        labels[:2] = -100
        exact = CROSS_ENTROPY(out.full(), labels)
        assert exact != out.cross_entropy()
        moved, twin = pytree.tree_map_only(torch.Tensor, torch.clone, out), copy.deepcopy(out)
        several = (out, labels), (before, labels), (out.detach(), labels), (moved, moved.labels), (twin, twin.labels)
        for made, at in several:
            assert CROSS_ENTROPY(made, at) == exact
        twin = copy.deepcopy(model()(*views())[0])
        assert CROSS_ENTROPY(twin, twin.labels) == twin.cross_entropy()


def test_the_queue_wraps_without_dropping():
    """Columns are keys, in order, over the oldest; of a batch larger than the queue the last stay."""
    net = model(K=11)
    seen = []
    for step, n in enumerate((4, 4, 4, 7, 30, 1)):
        images = views(n + 1, step)  # one alone has no BatchNorm
        out, _ = net(*images)
        seen.append(out._k)
        everyone = torch.cat(seen)
        ring = (torch.arange(len(everyone)) % 11)[-11:]
        torch.testing.assert_close(net.queue[:, ring], everyone[-11:].T)
        assert net.queue_ptr.tolist() == [len(everyone) % 11]
    assert net.queue.shape == (8, 11)


def test_the_logits_are_those_before_the_queue_moved_on():
    net = model(K=12)
    before = net.queue.clone()
    out, _ = net(*views())
    torch.testing.assert_close(out.full()[:, 1:], out._q @ before / net.T)
    net(*views(seed=2))
    torch.testing.assert_close(out.full()[:, 1:], out._q @ before / net.T)


def test_the_key_encoder_follows():
    net = model(m=0.9)
    with torch.no_grad():
        for x in net.encoder_q.parameters():
            x.add_(1.0)
    old = [x.clone() for x in net.encoder_k.parameters()]
    net(*views())
    for before, after, target in zip(old, net.encoder_k.parameters(), net.encoder_q.parameters(), strict=True):
        torch.testing.assert_close(after, 0.9 * before + 0.1 * target)
        assert not after.requires_grad


def test_upstreams_state_loads_and_copies_are_whole():
    """The keys are encoder_q.*, encoder_k.*, queue (dim, K) and queue_ptr (1,): no more, no fewer."""
    net, other = model(0, mlp=True), model(1, mlp=True)
    state = net.state_dict()
    parts = {f"encoder_{side}.{name}" for side in "qk" for name in net.encoder_q.state_dict()}
    assert set(state) == {"queue", "queue_ptr"} | parts
    assert (state["queue"].shape, state["queue_ptr"].shape, state["queue_ptr"].dtype) == ((8, 37), (1,), torch.int64)
    other.load_state_dict(state)
    for twin in (other, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        losses = [CROSS_ENTROPY(*copy.deepcopy(x)(*views())) for x in (net, twin)]
        assert torch.equal(*losses)


def test_splits_have_batch_statistics_of_their_own():
    """The keys return to their places, encoded in groups of other images than their queries are."""
    net = model(bn_splits=5)
    groups = []
    net.encoder_k.norm.register_forward_pre_hook(lambda _, x: groups.append(x[0]))
    images = views()
    out, _ = net(*images)
    assert [len(x) for x in groups] == [2] * 5
    body = net.encoder_k.body(images[1])
    order = torch.cdist(torch.cat(groups), body).argmin(dim=1)
    assert order.tolist() != list(range(10))
    assert sorted(order.tolist()) == list(range(10))
    norm = [nn.functional.batch_norm(body[at], None, None, training=True) for at in order.split(2)]
    keys = torch.empty(10, 8).index_copy_(0, order, net.encoder_k.fc(torch.cat(norm).relu()))
    torch.testing.assert_close(out._k, nn.functional.normalize(keys, dim=1), rtol=1e-4, atol=1e-5)


def _process(rank, size, store, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    net = model(K=10)
    net.encoder_q.eval(), net.encoder_k.eval()
    torch.manual_seed(rank)  # the order must still be one
    images = [x[3 * rank : 3 * rank + 3] for x in views(6)]
    logits, labels = net(*images)
    CROSS_ENTROPY(logits, labels)
    out[rank] = {"k": logits._k, "queue": net.queue, "ptr": net.queue_ptr}
    torch.distributed.destroy_process_group()


def test_two_processes_share_one_queue(tmp_path):
    """Each gets its own keys back; both enqueue the keys of both, in order of rank."""
    with mp.Manager() as manager:
        out = manager.dict()
        mp.start_processes(_process, (2, tmp_path / "store", out), nprocs=2, start_method="fork")
        found = [out[rank] for rank in range(2)]
    alone = model(K=10)
    alone.encoder_q.eval(), alone.encoder_k.eval()
    logits, _ = alone(*views(6))
    torch.testing.assert_close(torch.cat([x["k"] for x in found]), logits._k)
    for x in found:
        torch.testing.assert_close(x["queue"], alone.queue)
        assert x["ptr"].tolist() == [6]
