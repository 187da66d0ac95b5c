"""Losses that gather across processes: ours and upstream's by one call, and the formula, written with collectives.

A case is given this process's rows, a scale and a bias, and returns what this process differentiates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.compat import dense, pml_dense

N, WIDTH = 4, 6  # of each process
LABELS = ((0, 1, 1, 2), (0, 2, 3, 1), (1, 0, 2, 2), (2, 0, 1, 1))  # of each process's rows
cross_entropy = nn.functional.cross_entropy


class Rows(NamedTuple):
    """This process's part of a batch."""

    a: Tensor  # (N, D), unit rows
    b: Tensor  # (N, D)
    labels: Tensor  # (N,)
    scale: Tensor  # 0-d
    bias: Tensor  # 0-d


class Case(NamedTuple):
    """One loss with its settings."""

    package: str  # whose module, ours or the real one, `call` is given
    call: Callable[[Any, Rows], Tensor]
    formula: Callable[[Rows], Tensor]


# ---- collectives, as upstreams have them -------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.cat(parts(x))

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


class _SummedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


def parts(x):
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.detach().contiguous())
    return found


def gather(x) -> Tensor:
    """With the gradient that all processes owe."""
    return _Gather.apply(x)


def own_inserted(x):
    """Without others' gradients, by rank."""
    found = parts(x)
    found[dist.get_rank()] = x
    return torch.cat(found)


def own_first(x):
    """Without others' gradients, this process's first."""
    found = parts(x)
    found.pop(dist.get_rank())
    return torch.cat([x, *found])


def unit(x: Rows) -> Rows:
    """For a loss that normalises: the rows are of unit norm already, their gradients are not."""
    return x._replace(a=nn.functional.normalize(x.a, dim=1), b=nn.functional.normalize(x.b, dim=1))


def place():
    """Of this process's rows among all."""
    return torch.arange(N) + N * dist.get_rank()


# ---- formulas ----------------------------------------------------------------------------------------------------


def clip(x, local_loss, with_grad):
    if with_grad:
        a, b = gather(x.a), gather(x.b)
    elif local_loss:
        a, b = torch.cat(parts(x.a)), torch.cat(parts(x.b))
    else:
        a, b = own_inserted(x.a), own_inserted(x.b)
    if local_loss:
        return (cross_entropy(x.scale * x.a @ b.T, place()) + cross_entropy(x.scale * x.b @ a.T, place())) / 2
    return dense.clip(a, b, x.scale, x.bias)


def siglip(x):
    logits = x.scale * x.a @ gather(x.b).T + x.bias
    signs = -torch.ones_like(logits)
    signs[torch.arange(N), place()] = 1
    return -nn.functional.logsigmoid(signs * logits).sum() / N


def nt_xent(x, temperature):
    everyone = torch.cat((gather(x.a), gather(x.b)))
    s, half = torch.cat((x.a, x.b)) @ everyone.T / temperature, len(everyone) // 2
    itself, twin = torch.cat((place(), place() + half)), torch.cat((place() + half, place()))
    s = s.masked_fill(nn.functional.one_hot(itself, len(everyone)).bool(), -math.inf)
    return cross_entropy(s, twin)


def dcl(x, temperature, weight):
    total, others = 0, torch.ones(N, N * dist.get_world_size(), dtype=torch.bool)
    others[torch.arange(N), place()] = False
    for a, b in ((x.a, x.b), (x.b, x.a)):
        s = torch.cat([(a @ gather(c).T / temperature)[others].view(N, -1) for c in (a, b)], dim=1)
        total = total + (s.logsumexp(1) - weight(a, b) * (a * b).sum(1) / temperature).mean() / 2
    return total


def bank(x, temperature):
    """The second call, after all processes' first rows have entered."""
    torch.manual_seed(5)
    rows = nn.functional.normalize(torch.randn(40, WIDTH), dim=1).double()
    everyone = torch.cat(parts(x.b))
    rows[: len(everyone)] = everyone.float().double()
    return dense.bank(x.a, x.b, rows, temperature)


def bank_call(m, x):
    torch.manual_seed(5)
    loss = m.NTXentLoss(0.3, memory_bank_size=(40, WIDTH), gather_distributed=True)
    loss(x.a, x.b)
    found: Tensor = loss(x.a, x.b)
    return found


def in_form(x, temperature):
    z, ids = torch.cat((x.a, x.b)), x.labels.repeat(2)
    s, all_ids = torch.exp(z @ gather(z).T / temperature), torch.cat(parts(ids))
    same = ids[:, None] == all_ids
    positive = same.clone()
    positive[torch.arange(2 * N), torch.arange(2 * N) + 2 * N * dist.get_rank()] = False
    own, other = (s * positive).sum(1), (s * ~same).sum(1)
    return -(own / (own + other)).log().mean()


def inf_cl(x, targets):
    logits = _SummedGradient.apply(x.scale) * x.a @ gather(x.b).T
    return cross_entropy(logits, targets + N * dist.get_rank())


def pml(x, name, efficient=False):
    ids = own_first(x.labels)
    k = own_first(x.a)
    q = x.a if efficient else k
    pairs = pml_dense.pairs(ids[: len(q)].tolist(), ids.tolist(), 0)
    return dist.get_world_size() * getattr(pml_dense, name)(q, k, *pairs, 0.3)


def pml_memory(x):
    ids, rows = own_first(x.labels), own_first(x.a)
    positive, negative = pml_dense.pairs(ids, ids, 0)
    return dist.get_world_size() * pml_dense.sup_con(rows, rows.detach(), positive, negative, 0.3)


def exact_value(loss):
    """W times a loss, reported as the loss."""
    return loss - (1 - 1 / dist.get_world_size()) * loss.detach()


def here():
    return {"rank": dist.get_rank(), "world_size": dist.get_world_size()}


def wrapped(m, loss, x, **words):
    found: Tensor = m.DistributedLossWrapper(loss, **words)(x.a, x.labels)
    return found


TARGETS = torch.tensor([2, 0, 3, 3])
CLIP = [{"local_loss": x, "gather_with_grad": y} for x in (False, True) for y in (False, True)]


def _clip_case(local_loss, gather_with_grad):
    words = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    return Case(
        "open_clip",
        lambda m, x: m.ClipLoss(**words, **here())(x.a, x.b, x.scale, x.bias),
        lambda x: clip(x, local_loss, gather_with_grad) + 0 * x.bias,
    )


def _siglip_case(how):
    return Case("open_clip", lambda m, x: m.SigLipLoss(**here(), dist_impl=how)(x.a, x.b, x.scale, x.bias), siglip)


def _exact_clip_case(local_loss, gather_with_grad):
    words = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    return Case(
        "open_clip",
        lambda m, x: m.ClipLoss(**words, **here(), ddp_compat="exact")(x.a, x.b, x.scale),
        lambda x: clip(x, local_loss, with_grad=True),
    )


def _exact_wrapper_case(efficient):
    return Case(
        "pml",
        lambda m, x: wrapped(m, m.SupConLoss(0.3), x, efficient=efficient, ddp_compat="exact"),
        lambda x: exact_value(pml(x, "sup_con")),
    )


CASES = {
    **{f"ClipLoss {x}": _clip_case(**x) for x in CLIP},
    **{f"SigLipLoss {how}": _siglip_case(how) for how in ("bidir", "shift", "reduce", "gather")},
    "lightly.NTXentLoss": Case(
        "lightly", lambda m, x: m.NTXentLoss(0.3, gather_distributed=True)(x.a, x.b), lambda x: nt_xent(unit(x), 0.3)
    ),
    "lightly.NTXentLoss with a bank": Case("lightly", bank_call, lambda x: bank(x, 0.3)),
    "lightly.DCLLoss": Case(
        "lightly",
        lambda m, x: m.DCLLoss(0.3, lambda a, b: (a * b).sum(1), True)(x.a, x.b),
        lambda x: dcl(unit(x), 0.3, lambda a, b: (a * b).sum(1)),
    ),
    "lightly.DCLWLoss": Case(
        "lightly",
        lambda m, x: m.DCLWLoss(0.3, 0.4, True)(x.a, x.b),
        lambda x: dcl(unit(x), 0.3, lambda a, b: 2 - N * ((a * b).sum(1) / 0.4).softmax(0).detach()),
    ),
    "DistributedLossWrapper(NTXentLoss)": Case(
        "pml", lambda m, x: wrapped(m, m.NTXentLoss(0.3), x), lambda x: pml(x, "nt_xent")
    ),
    "DistributedLossWrapper(SupConLoss)": Case(
        "pml", lambda m, x: wrapped(m, m.SupConLoss(0.3), x), lambda x: pml(x, "sup_con")
    ),
    "DistributedLossWrapper(NTXentLoss, efficient)": Case(
        "pml", lambda m, x: wrapped(m, m.NTXentLoss(0.3), x, efficient=True), lambda x: pml(x, "nt_xent", True)
    ),
    "DistributedLossWrapper(SupConLoss, efficient)": Case(
        "pml", lambda m, x: wrapped(m, m.SupConLoss(0.3), x, efficient=True), lambda x: pml(x, "sup_con", True)
    ),
    "DistributedLossWrapper(CrossBatchMemory)": Case(
        "pml", lambda m, x: wrapped(m, m.CrossBatchMemory(m.SupConLoss(0.3), WIDTH, 40), x), pml_memory
    ),
    "cal_ring_loss": Case(
        "inf_cl",
        lambda m, x: m.cal_ring_loss(x.a, x.b, scale=x.scale, head_dim=WIDTH),
        lambda x: inf_cl(x, torch.arange(N)),
    ),
    "cal_ring_loss with labels": Case(
        "inf_cl", lambda m, x: m.cal_ring_loss(x.a, x.b, TARGETS, x.scale, WIDTH), lambda x: inf_cl(x, TARGETS)
    ),
}

# Where no package on PyPI has the code, or where ours is told to differ.
OWN = {
    "solo.simclr_loss_func": Case(
        "solo",
        lambda m, x: m.simclr_loss_func(torch.cat((x.a, x.b)), x.labels.repeat(2), 0.3),
        lambda x: in_form(unit(x), 0.3),
    ),
    "solo.nnclr_loss_func": Case(
        "solo",
        lambda m, x: m.nnclr_loss_func(x.a, x.b, 0.3),
        lambda x: cross_entropy(unit(x).a @ gather(unit(x).b).T / 0.3, place()),
    ),
    "solo.mocov3_loss_func": Case(
        "solo",
        lambda m, x: m.mocov3_loss_func(x.a, x.b, 0.3),
        lambda x: 0.6 * cross_entropy(unit(x).a @ torch.cat(parts(x.b)).T / 0.3, place()),
    ),
    "bolts.SimCLR": Case("bolts", lambda m, x: m.SimCLR().nt_xent_loss(x.a, x.b, 0.3), lambda x: nt_xent(x, 0.3)),
    "cal_inf_loss, exact": Case(
        "inf_cl",
        lambda m, x: m.cal_inf_loss(x.a, x.b, scale=x.scale, ddp_compat="exact"),
        lambda x: cross_entropy(x.scale * x.a @ gather(x.b).T, place()),
    ),
    **{f"ClipLoss exact {words}": _exact_clip_case(**words) for words in CLIP},
    **{f"DistributedLossWrapper exact, efficient={x}": _exact_wrapper_case(x) for x in (False, True)},
}


def run(loss: Callable[[Rows], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Its value and gradients of the rows, here; those of scale and bias averaged, as DDP does."""
    rank = dist.get_rank()
    g = torch.Generator().manual_seed(rank)
    rows = [nn.functional.normalize(torch.randn(N, WIDTH, generator=g, dtype=torch.float64), dim=1) for _ in "ab"]
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (3.5, -0.7)]
    a, b, scale, bias = leaves = [x.to(dtype).requires_grad_() for x in (*rows, *numbers)]
    value = loss(Rows(a, b, torch.tensor(LABELS[rank]), scale, bias))
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    for x in grads[2:]:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return dict(zip(("value", "a", "b", "scale", "bias"), (value.detach(), *grads), strict=True))


def compared(case: Case, ours: Any, theirs: Any, dtype: torch.dtype) -> float:
    """`differences` of ours and of a package's, or the formula's where there is none."""
    found = run(functools.partial(case.call, ours), dtype)
    return differences(found, run(functools.partial(case.call, theirs) if theirs else case.formula, dtype))


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest, relative to the largest of its kind; a gradient that is nothing on either side is no difference."""
    worst = 0.0
    for key, x in wanted.items():
        worst = max(worst, float((found[key].double() - x.double()).abs().max() / x.abs().max().clamp(min=1e-3)))
    return worst
