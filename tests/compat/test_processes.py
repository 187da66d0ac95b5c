"""Adapters of losses that gather, in real processes: value and gradients are upstream's, or exact where told to be."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fused_nce.compat import inf_cl, open_clip, pml
from tests.compat.gathering import CASES, OWN, compared
from tests.distributed import launch

EVERY = CASES | OWN
ROWS = torch.randn(4, 3)


def adapters(package: str) -> Any:
    """Ours of a package."""
    return importlib.import_module(f"fused_nce.compat.{package}")


def obey(rank: int, names: list[str]) -> dict[str, float]:
    """How far each case is from its formula."""
    return {name: compared(EVERY[name], adapters(EVERY[name].package), None, torch.float64) for name in names}


@pytest.fixture(scope="module")
def worst(tmp_path_factory: pytest.TempPathFactory):
    """Of three processes, the worst of each case: two would hide a factor of W − 1."""
    results = launch.run(tmp_path_factory.mktemp("processes"), 3, obey, list(EVERY))
    return {name: max(x[name] for x in results) for name in EVERY}


@pytest.mark.parametrize("name", EVERY)
def test_among_three_processes(worst, name):
    memory = "bank" in name or "Memory" in name  # holds float32; all else here is float64
    assert worst[name] <= (1e-6 if memory else 1e-12)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("world_size: got 2, need 1", lambda: open_clip.ClipLoss(world_size=2)(ROWS, ROWS, 1.0)),
        ("world_size: got 2, need 1", lambda: open_clip.SigLipLoss(world_size=2)(ROWS, ROWS, 1.0, 0.0)),
        ("use_horovod: got True for 2", lambda: open_clip.ClipLoss(world_size=2, use_horovod=True)),
        ("ddp_compat: got 'mine'", lambda: inf_cl.cal_inf_loss(ROWS, ROWS, ddp_compat="mine")),
        ("efficient: got True with a Cross", lambda: wrapped_memory(efficient=True)),
        ("ref_emb: got one with a Cross", lambda: wrapped_memory()(ROWS, torch.arange(4), ref_emb=ROWS)),
    ],
)
def test_refused(message, call):
    with pytest.raises((ValueError, NotImplementedError), match=rf"^{message}"):
        call()


def wrapped_memory(**words):
    return pml.DistributedLossWrapper(pml.CrossBatchMemory(pml.SupConLoss(), 3, 8), **words)


@pytest.mark.parametrize("words", [{}, {"efficient": True}, {"ddp_compat": "exact"}])
def test_the_wrapper_on_one_process_is_the_loss(words):
    labels = torch.tensor([0, 0, 1, 1])
    wrapped = pml.DistributedLossWrapper(pml.SupConLoss(), **words)
    assert torch.equal(wrapped(ROWS, labels), pml.SupConLoss()(ROWS, labels))
