"""Encoders by name: ours, torchvision's and timm's, each without its classifier: images to (B, width) vectors."""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import nn

from fused_nce.models.encoders.tiny import TinyResNet

Stem = Literal["imagenet", "cifar"]
Init = Literal["kaiming", "zero"]

OWN = {"tiny": 32, "mini": 16}  # name: channels of TinyResNet's first stage
TIMM = "timm/"


def backbone(name: str, *, stem: Stem = "imagenet", init: Init = "kaiming") -> tuple[nn.Module, int]:
    """An untrained encoder and the width of its vectors.

    Args:
        name: `"tiny"` or `"mini"` (ours), a classifier of torchvision (`"resnet50"`), or `"timm/NAME"`.
        stem: "cifar" gives a ResNet a 3×3 first convolution of stride 1 and no pooling after it, for 32 px.
        init: "zero" starts each residual branch at zero (the gain of its last norm; Goyal et al. 2017).

    Raises:
        ValueError: for a name that is none, or a stem or an init that the encoder has no place for.
        ImportError: if the package that has it is not installed.
    """
    model: nn.Module
    if name in OWN:
        model = TinyResNet(OWN[name])
        width = 8 * OWN[name]
    else:
        model, width = _timm(name.removeprefix(TIMM)) if name.startswith(TIMM) else _torchvision(name)
        if stem == "cifar":
            _cifar_stem(model, name)
    if init == "zero":
        zero_branches_(model, name)
    return model, width


def zero_branches_(model: nn.Module, name: str) -> None:
    """The last norm of every residual branch gets gain 0; a block is what has a `downsample`, and `bn2` or `bn3`."""
    blocks: list[Any] = [m for m in model.modules() if hasattr(m, "downsample") and hasattr(m, "bn2")]
    if not blocks:
        raise ValueError(f"init: 'zero' needs residual blocks with bn2, which {name} has not")
    for block in blocks:
        nn.init.zeros_((block.bn3 if hasattr(block, "bn3") else block.bn2).weight)  # fault: zero-branches-second


def _torchvision(name: str) -> tuple[nn.Module, int]:
    models: Any = _package("torchvision.models", name)
    if name not in models.list_models(module=models):
        raise ValueError(f"backbone: must be {', '.join(OWN)}, a torchvision classifier or timm/NAME, got {name!r}")
    # Their second classifiers, which only their supervised training has a use for, would make the output no tensor.
    plain = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model: nn.Module = models.get_model(name, weights=None, **plain)
    path, width = _classifier(model, name)
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model, width


def _classifier(model: nn.Module, name: str) -> tuple[str, int]:
    linears = [(path, m.in_features) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"backbone: {name} has no linear classifier to leave out; need one that has")
    return linears[-1]


def classifier(name: str) -> str:
    """Where a model of torchvision has its classifier: `fc`, or `classifier.6`."""
    with torch.device("meta"):
        return _classifier(_package("torchvision.models", name).get_model(name), name)[0]


def _timm(name: str) -> tuple[nn.Module, int]:
    timm: Any = _package("timm", TIMM + name)
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm has no model {name!r}")
    model = timm.create_model(name, pretrained=False, num_classes=0)
    return model, getattr(model, "head_hidden_size", None) or model.num_features


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"backbone: {name} needs {package}, which is not installed: pip install {package}") from error


def _cifar_stem(model: Any, name: str) -> None:
    if not (isinstance(getattr(model, "conv1", None), nn.Conv2d) and hasattr(model, "maxpool")):
        raise ValueError(f"stem: 'cifar' needs a ResNet, got backbone {name}")
    first = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = first, nn.Identity()
