"""MoCo, SimCLR, SupCon and NPID in a loop of one's own: sizes, what a batch becomes, what follows a step."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_nce.losses import sup_con
from fused_nce.losses.moco import oracle as moco_oracle
from fused_nce.losses.nt_xent import oracle as nt_xent_oracle
from fused_nce.models import NPID, MoCo, SimCLR, SupCon, processes
from fused_nce.models.encoders.backbones import backbone
from fused_nce.models.encoders.split_norm import SplitBatchNorm2d, split_batch_norm
from fused_nce.models.npid import MemoryBank, Proximal
from fused_nce.models.projected import projection

MINI = {"backbone": "mini", "dim": 16}


def views(count=8, seed=0):
    images = torch.randn(2, count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return images[0], images[1]


def moco(**settings):
    torch.manual_seed(0)
    return MoCo(**({**MINI, "queue_size": 12, "momentum": 0.9} | settings))


def batch_of(model, count=8, seed=0):
    indices = torch.arange(count)
    parts = {SupCon: (*views(count, seed), indices % 3), NPID: (views(count, seed)[0], indices)}
    return parts.get(type(model), views(count, seed))


MODELS = [lambda: moco(), lambda: SimCLR(**MINI), lambda: SupCon(**MINI), lambda: NPID(size=20, **MINI)]


# --- encoders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stem", "width", "parameters"),
    [
        ("resnet18", "imagenet", 512, 11_176_512),  # 11,689,512 with the classifier of 1,000 classes
        ("resnet18", "cifar", 512, 11_168_832),  # 11,173,962 with that of 10
        ("resnet50", "imagenet", 2048, 23_508_032),
        ("resnet50", "cifar", 2048, 23_500_352),  # 23,520,842 with 10 classes
        ("tiny", "imagenet", 256, 1_207_840),
    ],
)
def test_published_sizes(name, stem, width, parameters):
    with torch.device("meta"):
        model, found = backbone(name, stem=stem)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, width)
    assert found == width
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_cifar_stem_keeps_the_resolution():
    model, _ = backbone("resnet18", stem="cifar")
    seen = []
    model.layer1.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 64, 32, 32)]


@pytest.mark.parametrize("name", ["mini", "resnet18", "resnet50"])
def test_zero_branches(name):
    """With every branch at zero a block is the ReLU of its shortcut."""
    model, _ = backbone(name, init="zero")
    block = [m for m in model.modules() if hasattr(m, "downsample") and m.downsample is not None][-1].eval()
    x = torch.rand(2, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), F.relu(block.downsample(x)))


def test_other_classifiers_lose_their_last_layer():
    with torch.device("meta"):
        for name, width in (("vgg11", 4096), ("mobilenet_v3_small", 1024), ("vit_b_16", 768)):
            model, found = backbone(name)
            assert found == width == model.eval()(torch.empty(1, 3, 224, 224)).shape[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "resnet19"}, "backbone: must be tiny, mini, a torchvision classifier or timm/NAME, got 'resnet19'"),
        ({"name": "vgg11", "stem": "cifar"}, "stem: 'cifar' needs a ResNet, got backbone vgg11"),
        ({"name": "alexnet", "init": "zero"}, "init: 'zero' needs residual blocks with bn2, which alexnet has not"),
        ({"name": "squeezenet1_0"}, "backbone: squeezenet1_0 has no linear classifier"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(settings, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        backbone(**settings)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="backbone: timm/resnet18 needs timm, which is not installed"):
        backbone("timm/resnet18")


def test_heads():
    """MoCo v1, MoCo v2, SimCLR, SimCLR v2, as their papers have them."""
    kinds = {
        (1, False): ["Linear"],
        (2, False): ["Linear", "ReLU", "Linear"],
        (2, True): ["Linear", "BatchNorm1d", "ReLU", "Linear"],
        (3, True): ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"],
    }
    for (layers, norm), names in kinds.items():
        head = projection(64, None, 8, layers, norm=norm)
        assert [type(layer).__name__ for layer in head] == names
        assert (head[-1].bias is None) == norm
        assert head[-1].weight.shape == (8, 64)
    assert projection(64, 32, 8, 2, norm=False)[0].weight.shape == (32, 64)


# --- every model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MODELS)
def test_a_loop_of_ones_own_learns(make):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.trained_parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(model(batch_of(model)).loss)
        losses[-1].backward()
        optimizer.step()
        model.after_step()
    start = losses[1] if isinstance(model, MoCo) else losses[0]  # MoCo starts with two equal encoders
    assert max(losses[10:]) < 0.6 * start
    assert all(p.grad is not None for p in model.trained_parameters())


@pytest.mark.parametrize("make", MODELS)
def test_taps_and_the_injected_loss(make):
    class Sum(nn.Module):
        def forward(self, *inputs):
            total = inputs[0].sum()
            return SimpleNamespace(loss=total, nce=total, penalty=0 * total, stats={})

    model = make()
    taps = model.eval().encode(views()[0])
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {"h": (8, 128), "z": (8, 16)}
    model.loss = Sum()
    embedded = model.embed(batch_of(model))
    assert torch.equal(model(batch_of(model)).loss, embedded.inputs[0].sum())
    assert all(view["h"].shape == (8, 128) for view in embedded.taps)
    with pytest.raises(ValueError, match=r"x: must be \(B, 3, H, W\) images, got \(8, 1, 16, 16\)"):
        model.encode(torch.zeros(8, 1, 16, 16))


@pytest.mark.parametrize("make", [MODELS[0], MODELS[3]])
def test_a_skipped_step_leaves_no_trace_in_memory_or_keys(make):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(("mean", "var", "tracked"))}
    model(batch_of(model))
    model.after_step(skipped=True)
    after = model.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    model(batch_of(model))
    model.after_step()
    name = f"{model.memories[0]}.{'keys' if isinstance(model, MoCo) else 'vectors'}"
    assert int((model.state_dict()[name] != before[name]).any(1).sum()) == 8  # and not 16


def test_a_forgotten_after_step_is_an_error(monkeypatch):
    monkeypatch.setattr("fused_nce.models.base.MAX_PENDING", 3)
    model = moco()
    for _ in range(3):
        model(views())
    with pytest.raises(RuntimeError, match="after_step: not called for 3 passes"):
        model(views())


# --- MoCo ---------------------------------------------------------------------------------------------------------


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


def test_split_norm_is_batch_norm_of_each_part():
    torch.manual_seed(0)
    plain, split = nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))
    split_batch_norm(split, 2)
    assert isinstance(split[0], SplitBatchNorm2d)
    assert split.state_dict().keys() == nn.Sequential(nn.BatchNorm2d(4)).state_dict().keys()
    x = torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last)
    assert torch.equal(split(x), torch.cat([plain(part) for part in x.chunk(2)]))
    var, mean = torch.var_mean(x.reshape(2, 3, 4, 5, 5), dim=(1, 3, 4))
    torch.testing.assert_close(split[0].running_mean, 0.1 * mean.mean(0))
    torch.testing.assert_close(split[0].running_var, 0.9 + 0.1 * var.mean(0))
    assert int(split[0].num_batches_tracked) == 1
    split.eval()
    torch.testing.assert_close(split(x), F.batch_norm(x, split[0].running_mean, split[0].running_var))
    split.train()[0].momentum = None  # as the calibration of untrained encoders sets it: the plain mean
    split[0].reset_running_stats()
    for images in (x[:5], x[5:]):  # parts of 3 and 2, and a batch of fewer images than parts
        split(images)
    first = torch.stack([x[:3].mean((0, 2, 3)), x[3:5].mean((0, 2, 3))]).mean(0)
    torch.testing.assert_close(split[0].running_mean, (first + x[5:].mean((0, 2, 3))) / 2)


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
    monkeypatch.setattr(processes, "count", lambda: 2)
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


# --- SimCLR, SupCon, NPID -----------------------------------------------------------------------------------------


def test_simclr_is_its_formula_with_the_statistics_of_both_views():
    torch.manual_seed(0)
    model = SimCLR(**MINI)
    z = model.head(model.encoder(torch.cat(views()))).double().chunk(2)
    torch.testing.assert_close(model(views()).loss.double(), nt_xent_oracle(*z, temperature=0.5), rtol=1e-5, atol=1e-6)


def test_supcon_gives_each_view_its_images_label():
    torch.manual_seed(0)
    model, labels = SupCon(**MINI).eval(), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    z = torch.cat([model.encode(view)["z"] for view in views()])
    expected = sup_con(z, torch.cat((labels, labels)))
    torch.testing.assert_close(model((*views(), labels)).loss, expected.loss)
    with pytest.raises(ValueError, match="batch: must hold 2 views and labels, got 2 parts"):
        model(views())


def test_the_bank_moves_halfway_and_stays_on_the_sphere():
    torch.manual_seed(0)
    bank = MemoryBank(4000, 32)
    assert bank.vectors.norm(dim=1).mean() == pytest.approx(1, abs=0.02)
    assert bank.vectors.abs().max() <= (3 / 32) ** 0.5
    before = bank.vectors.clone()
    features, rows = F.normalize(torch.randn(3, 32), dim=1), torch.tensor([7, 2, 5])
    bank.update(features, rows)
    torch.testing.assert_close(bank.vectors[rows], F.normalize(0.5 * before[rows] + 0.5 * features, dim=1))
    rest = torch.ones(4000, dtype=torch.bool).scatter(0, rows, False)
    assert torch.equal(bank.vectors[rest], before[rest])


def test_npid_classifies_among_all_images_and_remembers_its_own():
    torch.manual_seed(0)
    model = NPID(size=20, **MINI)
    indices = torch.tensor([3, 19, 0, 7, 11, 2, 5, 13])
    before = model.bank.vectors.clone()
    features, bank, rows = model.embed((views()[0], indices)).inputs
    logits = features.double() @ before.double().T / 0.07
    torch.testing.assert_close(model.loss(features, bank, rows).loss.double(), F.cross_entropy(logits, indices))
    model.after_step()
    expected = F.normalize(0.5 * before[indices] + 0.5 * features, dim=1)
    torch.testing.assert_close(model.bank.vectors[indices], expected)
    with pytest.raises(ValueError, match=r"batch: must hold images and their indices, got lengths \[8, 3\]"):
        model((views()[0], indices[:3]))


def test_the_proximal_term_is_two_minus_twice_the_cosine():
    torch.manual_seed(0)
    features, bank = (F.normalize(torch.randn(n, 8), dim=1) for n in (4, 9))
    rows = torch.tensor([8, 0, 3, 3])
    plain = NPID(size=9, **MINI).loss
    out = Proximal(plain, 0.3)(features, bank, rows)
    pull = 0.3 * (2 - 2 * (features * bank[rows]).sum(1)).mean()
    torch.testing.assert_close(out.loss, plain(features, bank, rows).loss + pull)
    torch.testing.assert_close(out.penalty, pull)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MoCo(**MINI, momentum=1.5), r"momentum: must be in \[0, 1\], got 1.5"),
        (lambda: MoCo(**MINI, splits=0), "splits: must be at least 1, got 0"),
        (lambda: MoCo(**MINI, queue_size=0), "size: got 0, need >= 1"),
        (lambda: SimCLR(**MINI, layers=0), "layers, dim, hidden: must be at least 1, got 0, 16, None"),
        (lambda: NPID(size=0, **MINI), "size: must be at least 1 image, got 0"),
        (lambda: NPID(size=5, **MINI, momentum=1.0), r"momentum: must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_bad_number_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
