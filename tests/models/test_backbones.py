"""Encoders by name, heads, and BatchNorm over parts of a batch."""

import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_nce.models.encoders.backbones import backbone
from fused_nce.models.encoders.split_norm import SplitBatchNorm2d, split_batch_norm
from fused_nce.models.projected import projection


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
    model: Any = backbone("resnet18", stem="cifar")[0]
    seen = []
    model.layer1.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 64, 32, 32)]


@pytest.mark.parametrize(("name", "last"), [("mini", "bn2"), ("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_branches(name, last):
    """With every branch at zero a block is the ReLU of its shortcut; the other norms are as they were."""
    model, _ = backbone(name, init="zero")
    block: Any = [m for m in model.modules() if hasattr(m, "downsample") and m.downsample is not None][-1].eval()
    x = torch.rand(2, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), F.relu(block.downsample(x)))
    norms = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    zero = {path for path, layer in norms.items() if not layer.weight.any()}
    assert zero == {path for path in norms if path.endswith(f".{last}")}


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
    monkeypatch.setitem(sys.modules, "timm", None)
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


def test_split_norm_is_batch_norm_of_each_part():
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(4)
    split: Any = nn.Sequential(nn.BatchNorm2d(4))
    split_batch_norm(split, 2)
    assert isinstance(split[0], SplitBatchNorm2d)
    assert split.state_dict().keys() == nn.Sequential(nn.BatchNorm2d(4)).state_dict().keys()
    x = torch.randn(6, 4, 5, 5).to(memory_format=torch.channels_last)
    assert torch.equal(split(x), torch.cat([plain(part) for part in x.chunk(2)]))
    var, mean = torch.var_mean(x.reshape(2, 3, 4, 5, 5), dim=(1, 3, 4))
    torch.testing.assert_close(split[0].running_mean, 0.1 * mean.mean(0))
    torch.testing.assert_close(split[0].running_var, 0.9 + 0.1 * var.mean(0))
    assert split[0].num_batches_tracked == 1
    split.eval()
    torch.testing.assert_close(split(x), F.batch_norm(x, split[0].running_mean, split[0].running_var))
    split.train()[0].momentum = None  # as the calibration of untrained encoders sets it: the plain mean
    split[0].reset_running_stats()
    for images in (x[:5], x[5:]):  # parts of 3 and 2, and a batch of fewer images than parts
        split(images)
    first = torch.stack([x[:3].mean((0, 2, 3)), x[3:5].mean((0, 2, 3))]).mean(0)
    torch.testing.assert_close(split[0].running_mean, (first + x[5:].mean((0, 2, 3))) / 2)
    sources = {norm.next_functions[0][0] for norm, _ in split(x.requires_grad_()).grad_fn.next_functions}
    assert len(sources) == 1, "one node: the gradient of a slice would fill a map of the whole batch for each part"
