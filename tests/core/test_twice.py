"""Double backward by `backend="chunked"`: central differences of the gradient, which is that of a plain backward."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from fused_nce import gathered_scores, moco_nce, tile_loss, tile_stats
from fused_nce.core.spec import Bias, Block, Dist, Hardness, Index, Labels, Separate, Spec, SqDist, TanhClip
from fused_nce.core.tails import AllTriplets, Hardest, LogIn, LogOut, Nce, Pairs, Sigmoid
from fused_nce.losses.registry import LOSSES
from tests.losses.poses import posed
from tests.marks import nightly_but

IDS = torch.tensor([0, 1, 0, 2])  # the last row has no positive
KINDS = {  # spec, tail, keywords
    "block": (Spec(Block(2), TanhClip(3.0), (*Nce().stats, "square")), Nce(0.3), {}),
    "both ways": (Spec(Block(1), columns=("neg_lse",)), Nce(0.3, "sum"), {}),
    "one image": (Spec(Block(8, 4)), Nce(0.3), {}),
    "index, bias": (
        Spec(Index(), Bias(), ("neg_softplus", "neg_max")),
        Sigmoid(),
        {"row_ids": torch.tensor([7, 0, 3, 3])},
    ),
    "twins": (Spec(Block(2, 2), drop_self=True), Nce(), {}),
    "labels out": (Spec(Labels(), stats=LogOut.READS, drop_self=True), LogOut(), {"row_ids": IDS}),
    "labels in": (Spec(Labels(), stats=LogIn.READS, drop_self=True), LogIn(reduction="none"), {"row_ids": IDS}),
    "pairs": (Spec(Labels(), Dist(), Pairs.READS, drop_self=True), Pairs(), {"row_ids": IDS}),
    "hardest": (Spec(Labels(), SqDist(), Hardest.READS, drop_self=True), Hardest(), {"row_ids": IDS}),
    "triplets": (Spec(Labels(), Dist(), AllTriplets.READS, drop_self=True), AllTriplets(), {"row_ids": IDS}),
}


def problem(kind):
    """(a function of the leaves: every part of the loss and every statistic; the leaves)."""
    spec, tail, keywords = KINDS[kind]
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(n, 3, dtype=torch.float64, generator=g).requires_grad_() for n in (4, 8))
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    alone = spec.drop_self
    leaves = [q, scale] if alone else [q, scale, k]
    if isinstance(spec.transform, Bias):
        leaves.append(torch.tensor(-0.3, dtype=torch.float64, requires_grad=True))

    def parts(q, scale, k=None, bias=None):
        given = {"scale": scale, "bias": bias, "backend": "chunked", **keywords}
        out = tile_loss(q, k, spec, tail, **given)
        found = tile_stats(q, k, spec, **given)
        smooth = [x for name, x in found.items() if x.requires_grad and x.numel() and x.isfinite().all()]
        return (out.loss, *((out.nce, out.penalty) if tail.penalty else (out.nce,)), *smooth)

    return parts, leaves


@pytest.mark.filterwarnings("ignore:fused_nce. one image")
@pytest.mark.parametrize(
    ("kind", "workspace_mb"),
    nightly_but([*((kind, "16") for kind in KINDS), ("block", "0.001")], product(KINDS, ("16", "0.001"))),
)
def test_second_derivatives(kind, workspace_mb, monkeypatch):
    monkeypatch.setenv("FUSED_NCE_WORKSPACE_MB", workspace_mb)
    parts, leaves = problem(kind)
    weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape) for x in parts(*leaves)]

    def total(*x):
        return sum((w * y).sum() for w, y in zip(weights, parts(*x), strict=True))

    assert torch.autograd.gradgradcheck(total, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)
    plain = torch.autograd.grad(total(*leaves), leaves)
    graphed = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    for a, b in zip(plain, graphed, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-12)


def test_separate_positives():
    spec = Spec(Separate(2), stats=Nce().stats)
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*s, dtype=torch.float64, generator=g).requires_grad_() for s in ((3, 2), (5, 2), (3, 2))]

    def loss(q, k, positives):
        return tile_loss(q, k, spec, Nce(), positives=positives, backend="chunked").loss

    assert torch.autograd.gradgradcheck(loss, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_one_leaf_as_both_sides():
    """k is a function of q: no path is taken twice. And a gradient penalty, what all this is for, trains."""
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def gradient(x, graph):
        loss = tile_loss(x, 2 * x.tanh(), Spec(Block(1)), Nce(), backend="chunked").loss
        return torch.autograd.grad(loss, x, create_graph=graph)[0]

    torch.testing.assert_close(gradient(x, True).detach(), gradient(x, False), rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: gradient(x, True).square().sum(), x, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_a_graph_under_autocast_is_that_of_rows_of_16_bits():
    """Its products are of float32, which autocast may not round."""
    torch.manual_seed(0)
    q, k = (torch.randn(n, 8).requires_grad_() for n in (6, 9))
    indices = torch.randint(9, (6, 3))
    for loss in (
        lambda x, y: tile_loss(x, y, Spec(Block(1)), Nce(), backend="chunked").loss,
        lambda x, y: gathered_scores(x, y, indices, backend="chunked").square().sum(),
    ):
        found: list[torch.Tensor] = []
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                total = loss(*(z if autocast else z.bfloat16() for z in (q, k)))
                grads = torch.autograd.grad(total, (q, k), create_graph=True)
            found += [*grads, *torch.autograd.grad(torch.cat(grads).square().sum(), (q, k))]
        assert all(map(torch.equal, found[:4], found[4:]))


def test_a_graph_holds_hardness_still():
    """Its first gradients are those without one: t's slope is 1, whatever makes it."""
    q, k = (torch.randn(6, 8, dtype=torch.float64).requires_grad_() for _ in range(2))
    loss = tile_loss(q, k, Spec(Block(1), Hardness(0.7)), Nce(0.1), backend="chunked").loss
    pairs = (torch.autograd.grad(loss, (q, k), create_graph=graph, retain_graph=True) for graph in (False, True))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-13)


def test_half_precision_keeps_its_dtypes():
    q, k = (torch.randn(6, 8).bfloat16().requires_grad_() for _ in range(2))
    loss = tile_loss(q, k, Spec(Block(1)), Nce(), backend="chunked").loss
    found = torch.autograd.grad(loss, (q, k), create_graph=True)
    (second,) = torch.autograd.grad(torch.stack([x.float().square().sum() for x in found]).sum(), q)
    assert [x.dtype for x in (loss, *found, second)] == [torch.float32, *[torch.bfloat16] * 3]


def test_what_keeps_no_inputs_is_refused():
    q, k, queue = (torch.randn(n, 3) for n in (4, 4, 9))
    loss = moco_nce(q.requires_grad_(), k, queue, backend="chunked").loss
    with pytest.raises(RuntimeError, match=r"^fused_nce: double backward .* \(parts=False\): it keeps no inputs"):
        torch.autograd.grad(loss, q, create_graph=True)


SERVED = [name for name, x in LOSSES.items() if not (x.closed or x.stopped or name in ("moco_nce", "npid_softmax"))]


@pytest.mark.parametrize("name", nightly_but(["sup_con", "pair_contrastive"], SERVED))
def test_every_loss(name):
    entry, inputs, leaves = posed(name)

    def loss(*values):
        return entry.function(**{**inputs, **dict(zip(leaves, values, strict=True))}, backend="chunked").loss

    assert torch.autograd.gradgradcheck(loss, [inputs[key] for key in leaves], eps=1e-6, atol=1e-6, rtol=1e-4)
