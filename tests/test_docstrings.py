"""Docstrings of public names: each argument explained, the shape of each tensor, and an example that runs."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fused_nce
from fused_nce import models
from fused_nce.core.spec import LAYOUTS, TRANSFORMS
from fused_nce.core.statistics import STATISTIC
from fused_nce.core.tails import Nce
from fused_nce.losses.registry import LOSSES
from tests.marks import nightly_but

ROOT = Path(__file__).resolve().parent.parent
NO_TENSORS = {"__version__", "NCEOutput", "backends", "doctor", "last_path", "patch"}
NAMES = sorted(set(fused_nce.__all__) - NO_TENSORS)
IMAGES = torch.randn(2, 4, 3, 32, 32)
BATCHES = {  # what each model's example loops over
    **dict.fromkeys(("AAE", "BiGAN", "DIM", "PriorGenerator", "VAE"), IMAGES[0]),
    "CPC": torch.randn(2, 20480),
    "Distilled": IMAGES[0],
    **dict.fromkeys(("NAT", "NPID"), (IMAGES[0], torch.arange(4))),
    "SupCon": (*IMAGES, torch.arange(4) % 2),
}


def sections(thing):
    """Heading → what stands below it."""
    parts = re.split(r"^(Args|Shape|Returns|Raises|Attributes|Example):\n", inspect.getdoc(thing) or "", flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def explained(text):
    """Name → its line, of `a, b: …` too."""
    lines = re.findall(r"^    (\w[\w, *]*?)(?: \(.*\))?: (.*)", text, re.M)
    return {name.strip(" *"): rest for names, rest in lines for name in names.split(",")}


def parameters(function):
    """Its own, without self and what goes on to another."""
    ends = (inspect.Parameter.VAR_KEYWORD,)
    return [x for x in inspect.signature(function).parameters.values() if x.name != "self" and x.kind not in ends]


def code_of(thing):
    """Its first block."""
    return inspect.cleandoc((inspect.getdoc(thing) or "").split("```")[1].strip("\n"))


def test_every_loss_is_among_them():
    assert {x.__name__ for entry in LOSSES.values() for x in (entry.function, entry.module)} <= set(NAMES)


@pytest.mark.parametrize("name", [*NAMES, *models.__all__])
def test_arguments_and_shapes(name):
    thing: Any = getattr(fused_nce, name, None) or getattr(models, name)
    found = sections(thing)
    args = explained(found.get("Args", ""))
    entered = parameters(thing.__init__ if inspect.isclass(thing) else thing)
    entered = [x for x in entered if x.name != "args"]  # `*args` of a class without arguments
    assert not [x.name for x in entered if x.name not in args]
    if not inspect.isclass(thing):
        shaped = [x.name for x in entered if re.match(r"(Tensor|tuple\[Tensor)", str(x.annotation))]
        assert not [x for x in shaped if not re.match(r"\(\w", args[x])]
    elif name not in ("GradientCache", "MemoryQueue"):  # any inputs; Attributes and methods
        assert issubclass(thing, torch.nn.Module)
        shapes = explained(found.get("Shape", ""))
        entered = parameters(thing.forward)
        assert entered
        assert not [x.name for x in entered if x.name not in shapes and "each view" not in found["Shape"]]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "GradientCache"])
def test_an_example_runs(name):
    assert "Example" in sections(getattr(fused_nce, name))
    *lines, last = code_of(getattr(fused_nce, name)).splitlines()
    scope = {"torch": torch, **vars(fused_nce)}
    exec("\n".join(lines), scope)
    try:
        value = eval(last, scope)
    except SyntaxError:  # the last line is a statement
        exec(last, scope)
        value = None
    if last.endswith(".loss"):
        assert value.isfinite()


class Both(torch.nn.Linear):
    """An encoder of pairs of views."""

    def forward(self, views):
        return tuple(map(super().forward, views))


def test_the_gradient_caches_example_runs():
    scope: dict[str, Any] = {
        "GradientCache": fused_nce.GradientCache,
        "encoder": Both(3, 2),
        "loss": lambda views: fused_nce.nt_xent(*views),
        "view1": torch.randn(100, 3),
        "view2": torch.randn(100, 3),
        "optimizer": SimpleNamespace(step=lambda: None),
    }
    exec(code_of(fused_nce.GradientCache), scope)
    assert scope["encoder"].weight.grad.any()


@pytest.mark.parametrize("name", nightly_but(["NPID", "SimCLR"], models.__all__))
def test_a_models_loop_runs(name):
    scope = {
        "torch": torch,
        name: getattr(models, name),
        "loader": [BATCHES.get(name, IMAGES)],
        "optimizer": SimpleNamespace(zero_grad=lambda: None, step=lambda: None),
        "classifier": torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)),
    }
    exec(code_of(getattr(models, name)), scope)
    gradients = [x.grad for x in scope["model"].parameters() if x.requires_grad]
    assert any(x is not None and x.any() for x in gradients)


def test_the_page_of_the_api_has_every_name():
    """Public names, what a spec is made of, and the environment variables that the code reads."""
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    rendered = re.findall(r"^::: [\w.]+\.(\w+)$", page, re.M)
    assert {*fused_nce.__all__, *models.__all__} - {"__version__"} <= {*rendered}
    assert {x.__name__ for x in (*LAYOUTS.values(), *TRANSFORMS.values(), Nce)} <= {*rendered}
    code = [x for f in ("fused_nce", "csrc") for x in (ROOT / f).rglob("*") if x.suffix in (".py", ".cpp", ".h")]
    read = "".join(x.read_text(encoding="utf-8") for x in (*code, ROOT / "setup.py"))
    found = set(re.findall(r'(?:getenv|get|in|environ)\W{1,3}"(FUSED_NCE_\w+)"', read)) | {*STATISTIC}
    assert len(found) > len(STATISTIC) + 9
    assert sorted(name for name in found if not re.search(rf"`{name}[`=]", page)) == []
