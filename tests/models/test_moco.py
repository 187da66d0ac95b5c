"""MoCo: its formula, what its key encoder and queue become, and the order in which keys are encoded."""

import pytest
import torch
from torch.nn import functional as F

from fused_nce.losses.moco import oracle as moco_oracle
from fused_nce.models import processes
from tests.models.test_projected import moco, views


@pytest.mark.parametrize("symmetric", [False, True])
def test_moco_is_its_formula(symmetric):
    model = moco(symmetric=symmetric).eval()
    for p in model.key_encoder.parameters():
        p.data.mul_(1.01)
    one, two = views()
    loss = model((one, two)).loss

    def half(query, key):
        q, k = model.encode(query)["z"], model.key_encoder(key)
        return moco_oracle(q.double(), k.double(), model.queue.keys.double(), temperature=0.07)

    expected = (half(one, two) + half(two, one)) / 2 if symmetric else half(one, two)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_key_encoder_is_a_moving_average_of_parameters_alone():
    model = moco(layers=2)
    assert all(torch.equal(a, b) for a, b in zip(model.key_encoder.parameters(), ours(model), strict=True))
    assert not any(p.requires_grad for p in model.key_encoder.parameters())
    keys = [p.clone() for p in model.key_encoder.parameters()]
    statistic = model.key_encoder[0].bn1.running_mean.clone()
    for p in model.trained_parameters():
        p.data += 1
    model.after_step()
    for key, query, new in zip(keys, ours(model), model.key_encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * key + 0.1 * query)
    assert torch.equal(model.key_encoder[0].bn1.running_mean, statistic)
    model(views())  # its own pass moves it
    assert not torch.equal(model.key_encoder[0].bn1.running_mean, statistic)


def ours(model):
    return [*model.encoder.parameters(), *model.head.parameters()]


def test_the_queue_takes_unit_keys_after_the_step_and_wraps():
    model = moco()
    empty = model.queue.keys.clone()
    keys = []
    for seed in (1, 2):
        embedded = model.embed(views(seed=seed))
        assert embedded.inputs[2] is model.queue.keys
        keys.append(embedded.inputs[1])
        if seed == 1:
            assert torch.equal(model.queue.keys, empty)
        model.after_step()
    assert torch.equal(model.queue.keys[8:], keys[1][:4])  # 12 places: 8 keys, then 4 and 4
    assert torch.equal(model.queue.keys[:4], keys[1][4:])
    assert torch.equal(model.queue.keys[4:8], keys[0][4:])
    torch.testing.assert_close(model.queue.keys.norm(dim=1), torch.ones(12))


def test_accumulated_passes_are_one_step():
    model = moco(queue_size=32)
    for p in model.trained_parameters():
        p.data += 1
    key = next(model.key_encoder.parameters()).clone()
    for seed in (1, 2):
        model(views(seed=seed))
    model.after_step()
    assert int(model.queue.fill) == 16
    torch.testing.assert_close(next(model.key_encoder.parameters()), 0.9 * key + 0.1 * next(model.parameters()))


def test_keys_are_encoded_in_a_random_order_and_given_back_in_their_own():
    model = moco(splits=2)
    seen = []
    model.key_encoder.register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    _, two = views()
    keys = model.embed((two, two)).inputs[1]
    x, y = seen[0]
    assert not torch.equal(x, two)
    rows = [int((x == image).flatten(1).all(1).nonzero()) for image in two]
    assert sorted(rows) == list(range(8))
    torch.testing.assert_close(keys, F.normalize(y[rows], dim=1))


def test_a_shuffle_over_processes_comes_back(monkeypatch):
    """Two processes in one: what either would send is at hand."""
    x = torch.arange(12.0).reshape(6, 2)
    halves = x.chunk(2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    found = []
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "broadcast", lambda tensor, source: tensor.copy_(order))
    for rank in (0, 1):
        monkeypatch.setattr(processes.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "gathered", lambda part: x)
        mine, same = processes.shuffle(halves[rank])
        assert torch.equal(same, order)
        found.append(mine)
    both = torch.cat(found)
    assert torch.equal(both, x[order])
    for rank in (0, 1):
        monkeypatch.setattr(processes.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "gathered", lambda part: 10 * both)
        assert torch.equal(processes.unshuffle(found[rank], order), 10 * halves[rank])
