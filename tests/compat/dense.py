"""The losses that the adapters stand in for, dense, in float64 and plain torch, written from their formulas."""

from __future__ import annotations

import math

import torch
from torch import nn

from fused_nce.losses.common import dense_nce


def amdim_scores(r_src, r_trg, n_images, tclip, penalty=0.05, offset=0):
    """(log-probabilities, clipped positives, penalty·mean(s²)), each positive against all other images."""
    s = r_src @ r_trg / math.sqrt(r_src.shape[1])
    t, rows = tclip * torch.tanh(s / tclip), len(r_src)
    own = torch.arange(offset, offset + rows)[:, None] == torch.arange(s.shape[1]) // (s.shape[1] // n_images)
    return -dense_nce(t, own, ~own).view(rows, -1), t[own].view(rows, -1), penalty * s.square().mean()


def amdim_multi(sources, targets, n_images, tclip):
    """Four numbers of sources r1_1, r5_1, r1_2, r5_2 and targets r5_1, r7_1, r5_2, r7_2."""
    (r1_1, r5_1, r1_2, r5_2), (t5_1, t7_1, t5_2, t7_2) = sources, targets
    ways = [(r1_1, t5_2), (r1_2, t5_1), (r1_1, t7_2), (r1_2, t7_1), (r5_1, t5_2), (r5_2, t5_1)]
    found = [amdim_scores(a, b, n_images, tclip) for a, b in ways]
    losses = [-0.5 * (found[2 * i][0].mean() + found[2 * i + 1][0].mean()) for i in range(3)]
    return (*losses, 0.5 * sum(x[2] for x in found))


def nt_xent(out0, out1, temperature):
    """Mean cross-entropy of each of 2N rows among the others, its twin the target."""
    z = torch.cat((out0, out1))
    s = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
    return nn.functional.cross_entropy(s, torch.arange(len(z)).roll(len(out0)))


def bank(out0, out1, negatives, temperature):
    """Mean cross-entropy of the own twin against the bank."""
    z0, z1 = (nn.functional.normalize(x, dim=1) for x in (out0, out1))
    logits = torch.cat(((z0 * z1).sum(1, keepdim=True), z0 @ negatives.T), dim=1) / temperature
    return nn.functional.cross_entropy(logits, torch.zeros(len(z0), dtype=torch.int64))


def clip(image, text, logit_scale, logit_bias):
    """Mean of two cross-entropies."""
    logits, labels = logit_scale * image @ text.T + logit_bias, torch.arange(len(image))
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


def siglip(image, text, logit_scale, logit_bias):
    """Every pair a question of its own, divided by N."""
    logits = logit_scale * image @ text.T + logit_bias
    signs = 2 * torch.eye(len(image), dtype=logits.dtype) - 1
    return -nn.functional.logsigmoid(signs * logits).sum() / len(image)


def sup_con(features, classes, temperature, base_temperature, mode):
    """Each anchor's mean log-probability of its positives among all rows but itself; 0 without one."""
    images, views = features.shape[:2]
    rows = [(b, v) for v in range(views) for b in range(images)]
    total = 0 * features.sum()
    anchors = rows if mode == "all" else rows[:images]
    for b, v in anchors:
        others = [(c, w) for c, w in rows if (c, w) != (b, v)]
        s = torch.stack([features[b, v].flatten() @ features[c, w].flatten() for c, w in others] or [total])
        log_p = (s / temperature).log_softmax(0)
        own = [log_p[i] for i, (c, _) in enumerate(others) if classes[c] == classes[b]]
        if own:
            total = total - torch.stack(own).mean()
    return temperature / base_temperature * total / len(anchors)


def sup_con_mask(features, mask, temperature, base_temperature, mode):
    """Of weighted positives: each anchor's mean of log-probabilities among all rows but itself, by its mask's row."""
    images, views = features.shape[:2]
    z = features.flatten(2).transpose(0, 1).flatten(0, 1)
    anchors = len(z) if mode == "all" else images
    others = ~torch.eye(len(z), dtype=torch.bool)[:anchors]
    weights = mask.to(z.dtype).repeat(anchors // images, views) * others
    log_p = (z[:anchors] @ z.T / temperature).masked_fill(~others, -math.inf).log_softmax(1).masked_fill(~others, 0)
    total = weights.sum(1)
    loss = -(weights * log_p.nan_to_num()).sum(1) / torch.where(total < 1e-6, 1, total)
    return temperature / base_temperature * loss.mean()


def dcl(out0, out1, temperature, weight_fn):
    """Mean over both views of log Σ over the other images' rows, less the weighted positive."""
    z = [nn.functional.normalize(x, dim=1) for x in (out0, out1)]
    off = ~torch.eye(len(out0), dtype=torch.bool)
    total = 0
    for a, b in ((z[0], z[1]), (z[1], z[0])):
        weights = 1 if weight_fn is None else weight_fn(a, b)
        others = torch.cat([(a @ c.T / temperature)[off].view(len(a), -1) for c in (a, b)], dim=1)
        total = total + (others.logsumexp(1) - weights * (a * b).sum(1) / temperature).mean() / 2
    return total


def in_form(z, classes, temperature):
    """solo-learn's: −log of the positives' share of all other rows; 0 for a row without one."""
    z = nn.functional.normalize(z, dim=1)
    s = z @ z.T / temperature
    total = 0 * z.sum()
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        own = [j for j in others if classes[j] == classes[i]]
        if own:
            total = total + s[i, others].logsumexp(0) - s[i, own].logsumexp(0)
    return total / len(z)


def row_nce(q, k, targets, scale):
    """(N,) cross-entropies."""
    return nn.functional.cross_entropy(scale * q @ k.T, targets, reduction="none")


def dim_scores(local, global_):
    """(N, G, N, L) of (N, C, L) and (N, C, G), and which of them are an image's own."""
    u = torch.einsum("icg,kcl->igkl", global_, local)
    return u, torch.eye(len(u), dtype=torch.bool)[:, None, :, None].expand_as(u)


def dim_nce(local, global_, mask):
    """Each own pair among the other images' locations; those of its own image at a logit of −10, or nowhere."""
    u, _ = dim_scores(local, global_)
    rows = []
    for i in range(u.shape[0]):
        for g in range(u.shape[1]):
            others = torch.cat([u[i, g, k] for k in range(len(u)) if k != i] or [u.new_zeros(0)])
            leak = u.new_full((u.shape[3] if mask == "reference" else 0,), -10.0)
            for x in u[i, g, i]:
                rows.append(torch.cat((x[None], others, leak)).logsumexp(0) - x)
    return torch.stack(rows).mean()


def fenchel(local, global_, measure):
    """E_product − E_joint, each a mean."""
    u, own = dim_scores(local, global_)
    softplus, two = (lambda x: torch.logaddexp(x, x.new_zeros(()))), math.log(2)
    joint, product = {
        "GAN": (lambda x: -softplus(-x), softplus),
        "JSD": (lambda x: two - softplus(-x), lambda x: softplus(x) - two),
        "X2": (lambda x: x**2, lambda x: -0.5 * (x.abs() + 1) ** 2),
        "KL": (lambda x: x, lambda x: torch.exp(x - 1)),
        "RKL": (lambda x: -torch.exp(-x), lambda x: x - 1),
        "H2": (lambda x: 1 - torch.exp(-x), lambda x: torch.exp(x) - 1),
        "W1": (lambda x: x, lambda x: x),
    }[measure]
    return product(u[~own]).mean() - joint(u[own]).mean()


def donsker_varadhan(local, global_):
    """log mean e^u − mean u."""
    u, own = dim_scores(local, global_)
    return u[~own].exp().mean().log() - u[own].mean()


def cpc(targets, predictions, scale):
    """Σ_i i·(mean cross-entropy of each place's prediction of the one i + 1 rows below), of (B, H, W, D) maps."""
    images, height, width, d = targets.shape
    total = 0 * targets.sum()
    for i in range(1, height - 1):
        logits = scale * predictions[:, : height - i - 1].reshape(-1, d) @ targets.reshape(-1, d).T
        rows = [(b, r, c) for b in range(images) for r in range(height - i - 1) for c in range(width)]
        labels = torch.tensor([(b * height + r + i + 1) * width + c for b, r, c in rows])
        total = total + i * nn.functional.cross_entropy(logits, labels)
    return total
