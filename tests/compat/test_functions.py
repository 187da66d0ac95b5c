"""Projects whose losses are functions: solo-learn, Inf-CL and Deep InfoMax, on random configurations each."""

from __future__ import annotations

import torch
from torch import nn

from fused_nce.compat import dim, inf_cl, solo
from tests.compat import dense
from tests.compat.harness import both, unit


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@both
def test_solo_simclr(at):
    """Images' numbers of two or three views, or classes, of which some have one row."""
    g, pick = at.generator, at.pick
    n, views, temperature = pick.randint(1, 6), pick.randint(2, 3), pick.choice((0.07, 0.1, 0.5))
    supervised = pick.random() < 0.5
    ids = torch.tensor([pick.randint(-1, 2) for _ in range(n)]) if supervised else torch.arange(n).repeat(views)
    z = randn(len(ids), pick.choice((3, 16, 33)), generator=g)
    given = ids.to(pick.choice((torch.int32, torch.int64)))
    at.agree(
        lambda z: solo.simclr_loss_func(z, given, temperature),
        lambda z: dense.in_form(z, ids.tolist(), temperature),
        [z],
    )


@both
def test_solo_mocov2plus(at):
    """Unit rows, the queue column by column; gradients of all three."""
    g, pick = at.generator, at.pick
    n, width, size, temperature = pick.randint(1, 9), pick.choice((3, 16)), pick.randint(1, 40), pick.choice((0.1, 0.5))
    tensors = [*(unit(n, width, generator=g) for _ in range(2)), unit(size, width, generator=g).T]

    def formula(query, key, queue):
        logits = torch.cat(((query * key).sum(1, keepdim=True), query @ queue), dim=1) / temperature
        return nn.functional.cross_entropy(logits, torch.zeros(n, dtype=torch.int64))

    at.agree(lambda q, k, queue: solo.mocov2plus_loss_func(q, k, queue, temperature), formula, tensors)


@both
def test_solo_mocov3_and_nnclr(at):
    g, pick = at.generator, at.pick
    n, width, temperature = pick.randint(2, 20), pick.choice((3, 16, 33)), pick.choice((0.1, 0.2, 1.0))
    views = [randn(n, width, generator=g) for _ in range(2)]

    def formula(a, b):
        a, b = (nn.functional.normalize(x, dim=1) for x in (a, b))
        return dense.row_nce(a, b, torch.arange(n), 1 / temperature).mean()

    at.agree(lambda a, b: solo.nnclr_loss_func(a, b, temperature), formula, views)
    at.agree(lambda a, b: solo.mocov3_loss_func(a, b, temperature), lambda a, b: 2 * temperature * formula(a, b), views)


@both
def test_inf_cl(at):
    """Each row and the mean; labels or none, more keys than queries, a scale with a gradient."""
    g, pick = at.generator, at.pick
    n = pick.randint(2, 20)
    m, width = n + pick.choice((0, 5)), pick.choice((3, 16, 33))
    labels = torch.randint(0, m, (n,), generator=g) if pick.random() < 0.5 else None
    targets = torch.arange(n) if labels is None else labels
    given = labels if labels is None else labels.to(pick.choice((torch.int32, torch.int64)))
    shape = pick.choice(((), (1,)))
    tensors = [
        unit(n, width, generator=g),
        unit(m, width, generator=g),
        torch.full(shape, pick.choice((1.0, 14.0)), dtype=torch.float64),
    ]
    for ours, reduce in ((inf_cl.cal_flash_loss, nn.Identity()), (inf_cl.cal_inf_loss, torch.mean)):
        at.agree(
            lambda q, k, scale, ours=ours: ours(q, k, given, scale, head_dim=16),
            lambda q, k, scale, reduce=reduce: reduce(dense.row_nce(q, k, targets, scale)),
            tensors,
        )
    assert torch.equal(inf_cl.cal_ring_loss(*tensors[:2]), inf_cl.cal_inf_loss(*tensors[:2]))


def vectors(at, least=1):
    """Locations and global vectors, in upstream's shapes or as maps."""
    g, pick = at.generator, at.pick
    images, width = pick.randint(least, 5), pick.choice((3, 8))
    places, globals_ = pick.choice((1, 4)), pick.randint(1, 3)
    tensors = [0.7 * randn(images, width, n, generator=g) for n in (places, globals_)]
    if places == 4 and pick.random() < 0.5:
        return pick, [tensors[0], tensors[1]], [(images, width, 2, 2), tensors[1].shape]
    if globals_ == 1 and pick.random() < 0.5:
        return pick, tensors, [tensors[0].shape, (images, width)]
    return pick, tensors, [x.shape for x in tensors]


@both
def test_dim_infonce(at):
    """Exact, and with upstream's −10; one image too."""
    pick, tensors, shapes = vectors(at)
    mask = pick.choice(("exact", "reference"))
    at.agree(
        lambda *x: dim.infonce_loss(*(y.reshape(s) for y, s in zip(x, shapes, strict=True)), mask=mask),
        lambda l, m: dense.dim_nce(l, m, mask),
        tensors,
    )


@both
def test_dim_fenchel_and_donsker_varadhan(at):
    _, tensors, shapes = vectors(at, 2)
    measure = dim.MEASURES[at.seed % len(dim.MEASURES)]
    for ours, formula in (
        (lambda l, m: dim.fenchel_dual_loss(l, m, measure), lambda l, m: dense.fenchel(l, m, measure)),
        (dim.donsker_varadhan_loss, dense.donsker_varadhan),
    ):
        at.agree(lambda *x, ours=ours: ours(*(y.reshape(s) for y, s in zip(x, shapes, strict=True))), formula, tensors)
