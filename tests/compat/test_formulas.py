"""Every adapter on random configurations: values and gradients are those of the formula that it stands in for."""

from __future__ import annotations

import copy
import os
from unittest import mock

import pytest
import torch
from torch import nn

from fused_nce.compat import amdim, bolts, flagembedding, lightly, open_clip, supcontrast, swift
from tests.compat import dense
from tests.compat.harness import both, unit


def held(loss):
    """The keys of a loss's memory bank, (K, D)."""
    return loss.get_buffer("memory_bank.bank")


@both
def test_amdim_nce_mi_multi(at):
    """Rows of some images against all of them, as DataParallel hands them out; the four numbers weighted apart."""
    g, pick = at.generator, at.pick
    images, width, tclip = pick.randint(1, 6), pick.choice((3, 8, 17)), pick.choice((4.0, 10.0, 20.0))
    n = pick.randint(1, images)
    offset = pick.randint(0, images - n)
    mask = torch.eye(images)[offset : offset + n]
    shapes = [(n, width)] * 4 + [(width, images * locs) for locs in (25, 49, 25, 49)]
    tensors = [pick.choice((0.5, 2.0)) * torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    loss = amdim.NCE_MI_MULTI(tclip)

    def formula(*x):
        ways = [(x[0], x[6]), (x[2], x[4]), (x[0], x[7]), (x[2], x[5]), (x[1], x[6]), (x[3], x[4])]
        found = [dense.amdim_scores(a, b, images, tclip, offset=offset) for a, b in ways]
        losses = [-0.5 * (found[2 * i][0].mean() + found[2 * i + 1][0].mean()) for i in range(3)]
        return (*losses, 0.5 * sum(way[2] for way in found))

    at.agree(lambda *x: loss(*x[:4], *(t[None] for t in x[4:]), mask, "train"), formula, tensors)
    if at.seed % 10 == 0:
        seen = loss(*tensors[:4], *(t[None] for t in tensors[4:]), mask, mode="viz")
        wanted = dense.amdim_scores(tensors[0], tensors[7], images, tclip, offset=offset)[:2]
        for a, b in zip(seen, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@both
def test_amdim_loss_multi_nce(at):
    """From maps, the 5×5 sources drawn from torch's generator in upstream's order."""
    g, pick = at.generator, at.pick
    images, width, tclip = pick.randint(2, 5), pick.choice((4, 9)), pick.choice((10.0, 20.0))
    maps = [torch.randn(images, width, s, s, generator=g, dtype=torch.float64) for s in (1, 5, 7) * 2]
    if pick.random() < 0.5:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    loss = amdim.LossMultiNCE(tclip=tclip)
    torch.manual_seed(at.seed)
    places = [torch.randint(0, 25, (images,)) for _ in range(2)]

    def ours(*x):
        torch.manual_seed(at.seed)
        return loss(*x)

    def formula(*x):
        at = [torch.stack([x[m][i, :, p // 5, p % 5] for i, p in enumerate(places[v])]) for v, m in enumerate((1, 4))]
        sources = (x[0][:, :, 0, 0], at[0], x[3][:, :, 0, 0], at[1])
        targets = [x[m].permute(1, 0, 2, 3).reshape(width, -1) for m in (1, 2, 4, 5)]
        return dense.amdim_multi(sources, targets, images, tclip)

    at.agree(ours, formula, maps)


@both
def test_bolts_amdim(at):
    g, pick = at.generator, at.pick
    images, width, locs, tclip = pick.randint(1, 7), pick.choice((3, 16)), pick.randint(1, 9), pick.choice((5.0, 10.0))
    tensors = [torch.randn(*s, generator=g, dtype=torch.float64) for s in ((images, width), (width, images * locs))]

    def formula(a, b):
        scores, _, penalty = dense.amdim_scores(a, b, images, tclip)
        return -scores.mean(), penalty

    at.agree(lambda a, b: bolts.AmdimNCELoss(tclip)(a, b, torch.eye(images)), formula, tensors)


@both
def test_bolts_nt_xent(at):
    g, pick = at.generator, at.pick
    n, width, temperature = pick.randint(1, 20), pick.choice((3, 16, 33)), pick.choice((0.07, 0.5, 1.0))
    views = [unit(n, width, generator=g) for _ in range(2)]
    at.agree(lambda a, b: bolts.nt_xent_loss(a, b, temperature), lambda a, b: dense.nt_xent(a, b, temperature), views)


@both
def test_lightly_nt_xent(at):
    """Any row lengths, a negative temperature too."""
    g, pick = at.generator, at.pick
    n, width, temperature = pick.randint(1, 20), pick.choice((3, 16, 33)), pick.choice((0.07, 0.1, 0.5, -0.5))
    views = [torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2)]
    loss = lightly.NTXentLoss(temperature)
    at.agree(
        loss,
        lambda a, b: dense.nt_xent(nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1), temperature),
        views,
    )


@both
def test_lightly_with_a_bank(at):
    """View 0 against the bank as it was before the call; gradients of both views."""
    g, pick = at.generator, at.pick
    n, width, size = pick.randint(1, 9), pick.choice((3, 16)), pick.randint(1, 40)
    temperature = pick.choice((0.07, 0.5, -1.0))
    views = [torch.randn(n, width, generator=g, dtype=torch.float64) for _ in range(2)]
    loss = lightly.NTXentLoss(temperature, memory_bank_size=(size, width))
    before = held(loss).clone().double()
    at.agree(loss, lambda a, b: dense.bank(a, b, before, temperature), views)
    newest = nn.functional.normalize(views[1], dim=1)[-size:].float()
    bank = held(loss)
    assert all((bank - row).abs().sum(1).min() < 1e-5 for row in newest)


@both
def test_open_clip_clip(at):
    """Scale and bias tensors, 0-d or of one element; the bias has a zero gradient, not none."""
    g, pick = at.generator, at.pick
    n, width = pick.randint(2, 20), pick.choice((3, 16, 33))
    shape = pick.choice(((), (1,)))
    tensors = [
        *(unit(n, width, generator=g) for _ in range(2)),
        torch.full(shape, pick.choice((1.0, 5.0, 14.0)), dtype=torch.float64),
        torch.full(shape, -2.0, dtype=torch.float64),
    ]
    loss = open_clip.ClipLoss(cache_labels=True)
    at.agree(lambda *x: loss(*x, output_dict=True)["contrastive_loss"], dense.clip, tensors)
    if at.seed == 0:
        assert torch.equal(
            loss(*tensors[:3]), loss(image_features=tensors[0], text_features=tensors[1], logit_scale=tensors[2])
        )


@both
def test_open_clip_sig_lip(at):
    g, pick = at.generator, at.pick
    n, width = pick.randint(1, 20), pick.choice((3, 16, 33))
    shape = pick.choice(((), (1,)))
    tensors = [
        *(unit(n, width, generator=g) for _ in range(2)),
        torch.full(shape, pick.choice((1.0, 10.0)), dtype=torch.float64),
        torch.full(shape, pick.choice((-10.0, 0.0)), dtype=torch.float64),
    ]
    loss = open_clip.SigLipLoss(dist_impl=pick.choice((None, "gather")), chunk_size=pick.choice((0, 8)))
    at.agree(lambda *x: loss(*x, output_dict=True)["contrastive_loss"], dense.siglip, tensors)


@both
def test_supcontrast(at):
    """Views, maps as features, labels or a mask or neither, anchors of one view or all."""
    g, pick = at.generator, at.pick
    images, views, mode = pick.randint(1, 6), pick.randint(1, 3), pick.choice(("all", "one"))
    temperature, base = pick.choice((0.07, 0.5)), pick.choice((0.07, 0.5))
    features = unit(images, views, 12, generator=g)
    if pick.random() < 0.3:
        features = features.reshape(images, views, 3, 2, 2)
    labels = torch.tensor([pick.randint(-1, 2) for _ in range(images)])
    how = pick.choice(("labels", "column", "mask", "none"))
    given = {
        "labels": {"labels": labels.to(pick.choice((torch.int32, torch.int64)))},
        "column": {"labels": labels[:, None]},
        "mask": {"mask": (labels[:, None] == labels).to(pick.choice((torch.float32, torch.bool)))},
        "none": {},
    }[how]
    classes = labels if how != "none" else torch.arange(images)
    loss = supcontrast.SupConLoss(temperature, mode, base)
    at.agree(
        lambda x: loss(x, **given), lambda x: dense.sup_con(x, classes.tolist(), temperature, base, mode), [features]
    )


@both
def test_supcontrast_with_a_mask(at):
    """One-sided and weighted, with rows of zeros."""
    g, pick = at.generator, at.pick
    images, views, mode = pick.randint(2, 6), pick.randint(1, 3), pick.choice(("all", "one"))
    mask = torch.rand(images, images, generator=g) * (torch.rand(images, images, generator=g) < 0.5)
    if pick.random() < 0.3:
        mask = mask > 0
    if images * views == 2:
        return  # the gradient is 0: the next test
    loss = supcontrast.SupConLoss(0.2, mode, 0.1)
    at.agree(
        lambda x: loss(x, mask=mask),
        lambda x: dense.sup_con_mask(x, mask, 0.2, 0.1, mode),
        [unit(images, views, 12, generator=g)],
    )


@pytest.mark.parametrize(("images", "views"), [(1, 1), (1, 2), (2, 1)])
def test_supcontrast_with_a_mask_of_at_most_two_rows(images, views):
    """0: no other row, or one, which is the positive. Off by no more than 2^-24·(4 + √D)·|s|, times the weight of s."""
    x = unit(images, views, 12, generator=torch.Generator().manual_seed(0)).float().requires_grad_()
    loss = supcontrast.SupConLoss(0.2, "all", 0.1)(x, mask=torch.full((images, images), 0.3))
    (gradient,) = torch.autograd.grad(loss, x)
    assert max(abs(loss), gradient.abs().max()) <= 2**-24 * (4 + 12**0.5) * 5 * 2


def test_copies_and_state_dicts():
    """Upstream's keys load strictly; what is saved comes back."""
    assert list(amdim.LossMultiNCE().state_dict()) == ["masks_r5"]
    masks = amdim.LossMultiNCE().masks_r5
    assert masks.dtype == torch.uint8
    assert masks.shape == (25, 1, 5, 5)
    assert all(masks[5 * i + j, 0, i, j] == 1 for i in range(5) for j in range(5))
    assert masks.sum() == 25
    one, two = (lightly.NTXentLoss(memory_bank_size=(8, 3)) for _ in range(2))
    kept = held(two).clone()
    two.load_state_dict({})  # upstream saves no bank
    assert torch.equal(held(two), kept)
    two.load_state_dict(one.state_dict())
    assert torch.equal(held(two), held(one))
    assert not torch.equal(held(two), kept)
    assert torch.equal(held(copy.deepcopy(one)), held(one))


def test_the_bank_stands_still_for_an_evaluation():
    loss = lightly.NTXentLoss(memory_bank_size=(8, 3))
    kept = held(loss).clone()
    loss(torch.randn(4, 3), torch.randn(4, 3))
    assert torch.equal(held(loss), kept)


def test_an_empty_mask_is_upstreams_sign_to_skip():
    x = [torch.randn(2, 4) for _ in range(4)] + [torch.randn(1, 4, 2 * n) for n in (25, 49, 25, 49)]
    assert [float(v) for v in amdim.NCE_MI_MULTI()(*x, torch.zeros(2, 2), "train")] == [0, 0, 0, 0]


@both
def test_swift_infonce(at):
    """Every block of the denominator, with and without the margin."""
    g, pick = at.generator, at.pick
    n, size, margin = pick.randint(1, 7), pick.randint(1, 3), pick.choice((None, 0.0, 0.5))
    blocks = {name: pick.random() < 0.5 for name in ("INCLUDE_QQ", "INCLUDE_DD")}
    words = {f"INFONCE_{name}": str(on) for name, on in blocks.items()}
    words |= {} if margin is None else {"INFONCE_MASK_FAKE_NEGATIVE": "1", "INFONCE_FAKE_NEG_MARGIN": str(margin)}
    labels, starts = torch.tensor(([1] + [0] * (size - 1)) * n), torch.arange(n) * size

    def ours(q, p):
        sentences = torch.cat((q[:, None], p.view(n, size, -1)), dim=1).flatten(0, 1)
        with mock.patch.dict(os.environ, words):
            return swift.InfonceLoss(None, None)({"last_hidden_state": sentences}, labels)

    def formula(q, p):
        positive, own = (q * p[starts]).sum(1, keepdim=True), nn.functional.one_hot(starts, n * size).bool()
        limit = torch.inf if margin is None else positive.detach() + margin
        parts = [(s := q @ p.T).masked_fill((s > limit) & ~own, -torch.inf)]
        if blocks["INCLUDE_QQ"]:
            parts.append((s := q @ q.T).masked_fill((s > limit) | torch.eye(n, dtype=torch.bool), -torch.inf))
        if blocks["INCLUDE_DD"]:
            parts.append((p[starts] @ p.T).masked_fill(own, -torch.inf))
        return (torch.cat(parts, dim=1) / 0.1).logsumexp(1).mean() - (positive / 0.1).mean()

    at.agree(ours, formula, [unit(n, 8, generator=g), unit(n * size, 8, generator=g)])


@both
def test_flagembedding(at):
    """Without a teacher, and with both kinds of one."""
    g, pick = at.generator, at.pick
    n, size, kind = pick.randint(1, 7), pick.randint(1, 4), pick.choice((None, "kl_div", "m3_kd_loss"))
    model = flagembedding.InBatch()
    model.temperature, model.kd_loss_type = 0.1, kind
    weights = torch.rand(n, size, generator=g, dtype=torch.float64)

    def formula(q, p):
        s, own = q @ p.T / 0.1, torch.arange(n)[:, None] * size + torch.arange(size)
        first = nn.functional.cross_entropy(s, own[:, 0])
        if kind == "kl_div":
            return first - (s.gather(1, own).log_softmax(1) * weights).sum(1).mean()
        if kind is None:
            return first
        later = [s.scatter(1, own[:, :i], -torch.inf) for i in range(size)]
        losses = [nn.functional.cross_entropy(x, own[:, i], reduction="none") for i, x in enumerate(later)]
        return (torch.stack(losses, dim=1) * weights).sum(1).mean()

    def ours(q, p):
        return model._compute_in_batch_neg_loss(q, p, None if kind is None else weights.to(q.dtype))[1]

    at.agree(ours, formula, [unit(n, 8, generator=g), unit(n * size, 8, generator=g)])
