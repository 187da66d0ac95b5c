"""A pytest plugin: upstream's own suites, run where they lie, with the adapters in the place of upstream's classes.

    make test-upstream                                                              (all of them: `suites.py`)
    PYTHONPATH=HERE:HERE/tests/compat:PACKAGES pytest -p in_place tests/loss        (in a checkout of upstream's)

HERE is this repository and PACKAGES holds upstream's packages and what their suites import; UPSTREAM_ALONE=1 leaves
upstream's classes in place. sentence-transformers' suite takes models off the Hub: HF_HUB_OFFLINE=1 makes all of them
random ones. ADAPTERS_CALLED names a file that gets a line for each call of what `ADAPTERS` names, be it upstream's
or ours.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import random
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

RANKING = ("MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss", "GISTEmbedLoss")
ADAPTERS = {
    "lightly.loss": ("lightly", ("NTXentLoss", "DCLLoss", "DCLWLoss")),
    "lightly.loss.ntx_ent_loss": ("lightly", ("NTXentLoss",)),
    "lightly.loss.dcl_loss": ("lightly", ("DCLLoss", "DCLWLoss", "negative_mises_fisher_weights")),
    "open_clip.loss": ("open_clip", ("ClipLoss", "SigLipLoss")),
    "open_clip": ("open_clip", ("ClipLoss",)),
    "pytorch_metric_learning.losses": (
        "pml",
        ("NTXentLoss", "SupConLoss", "ContrastiveLoss", "TripletMarginLoss", "CrossBatchMemory", "SelfSupervisedLoss"),
    ),
    "pytorch_metric_learning.utils.distributed": ("pml", ("DistributedLossWrapper",)),
    "sentence_transformers.sentence_transformer.losses": (
        "sentence_transformers",
        (*RANKING, *(f"Cached{name}" for name in RANKING)),
    ),
    "solo.losses": ("solo", ("simclr_loss_func", "mocov2plus_loss_func", "mocov3_loss_func", "nnclr_loss_func")),
}
ALONE = bool(os.environ.get("UPSTREAM_ALONE"))
CALLED = os.environ.get("ADAPTERS_CALLED")
GLOO = 2  # processes, for which pytorch-metric-learning's suite asks that many GPUs


def pytest_configure() -> None:
    """Before a suite is collected: its imports find ours."""
    if Path("solo").is_dir():
        _solo()
    if Path("tests/sentence_transformer").is_dir() and os.environ.get("HF_HUB_OFFLINE"):
        _tiny_models()
    if not ALONE:
        register_module_forward_hook(_narrowed, with_kwargs=True)
    for name, (project, things) in ADAPTERS.items():
        try:
            theirs = importlib.import_module(name)
        except ImportError:
            continue
        source = theirs if ALONE else importlib.import_module(f"fused_nce.compat.{project}")
        for thing in things:
            setattr(theirs, thing, _noted(getattr(source, thing)))


@functools.cache
def _noted(thing: Any) -> Any:
    """The class or function, whose name is written down once it is called; a class that inherits from it is another."""
    kind, name = isinstance(thing, type), thing.__name__
    inner = thing.__init__ if kind else thing

    @functools.wraps(inner)
    def outer(*inputs: Any, **named: Any) -> Any:
        if CALLED and (not kind or type(inputs[0]) is thing):
            with open(CALLED, "a", encoding="utf-8") as file:
                file.write(f"{name}\n")
        return inner(*inputs, **named)

    if kind:
        thing.__init__ = outer
    return thing if kind else outer


def _narrowed(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """16-bit results of pytorch-metric-learning, whose suite looks at their dtype before it looks at their value."""
    given = [*inputs, *named.values()]
    ours = type(module).__module__.startswith("fused_nce.compat.pml")
    wide = ours and given and isinstance(output, Tensor) and given[0].element_size() == 2
    return output.to(given[0].dtype) if wide else output


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Both runs draw the same numbers."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # what the suites draw from


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytorch-metric-learning's test of several processes does nothing without GPUs: it runs, on gloo."""
    for module in {getattr(item, "module", None) for item in items}:
        case = getattr(module, "TestDistributedLossWrapper", None)
        if case is not None:
            case.loss_and_miner_tester = functools.partialmethod(_on_gloo, module, case.loss_and_miner_tester)


def _on_gloo(case: Any, module: Any, tester: Callable[..., None], *settings: Any, **named: Any) -> None:
    """It leaves where the device is the CPU, and asks for GPUs: "cpu:0" is another name, and the processes are told."""
    kept = module.TEST_DEVICE, torch.cuda.device_count, torch.multiprocessing.spawn
    module.TEST_DEVICE, torch.cuda.device_count = torch.device("cpu:0"), lambda: GLOO

    def spawn(function: Callable[..., None], args: tuple[Any, ...], **options: Any) -> Any:
        return kept[2](_process, args=(function, *args), **options)

    torch.multiprocessing.spawn = spawn  # type: ignore[assignment]
    try:
        tester(case, *settings, **named)
    finally:
        module.TEST_DEVICE, torch.cuda.device_count, torch.multiprocessing.spawn = kept


def _process(rank: int, function: Callable[..., None], *args: Any) -> None:
    """One of several, with the adapters in place, and a model of its own: on a CPU they would share one."""
    pytest_configure()
    function(rank, *copy.deepcopy(args))


def _tiny_models() -> None:
    """A random BERT for every model that sentence-transformers' suite would load; data sets stay out of reach."""
    import sentence_transformers
    import tiny_bert  # type: ignore[import-not-found]  # beside this plugin, whose folder is on the path

    kind = sentence_transformers.SentenceTransformer
    init = kind.__init__

    def tiny(self: Any, name: Any = None, *args: Any, **options: Any) -> None:
        if name is not None and not Path(name).exists():
            width = 1024 if "static" in str(name) else 128
            folder = tiny_bert.save(Path(tempfile.mkdtemp()), dropout=0.1, width=width, letters=True)
            name, options = None, options | {"modules": list(tiny_bert.model(folder, width))}
        init(self, name, *args, **options)

    kind.__init__ = tiny


def _solo() -> None:
    """solo-learn's losses without the trainers around them, which need other packages."""
    for name in ("solo", "solo.losses", "solo.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(*name.split(".")).resolve())]
        sys.modules[name] = package
    misc = types.ModuleType("solo.utils.misc")
    misc.gather = lambda x, dim=0: x  # type: ignore[attr-defined]
    misc.get_rank = lambda: 0  # type: ignore[attr-defined]
    misc.concat_all_gather_no_grad = lambda x: x  # type: ignore[attr-defined]
    sys.modules[misc.__name__] = misc
    for file in sorted(Path("solo/losses").glob("[!_]*.py")):
        try:
            module = importlib.import_module(f"solo.losses.{file.stem}")
        except ImportError:
            continue
        function = f"{file.stem}_loss_func"
        setattr(sys.modules["solo.losses"], function, getattr(module, function, None))
