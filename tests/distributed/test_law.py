"""The law: after DDP's averaging, every parameter's gradient is the one of a single process on the whole batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fused_nce
from fused_nce.core.distributed import ring
from fused_nce.core.group import Peers
from fused_nce.core.spec import WHOLE_ROW, Labels, Spec
from fused_nce.distributed import Group, Processes

from .launch import run
from .laws import BATCH, LAWS, Net, batch

HOW: dict[str, Callable[..., Processes]] = {"gather": Processes, "ring": functools.partial(Processes, ring=True)}


def one_process(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every parameter's gradient."""
    net = Net()
    loss = net(name, *batch(), None)
    loss.backward()
    return loss.detach(), {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in net.named_parameters()}


def relative(found: Tensor, exact: Tensor) -> float:
    """max |found − exact| / max |exact|."""
    return float((found - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def errors(net: DistributedDataParallel, name: str, group: Group, members: dist.ProcessGroup) -> dict[str, float]:
    """Of the processes' mean loss and of each parameter's gradient."""
    rank, size = dist.get_rank(members), dist.get_world_size(members)
    here = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    net.zero_grad(set_to_none=True)
    loss = net(name, *(x[here] for x in batch()), group)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=members)
    value, gradients = one_process(name)
    found = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in net.module.named_parameters()}
    return {"loss": relative(mean / size, value)} | {key: relative(found[key], gradients[key]) for key in gradients}


def obey(rank: int, groups: list[list[int]], names: list[str]) -> dict[tuple[str, str, int], dict[str, float]]:
    """Every loss in every way, among the processes of each group."""
    found = {}
    for ranks in groups:
        members: Any = dist.new_group(ranks)
        if rank not in ranks:
            continue
        net = DistributedDataParallel(Net(), process_group=members, find_unused_parameters=True)
        for way, how in HOW.items():
            for name in names:
                found[name, way, len(ranks)] = errors(net, name, how(members), members)
    return found


# A group's ranks are not the processes' own: the two are the last of three.
SIZES = [pytest.param(size, id=f"{size}", marks=[pytest.mark.nightly] * (size in (1, 4))) for size in (1, 2, 3, 4)]
GROUPS = {1: [[3], [0, 1, 2, 3]], 2: [[1, 2], [0, 1, 2]]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory):
    """Errors by name, way and size; one launch for two sizes."""
    kept: dict[int, Any] = {}

    def at(size: int):
        groups = GROUPS[1 if size in (1, 4) else 2]
        if size not in kept:
            for results in run(tmp_path_factory.mktemp("law"), len(groups[-1]), obey, groups, list(LAWS)):
                for (name, way, n), errors in results.items():
                    worst = kept.setdefault(n, {}).setdefault((name, way), {})
                    worst |= {key: max(error, worst.get(key, 0.0)) for key, error in errors.items()}
        return kept[size]

    return at


@pytest.mark.parametrize("way", HOW)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_one_process_on_the_whole_batch(found, size, way):
    worst = {name: errors for (name, how), errors in found(size).items() if how == way}
    assert set(worst) == set(LAWS)
    assert {name: errors for name, errors in worst.items() if max(errors.values()) > 1e-12} == {}


def test_every_loss_that_takes_a_group_is_held_to_the_law():
    functions = {name: f for name in fused_nce.losses.__all__ if inspect.isfunction(f := getattr(fused_nce, name))}
    takers = {name for name, f in functions.items() if "group" in inspect.signature(f).parameters}
    assert takers <= {name.partition("/")[0] for name in LAWS}
    assert len(takers) >= 9


@pytest.mark.parametrize("stat", WHOLE_ROW)
def test_statistics_of_whole_rows_do_not_go_round(stat):
    spec = Spec(Labels(), stats=(stat,), drop_self=True)
    with pytest.raises(ValueError, match=r"group: got ring=True with stats \('\w+',\), which need whole rows"):
        ring.code(Peers("0", 0, 2, True, None, 1.0), "", spec)
