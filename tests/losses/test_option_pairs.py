"""Every two options of `info_nce` together, against the formula written out row by row, or refused in one line."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from fused_nce import GradientCache, info_nce
from fused_nce.losses.candidates import DIRECTIONS
from tests.marks import nightly_but

N, D, H, G = 6, 5, 2, 4
F64 = torch.float64


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


Q, K, HARD = draw(1, N, D), draw(2, N, D), draw(3, N, H, D)
IDS = torch.tensor([0, 1, 0, 2, 3, 3])
TARGETS = torch.tensor([2, 1, 0, 3, 5, 4])  # a permutation, of keys with the row's id
GUIDE, SEVERAL = (draw(4, N, G), draw(5, N, G)), torch.tensor([[i, (i + 2) % N, -1 if i % 2 else 0] for i in range(N)])
OPTIONS: dict[str, dict[str, Any]] = {
    "targets": {"targets": TARGETS},
    "normalize": {"normalize": True},
    "symmetric": {"symmetric": True},
    "clip": {"clip": 2.0},
    "penalty": {"penalty": 0.1},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "hard": {"hard_negatives": HARD},
    "shared": {"hard_negatives": HARD, "share_hard_negatives": True},
    "ids": {"query_ids": IDS, "key_ids": IDS},
    "margin": {"false_negative_margin": -0.3},
    "margin, own": {"false_negative_margin": -0.3, "hard_negatives": HARD, "filter_hard_negatives": True},
    "guide": {"guide": GUIDE, "guide_margin": 0.2},
    "guide, relative": {"guide": GUIDE, "guide_margin": 0.2, "guide_margin_kind": "relative"},
    "directions": {"directions": DIRECTIONS},
    "k2k": {"directions": ("k2k",)},
    "joint": {"directions": ("q2k", "k2q", "q2q"), "joint": True},
    "hardness": {"hardness": 0.6},
    "tau_plus": {"tau_plus": 0.05},
    "smoothing": {"label_smoothing": 0.2},
    "row_weights": {"row_weights": draw(6, N).square()},
    "column_bias": {"column_bias": draw(7, N)},
    "max_scale": {"max_scale": 1.3},
    "prefixes": {"prefixes": (4, 2), "prefix_weights": (0.5, 2.0)},
    "positives": {"positives": SEVERAL},
    "soft": {"soft_targets": (SEVERAL[:, :2], torch.tensor([[0.25, 0.75]]).double().repeat(N, 1))},
}
ONE_POSITIVE = {"targets", "symmetric", "ids", "margin", "margin, own", "guide", "guide, relative", "directions", "k2k"}
ONE_POSITIVE |= {"joint", "tau_plus", "prefixes"}
BLOCKS = {"hard", "shared", "ids", "margin, own", "directions", "k2k", "joint", "hardness", "tau_plus", "smoothing"}
BLOCKS |= {"row_weights", "column_bias", "prefixes", "positives", "soft"}
REFUSED = {
    *((one, name) for one in ("positives", "soft") for name in ONE_POSITIVE),
    *(("penalty", name) for name in BLOCKS),
    *(("column_bias", name) for name in ("clip", "symmetric", "margin", "margin, own", "directions", "k2k", "joint")),
    *(("column_bias", "hardness"), ("clip", "hardness"), ("positives", "soft")),
    *(("symmetric", name) for name in ("directions", "k2k", "joint")),
    *(("k2k", name) for name in ("hard", "margin, own")),  # in which no hard negative is a candidate
    *(("shared", name) for name in ("guide", "guide, relative")),  # whose guide needs theirs
    *(("margin, own", name) for name in ("guide", "guide, relative")),
}


def plain(q: Any, k: Any, h: Any, o: dict[str, Any]) -> Any:
    """The loss, one candidate after the other; (N,) under "none"."""
    weights = o.get("prefix_weights", (1.0,))
    rows = torch.stack([w * elements(q, k, h, o, d) for d, w in zip(o.get("prefixes", (None,)), weights, strict=True)])
    losses, n = rows.sum(0), N
    if "row_weights" in o:
        losses, n = losses * o["row_weights"], o["row_weights"].sum()
    if o.get("reduction") == "none":
        return losses
    total = losses.sum() if o.get("reduction") == "sum" else losses.sum() / n
    if o.get("penalty"):
        scale = min(1 / 0.5, o.get("max_scale", 9.0))
        unit = nn.functional.normalize if o.get("normalize") else lambda x, dim: x
        total = total + o["penalty"] * (scale * unit(q, dim=1) @ unit(k, dim=1).T).square().mean()
    return total


def elements(q: Any, k: Any, h: Any, o: dict[str, Any], width: int | None) -> Any:
    """(N,) losses of one width."""
    guides = o.get("guide")
    if o.get("normalize") or width:
        q, k, h = (None if x is None else nn.functional.normalize(x[..., :width], dim=-1) for x in (q, k, h))
    if o.get("normalize") and guides:
        guides = [nn.functional.normalize(g, dim=-1) for g in guides]
    scale, clip, alpha = min(1 / 0.5, o.get("max_scale", 9.0)), o.get("clip"), o.get("hardness", 0.0)
    targets = o.get("targets", torch.arange(N)).tolist()
    found = []

    def soft_clip(s: Any) -> Any:
        return s if clip is None else clip * torch.tanh(s / clip)

    for i in range(N):
        chosen = {targets[i]: 1.0}
        if "positives" in o:
            several = set(o["positives"][i].tolist()) - {-1}
            chosen = dict.fromkeys(several, 1 / len(several))
        if "soft_targets" in o:
            chosen = dict(zip(*(x[i].tolist() for x in o["soft_targets"]), strict=True))
        bias = o.get("column_bias", torch.zeros(N, dtype=F64))
        tops = {j: soft_clip(scale * (q[i] @ k[j])) + bias[j] for j in chosen}
        own = max(chosen)
        best = q[i] @ k[own]
        line = None
        if guides:
            high = guides[0][i] @ guides[1][own]
            line = high - o["guide_margin"] * (high.abs() if o.get("guide_margin_kind") == "relative" else 1.0)

        def kept(r: Any, guided: Any, best: Any = best, line: Any = line) -> bool:
            margin = o.get("false_negative_margin")
            if margin is not None and bool(r > best + margin + 1e-12):
                return False
            return line is None or guided is None or bool(guided <= line + 1e-12)

        terms: dict[str, list[Any]] = {}
        lowest = soft_clip(torch.tensor(-scale, dtype=F64))  # of a cosine of −1
        for name in ("q2k", "k2q") if o.get("symmetric") else o.get("directions", ("q2k",)):
            row, columns = q[i] if name[0] == "q" else k[own], k if name[2] == "k" else q
            itself = set(chosen) if name[2] == "k" else {i}
            ids = o.get("query_ids")
            terms[name] = []
            for j in set(range(N)) - itself:
                if ids is not None and ids[j] == ids[i]:
                    continue
                guided = None
                if guides:
                    guided = guides[0 if name[0] == "q" else 1][i if name[0] == "q" else own]
                    guided = guided @ guides[1 if name[2] == "k" else 0][j]
                r = row @ columns[j]
                if kept(r, guided):
                    t = soft_clip(scale * r) + (alpha * r.detach() if name == "q2k" else 0)
                    terms[name].append(t + (bias[j] if name[2] == "k" else 0))
            if h is None or name[2] != "k":
                continue
            for owner, x in ((a, y) for a in range(N) for y in h[a]):
                r, mine = row @ x, owner == i
                if mine and (name == "k2k" or (o.get("filter_hard_negatives") and not kept(r, None))):
                    continue
                if not mine and not (o.get("share_hard_negatives") and kept(r, None)):
                    continue
                terms[name].append(soft_clip(scale * r) + (alpha * r.detach() if name == "q2k" else 0))
        joint = o.get("joint", False)
        floors = {name: len(x) * (lowest - alpha * (name == "q2k")).exp() for name, x in terms.items()}
        groups = [[*itertools.chain(*terms.values())]] if joint else list(terms.values())
        least = [sum(floors.values())] if joint else list(floors.values())
        times = max(1, ("q2k" in terms) + ("k2q" in terms)) if joint else 1
        mean = sum(w * tops[j] for j, w in chosen.items())
        each = []
        for group, floor in zip(groups, least, strict=True):
            negatives = sum((t.exp() for t in group), torch.zeros((), dtype=F64))
            if "tau_plus" in o:
                top = tops[own].exp()
                negatives = torch.maximum((negatives - len(group) * o["tau_plus"] * top) / (1 - o["tau_plus"]), floor)
            every = (times * sum(t.exp() for t in tops.values()) + negatives).log()
            candidates = [*list(tops.values()) * times, *group]
            smooth = every - sum(candidates) / len(candidates)
            eps = o.get("label_smoothing", 0.0)
            # Smoothing spreads the target, not the denominator that debiasing changes.
            each.append((1 - eps) * (every - mean) + eps * smooth)
        found.append(sum(each) / len(each))
    return torch.stack(found)


def calls(options: dict[str, Any], backend: str) -> list[Any]:
    """(ours, the formula, and both gradients)."""
    sides = []
    for ours in (True, False):
        q, k, h = leaves = [x.clone().requires_grad_() for x in (Q, K, HARD)]
        given = {**options, **({"hard_negatives": h} if "hard_negatives" in options else {})}
        if ours:
            out = info_nce(q, k, temperature=0.5, backend=backend, **given)
            value = out.nce if options.get("reduction") == "none" else out.loss
        else:
            value = plain(q, k, h if "hard_negatives" in options else None, given)
        found = torch.autograd.grad(value.square().sum(), leaves, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
        sides.append([value.detach(), *grads])
    return sides


@pytest.mark.parametrize("backend", nightly_but(["chunked"], ["chunked", "reference"]))
def test_every_pair(backend):
    refused, wrong = set(), {}
    for one, two in [*((name, name) for name in OPTIONS), *itertools.combinations(OPTIONS, 2)]:
        options = OPTIONS[one] | OPTIONS[two]
        if set(OPTIONS[one]) & set(OPTIONS[two]) - {"hard_negatives", "guide", "guide_margin"} and one != two:
            continue  # two values of one option
        try:
            ours, exact = calls(options, backend)
        except (ValueError, TypeError) as error:
            name, colon, _ = str(error).partition(": got ")
            clear = bool(colon) and "\n" not in str(error) and name in {*options, "positives", "soft_targets"}
            refused.add(frozenset((one, two) if clear else (one, two, str(error))))
            continue
        errors = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in zip(ours, exact, strict=True)]
        if max(errors) > 1e-10:
            wrong[one, two] = errors
    assert not wrong
    expected = {frozenset(pair) for pair in REFUSED}
    assert {tuple(sorted(x)) for x in refused} == {tuple(sorted(x)) for x in expected}


FEW = ("margin, own", "prefixes", "positives")


@pytest.mark.parametrize("names", [FEW, pytest.param(sorted({*OPTIONS} - {*FEW, "none"}), marks=pytest.mark.nightly)])
def test_each_option_compiles_and_is_cached(names):
    """One graph of the same numbers; and, in parts of a batch, the gradient of one pass."""
    for name in names:
        options = OPTIONS[name]
        leaves = [x.clone().requires_grad_() for x in (Q, K, HARD)]

        def loss(q: Any, k: Any, h: Any, *, options: dict[str, Any] = options) -> Any:
            more = {"hard_negatives": h} if "hard_negatives" in options else {}
            return info_nce(q, k, temperature=0.5, backend="chunked", **{**options, **more}).loss

        torch._dynamo.reset()
        found = [f(*leaves) for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
        grads = [torch.autograd.grad(x, leaves, allow_unused=True) for x in found]
        torch.testing.assert_close(*(x.detach() for x in found), rtol=1e-12, atol=0, msg=name)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(*(torch.zeros(()) if x is None else x for x in (a, b)), rtol=1e-11, atol=1e-14)
        weights = []
        for cached in (True, False):
            torch.manual_seed(0)
            net = nn.Linear(D, D).double()

            def encode(x: Any, net: nn.Module = net) -> Any:
                return tuple(net(y) for y in x)

            def whole(x: Any, loss: Any = loss) -> Any:
                return loss(*x)

            if cached:
                encoder: Any = nn.Module()
                encoder.net, encoder.forward = net, encode
                GradientCache(encoder, whole, part=2).backward((Q, K, HARD))
            else:
                whole(encode((Q, K, HARD))).backward()
            weights.append(net.weight.grad)
        torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-13, msg=name)
