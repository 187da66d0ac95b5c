"""What several processes do when they disagree, die or are late; and in float32, in 16 bits on the wire, compiled."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves

from fused_nce import AMDIMLoss, CLIPLoss, InfoNCELoss, NTXentLoss, amdim_nce, info_nce, last_path, nt_xent, sup_con
from fused_nce.distributed import Processes, ProcessLostError, all_gather, world_size
from fused_nce.losses import MultiscaleMixtureLoss
from tests.budget import Budget, eta, precision
from tests.oracle import Oracle

from .launch import run

WAYS = ("gather", "ring")
N, N_C, D, SIZE = 6, 3, 16, 2


def features(rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, D) and (N, N_C, D) of one process."""
    generator = torch.Generator().manual_seed(rank)
    q, k = (torch.randn(N, n, D, generator=generator).to(dtype).requires_grad_() for n in (1, N_C))
    return q[:, 0].detach().requires_grad_(), k


def said(what: Any) -> str:
    """What calling it raises."""
    try:
        what()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("loss", [AMDIMLoss, CLIPLoss, InfoNCELoss, MultiscaleMixtureLoss, NTXentLoss])
def test_a_copy_works_in_the_group_of_what_it_copies(loss, options):
    """A teacher's, say (`AveragedModel`)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        own: Any = dist.new_group([0])
        student: Any = torch.nn.Sequential(torch.nn.Linear(2, 2), loss(group=Processes(own) if options else own))
        student[1].again = student[0]
        teacher: Any = AveragedModel(student).module
        held = [x for part in teacher[1].modules() for x in tree_leaves(vars(part))]
        groups: set[Any] = {x for x in held if isinstance(x, (dist.ProcessGroup, Processes))}
        assert {x.group if options else x for x in groups} == {own}
        assert teacher[1].again is teacher[0] is not student[0]
        assert repr(teacher) == repr(student)
    finally:
        dist.destroy_process_group()


DIFFERING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reduction": ({"reduction": "mean"}, {"reduction": "sum"}),
    "penalty": ({"penalty": 0.1}, {"penalty": 0.2}),
    "scale": ({"scale": 0.5}, {"scale": 0.25}),
    "clip": ({"clip": 4.0}, {"clip": 5.0}),
    "ring": ({}, {}),
    "wire": ({}, {}),
}


def talk(rank: int) -> dict[Any, Any]:
    """Everything that leaves both processes alive."""
    found: dict[Any, Any] = {}
    for way in WAYS:
        group = Processes(ring=way == "ring")
        q, k = features(rank)
        uneven = q[: N - 2 * rank], k[: N - 2 * rank]
        found["uneven", way] = said(lambda x=uneven, g=group: amdim_nce(*x, group=g))
        for name, options in DIFFERING.items():
            q, k = features(rank)
            wire = torch.bfloat16 if name == "wire" and rank else None
            mine = Processes(ring=(way == "ring") != (name == "ring" and bool(rank)), wire_dtype=wire)
            more = {"group": mine, **options[rank]}
            found["differing", name, way] = said(lambda q=q, k=k, more=more: amdim_nce(q, k, **more))
        q, k = features(rank)
        more = {"temperature": torch.tensor(0.1), "normalize": bool(rank), "group": group}
        found["differing", "normalize", way] = said(lambda q=q, k=k, more=more: info_nce(q, k[:, 0], **more))
        frozen = k.detach() if rank else k
        found["frozen", way] = said(lambda q=q, k=frozen, g=group: amdim_nce(q, k, group=g))
        for dtype in (torch.float32, torch.bfloat16):
            q, k = features(rank, dtype)
            out = amdim_nce(q, k, scale=0.7, clip=4.0, group=group)
            found["path", way, dtype] = last_path()
            out.loss.backward()
            found["run", way, dtype] = [x.detach() for x in (q, k, out.loss, q.grad, k.grad)]  # type: ignore
        q, k = features(rank)
        wired = Processes(ring=way == "ring", wire_dtype=torch.bfloat16)
        amdim_nce(q, k, scale=0.7, clip=4.0, penalty=0.0, group=wired).loss.backward()
        found["wire", way] = [q.grad, k.grad]
        z = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        (found["wired views", way],) = torch.autograd.grad(nt_xent(z[:, 0], z[:, 1], group=wired).loss, z)
        found["compiled", way] = compiled(rank, group, ("sup_con",))
    x = torch.full((2, 1), float(rank), requires_grad=True)
    y = all_gather(x)
    (first,) = torch.autograd.grad(
        (y * torch.tensor([[1.0], [2.0], [3.0], [4.0]]) * (rank + 1)).square().sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), x)
    found["all_gather"] = y.detach().squeeze(1).tolist(), first.squeeze(1).tolist(), second.squeeze(1).tolist()
    found["world_size"] = world_size(None), world_size("world")
    return found


def compiled(rank: int, group: Processes, names: Sequence[str]) -> dict[str, bool]:
    """Whether a compiled loss and gradient have the eager one's bits."""
    z = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    labels = torch.tensor([0, 1, 0, 2, 1, 1])
    losses = {
        "info_nce": lambda z: info_nce(z[:, 0], z[:, 1], group=group).loss,
        "symmetric": lambda z: info_nce(z[:, 0], z[:, 1], symmetric=True, group=group).loss,
        "nt_xent": lambda z: nt_xent(z[:, 0], z[:, 1], group=group).loss,
        "sup_con": lambda z: sup_con(z[:, 0], labels, group=group).loss,
    }
    same = {}
    for name in names or losses:
        loss = losses[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = [f(z) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
        gradients = [torch.autograd.grad(result, z)[0] for result in results]
        same[name] = torch.equal(*results) and torch.equal(*gradients)
    return same


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes saw."""
    return run(tmp_path_factory.mktemp("talk"), SIZE, talk)


@pytest.mark.parametrize("way", WAYS)
def test_uneven_batches_raise_the_same_error_on_every_process(found, way):
    messages = {result["uneven", way] for result in found}
    (message,) = messages
    assert message.startswith("ValueError: group: got N = 6, M = 18 on process 0; N = 4, M = 12 on process 1; need")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*DIFFERING, "normalize"])
def test_processes_with_other_settings_tell_each_other(found, name, way):
    (message,) = {result["differing", name, way] for result in found}
    assert message.startswith("ValueError: group: got ")
    word = {"penalty": "reduction", "clip": "tanh_clip", "normalize": "unit_norm()"}.get(name, name)
    assert word in message
    assert "on process 0" in message
    assert "on process 1; need the same on all 2 processes" in message


@pytest.mark.parametrize("way", WAYS)
def test_keys_without_gradient_on_one_process_alone_are_refused(found, way):
    (message,) = {result["frozen", way] for result in found}
    assert message.startswith("ValueError: group: got ")
    assert "on process 1; need the same on all 2 processes" in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_the_kernels_stay_within_the_error_budget(found, way, dtype):
    parts = zip(*(result["run", way, dtype] for result in found), strict=True)
    q, k, losses, dq, dk = (torch.stack(x) if x[0].dim() == 0 else torch.cat(x) for x in parts)
    backend = found[0]["path", way, dtype].backend
    exact = Oracle(
        q.double().numpy(),
        k.detach().reshape(-1, D).double().numpy(),
        scale=float(torch.tensor(0.7)),
        n_c=N_C,
        rows_per_image=1,
        offset=0,
        clip=4.0,
        real=np.float64,
    )
    budget = Budget(exact, precision(dtype, backend))
    loss = exact.nce.mean() + exact.penalty(0.04)
    assert eta(losses.mean(), loss, budget.mean(budget.nce, exact.nce) + budget.penalty(0.04)) <= 1
    g, square = np.full(exact.nce.shape, 1 / exact.nce.size), 0.04 / (exact.n * exact.m)
    gradients = exact.gradients(exact.nce_coefficients(g, square))
    allowed = budget.nce_gradients(g, square, gradients)
    assert eta(dq / SIZE, gradients.dq, allowed.dq) <= 1
    rounded = 2 if way == "gather" else 1  # two processes' parts each, or their sum
    assert eta(dk.reshape(-1, D) / SIZE, gradients.dk, rounded * allowed.dk) <= 1


@pytest.mark.parametrize("way", WAYS)
def test_keys_that_travel_in_bfloat16_are_the_rounded_keys(found, way):
    """As one process would see them: the score of a rounded key is off by 2⁻⁹ of its terms' size at most."""
    q = torch.cat([features(rank)[0].detach() for rank in range(SIZE)]).double().requires_grad_()
    k = torch.cat([features(rank)[1].detach() for rank in range(SIZE)]).bfloat16().double().requires_grad_()
    amdim_nce(q, k, scale=0.7, clip=4.0, penalty=0.0).loss.backward()
    dq, dk = (torch.cat([result["wire", way][i] for result in found]) / SIZE for i in (0, 1))
    assert q.grad is not None
    assert k.grad is not None
    u = 2.0**-22  # float32, some roundings
    assert (dq - q.grad).abs().max() <= 64 * u * q.grad.abs().max()
    # Gathered keys' gradients return in bfloat16 too, one rounding of each process's; a ring's in float32.
    assert (dk - k.grad).abs().max() <= (2.0**-7 if way == "gather" else 64 * u) * k.grad.abs().max()


def test_rows_that_are_their_own_keys_are_rounded_alike_in_both_ways(found):
    for result in found:
        gather, ring = (result["wired views", way] for way in WAYS)
        assert (gather - ring).abs().max() <= 2.0**-7 * gather.abs().max()  # gathered keys' gradients were in bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_loss_has_the_eager_bits(found, way):
    for result in found:
        assert set(result["compiled", way].values()) == {True}, result["compiled", way]


@pytest.mark.nightly
@pytest.mark.parametrize("ring", [False, True])
def test_every_compiled_loss_has_the_eager_bits(tmp_path, ring):
    for result in run(tmp_path, SIZE, compiled, Processes(ring=ring), ()):
        assert set(result.values()) == {True}, result


def test_all_gather_and_its_two_derivatives(found):
    w = np.array([1.0, 2.0, 3.0, 4.0]) ** 2
    x = np.array([0.0, 0.0, 1.0, 1.0])
    for rank, result in enumerate(found):
        own = slice(2 * rank, 2 * rank + 2)
        value, first, second = result["all_gather"]
        assert value == x.tolist()
        assert first == (2 * w * x * (1 + 4))[own].tolist()  # (rank + 1)² of both processes
        assert second == (2 * w * (1 + 4))[own].tolist()
        assert result["world_size"] == (1, 2)


def late(rank: int, ring: bool, own: bool) -> tuple[str, float]:
    """The second process comes after the first has given up, by the group's own limit or that of the call."""
    q, k = features(rank)
    members: Any = dist.new_group(timeout=timedelta(seconds=1) if own else None)
    group = Processes(members, ring=ring, timeout_s=None if own else 1.0)
    if rank:
        time.sleep(3)
    start = time.monotonic()
    message = said(lambda: amdim_nce(q, k, group=group))
    return message, time.monotonic() - start


@pytest.mark.parametrize(
    ("ring", "own"),
    [
        pytest.param(False, False, id="gather", marks=pytest.mark.nightly),
        pytest.param(True, False, id="ring", marks=pytest.mark.nightly),
        pytest.param(False, True, id="own limit"),
    ],
)
def test_a_late_process_ends_the_others_in_time(tmp_path, ring, own):
    (message, seconds), _ = run(tmp_path, 2, late, ring, own)
    limit = "the group's own limit" if own else "1 s"
    assert message.startswith(f"ProcessLostError: group: the exchange of sizes did not finish within {limit} on every")
    assert seconds < 2.5


def dying(rank: int, ring: bool, folder: str) -> None:
    """The second process is gone after the forward pass, or on the way to it."""
    q, k = features(rank)
    group = Processes(ring=ring, timeout_s=20.0)
    out = None if ring else amdim_nce(q, k, group=group)
    if rank:
        os._exit(0)
    start = time.monotonic()
    try:
        (amdim_nce(q, k, group=group) if out is None else out).loss.backward()
    except ProcessLostError as error:
        torch.save((str(error), time.monotonic() - start), f"{folder}/said.pt")
    os._exit(0)


@pytest.mark.parametrize(
    "ring", [pytest.param(False, id="gather"), pytest.param(True, id="ring", marks=pytest.mark.nightly)]
)
def test_a_process_that_dies_ends_the_others(tmp_path, ring):
    with pytest.raises(FileNotFoundError):  # neither returned anything
        run(tmp_path, 2, dying, ring, str(tmp_path))
    message, seconds = torch.load(tmp_path / "said.pt")
    assert "did not finish" in message
    assert seconds < 20


def test_a_group_is_refused_where_there_is_none():
    q, k = features(0)
    assert not dist.is_initialized()
    for group, expected in (
        ("world", "ValueError: group: got one without torch.distributed"),
        ("all", "ValueError: group: got 'all', need one of 'world'"),
        (3, "TypeError: group: got int, need a ProcessGroup"),
    ):
        assert said(lambda g=group: amdim_nce(q, k, group=g)).startswith(expected)
    assert said(lambda: Processes(timeout_s=0)).startswith("ValueError: timeout_s: got 0")
    assert said(lambda: Processes(wire_dtype=torch.int8)).startswith("ValueError: wire_dtype: got torch.int8")


def misused(rank: int) -> dict[str, str]:
    """A bad argument on process 1 alone, in every loss that takes a group; then on both."""
    x, y = torch.randn(4, 8), torch.randn(4, 3, 8)
    bad = float("nan") if rank == 1 else 0.5
    group = Processes(timeout_s=20)
    labels = torch.arange(4) if rank == 0 else torch.arange(4).float()
    return {
        "amdim_nce": said(lambda: amdim_nce(x, y, clip=bad, group=group)),
        "info_nce": said(lambda: info_nce(x, x, temperature=bad, group=group)),
        "nt_xent": said(lambda: nt_xent(x, x, temperature=bad, group=Processes(ring=True, timeout_s=20))),
        "sup_con": said(lambda: sup_con(x, labels, group=group)),
        "targets": said(lambda: info_nce(x, x, torch.tensor([0, 1, 2, 3 + rank]), group=group)),
        "both": said(lambda: nt_xent(x, x, temperature=-1.0 - rank, group=group)),
        "after": said(lambda: nt_xent(x, x, group=group)),
    }


def test_a_bad_argument_of_one_process_is_heard_by_all(tmp_path):
    first, second = run(tmp_path, SIZE, misused)
    for name in ("amdim_nce", "info_nce", "nt_xent", "sup_con", "targets"):
        kind, _, message = second[name].partition(": ")
        assert first[name] == f"ValueError: group: process 1 raised {kind}: {message}"
    assert "got -1.0" in first["both"]
    assert "got -2.0" in second["both"]
    assert first["after"] == second["after"] == ""  # nobody waits for anybody
