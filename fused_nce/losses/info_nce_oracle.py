"""What `info_nce` must equal, dense, and an example of each of its choices, which the registry holds it to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.losses import candidates
from fused_nce.losses.common import masked_lse
from fused_nce.losses.info_nce import InfoNCELoss, info_nce
from fused_nce.losses.registry import Entry, Size, dense_scores, features, ids, places, register


def still(s: Tensor) -> Tensor:
    """Scores that are a weight, and are not differentiated."""
    return s.detach()


def oracle(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    symmetric: bool = False,
    clip: float | None = None,
    penalty: float = 0.0,
    max_scale: float | None = None,
    hard_negatives: Tensor | None = None,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    **options: Any,
) -> Tensor:
    """The loss, dense."""
    if prefixes is not None:
        found = []
        for width, weight in zip(prefixes, prefix_weights or [1.0] * len(prefixes), strict=True):
            operands = {"queries": queries, "keys": keys, "hard_negatives": hard_negatives}
            how: dict[str, Any] = {"temperature": temperature, "symmetric": symmetric, "clip": clip, **options}
            for name, x in operands.items():
                how[name] = None if x is None else nn.functional.normalize(x[..., :width], dim=-1)
            found.append(weight * oracle(targets=targets, max_scale=max_scale, **how))
        return torch.stack(found).sum()
    scale = 1 / torch.as_tensor(temperature, dtype=queries.dtype)
    scale = scale if max_scale is None else scale.clamp(max=max_scale)
    if symmetric:
        options["directions"] = ("q2k", "k2q")
    loss = _dense(queries, keys, hard_negatives, targets, scale, clip, **options)
    return loss + penalty * dense_scores(queries, keys, scale).square().mean() if penalty else loss


def _dense(
    q: Tensor,
    k: Tensor,
    h: Tensor | None,
    targets: Tensor | None,
    scale: Tensor,
    clip: float | None,
    *,
    share_hard_negatives: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    false_negative_margin: float | None = None,
    guide: tuple[Tensor, ...] | None = None,
    guide_margin: float = 0.0,
    guide_margin_kind: str = "absolute",
    filter_hard_negatives: bool = False,
    directions: Sequence[str] = ("q2k",),
    joint: bool = False,
    hardness: float = 0.0,
    tau_plus: float | None = None,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
    column_bias: Tensor | None = None,
    positives: Tensor | None = None,
    soft_targets: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Every direction's scores whole, and a mask of the negatives beside each."""
    rows = torch.arange(len(q))
    own = rows if targets is None else targets
    several = positives if soft_targets is None else soft_targets[0]
    chosen = torch.zeros(len(q), len(k) + 1, dtype=q.dtype)  # and a last column for what is none
    mass = chosen
    if several is not None:
        own, at = several.amax(1), several % (len(k) + 1)
        chosen.scatter_(1, at, 1.0)
        if soft_targets is not None:
            mass = torch.zeros_like(chosen).scatter_add(1, at, soft_targets[1].to(q.dtype))
    chosen, mass = chosen[:, :-1].bool(), mass[:, :-1]
    guides = [] if guide is None else [g.double() for g in guide]
    names = {"q": q, "k": k, "own": k[own]} | ({} if h is None else {"h": h.flatten(0, 1)})
    guide_of = dict(zip(("q", "k", "h"), (g.flatten(0, -2) for g in guides), strict=False))
    if guides:
        guide_of["own"] = guide_of["k"][own]
        best = (guide_of["q"] * guide_of["own"]).sum(1)
        ceiling = best - guide_margin * (best.abs() if guide_margin_kind == "relative" else 1)
    key_ids = query_ids if key_ids is None else key_ids
    ids_of = {"q": query_ids, "k": key_ids}
    pairs = dense_scores(q, k, scale)
    positive = pairs[rows, own]

    def soft(s: Tensor) -> Tensor:
        return s if clip is None else clip * torch.tanh(s / clip)

    def scored(a: str, b: str) -> tuple[Tensor, Tensor, Tensor]:
        """(t, who of them is kept), (N, columns), and e^t of a cosine of −1."""
        s = pairs if (a, b) == ("q", "k") else dense_scores(names[a], names[b], scale)
        kept = torch.ones_like(s, dtype=torch.bool)
        if false_negative_margin is not None:
            kept &= s <= (positive + scale * false_negative_margin)[:, None]
        if b in guide_of:
            kept &= guide_of[a] @ guide_of[b].T <= ceiling[:, None]
        t, least = soft(s), soft(-scale)
        if hardness and a == "q" and b != "q":
            t, least = t + hardness / scale.detach() * still(s), least - hardness
        return t, kept, least.exp()

    def direction(name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        a, b = {"q2k": ("q", "k"), "k2q": ("own", "q"), "q2q": ("q", "q"), "k2k": ("own", "k")}[name]
        t, kept, least = scored(a, b)
        itself = own if b == "k" else rows
        kept = kept & (itself[:, None] != torch.arange(t.shape[1]))
        kept = kept & ~chosen if several is not None else kept
        if query_ids is not None:
            kept = kept & (query_ids[:, None] != ids_of[b])
        if column_bias is not None and b == "k":
            t = t + column_bias
        found = [(t, kept, least)]
        if h is not None and b == "k":
            t, kept, least = scored(a, "h")
            mine = rows[:, None] == torch.arange(t.shape[1]) // h.shape[1]
            some = mine & (kept | (not filter_hard_negatives)) if name == "q2k" else torch.zeros_like(mine)
            found.append((t, some | (~mine & kept) if share_hard_negatives else some, least))
        return found

    top = soft(positive)
    if column_bias is not None:
        top = top + column_bias[own]
    mean = inside = top
    size: float | Tensor = 1.0
    if several is not None:
        t = soft(pairs) if column_bias is None else soft(pairs) + column_bias
        mean, inside = (t * mass).sum(1) / mass.sum(1), (t * chosen).sum(1)
        top, size = masked_lse(t, chosen), chosen.sum(1)

    def loss(found: list[tuple[Tensor, Tensor, Tensor]], times: int) -> Tensor:
        t, kept = (torch.cat([each[i] for each in found], dim=1) for i in range(2))
        count, lse = kept.sum(1).to(t.dtype), masked_lse(t, kept)
        if tau_plus is not None:
            total = torch.where(kept, t, -1e4).exp().sum(1)
            left = (total - count * tau_plus * top.exp()) / (1 - tau_plus)
            lse = torch.maximum(left, sum(kept.sum(1) * least for _, kept, least in found)).log()  # type: ignore[arg-type]
        value = -nn.functional.logsigmoid(top + math.log(times) - lse) + math.log(times)
        spread = mean - (times * inside + (t * kept).sum(1)) / (times * size + count)
        return value + top - mean + label_smoothing * spread

    each = {name: direction(name) for name in directions}
    if joint:
        times = max(1, ("q2k" in each) + ("k2q" in each))
        losses = loss([pair for found in each.values() for pair in found], times)
    else:
        losses = torch.stack([loss(found, 1) for found in each.values()]).mean(0)
    return losses.mean() if row_weights is None else (row_weights * losses).sum() / row_weights.sum()


PLAIN = {"temperature", "symmetric", "clip", "penalty", "false_negative_margin", "hardness", "prefixes"}
PLAIN |= {"prefix_weights"}


def _lattice(x: Tensor) -> Tensor:
    """Multiples of ½: dot products are exact in every dtype, and none lies near a margin of an odd eighth."""
    return (2 * x).round() / 2


def _entry(draws: Sequence[str] = (), **options: Any) -> Entry:
    """An example with these options, and of the tensors those that `draws` names."""

    def draw(seed: int, size: Size) -> dict[str, Any]:
        free = not {"targets", "several", "soft"}.isdisjoint(draws) and not options.get("symmetric")
        n, m = size.n, size.m if free else size.n
        d = max(size.d, *options.get("prefixes", (1,)))  # at least as wide as the widest prefix
        found = {"queries": features(seed, n, d), "keys": features(seed + 1, m, d), **options}
        if "unit" in draws:
            found |= {name: nn.functional.normalize(found[name], dim=-1) for name in ("queries", "keys")}
        if "hard_negatives" in draws:
            found["hard_negatives"] = features(seed + 2, n, size.p, d)
        if options.get("false_negative_margin") is not None:
            found |= {name: _lattice(x) for name, x in found.items() if isinstance(x, Tensor)}
        if "targets" in draws:
            permuted = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            found["targets"] = permuted if options.get("symmetric") else places(seed, m, n)
        if "ids" in draws:
            found["key_ids"] = ids(seed + 3, m, 4)
            found["query_ids"] = found["key_ids"][found["targets"] if "targets" in draws else torch.arange(n)]
        if "guide" in draws:
            shapes = [(n,), (m,), *([(n, size.p)] if "hard_negatives" in draws else [])]
            found["guide"] = tuple(_lattice(features(seed + 4 + i, *shape, 3)) for i, shape in enumerate(shapes))
        if "several" in draws or "soft" in draws:
            columns = torch.stack([places(seed + i, m, n) for i in range(3)], dim=1)
            columns[:, 1:] = columns[:, 1:].masked_fill(features(seed + 5, n, 2) < 0, -1)
            w = features(seed + 6, n, 3).abs().double().masked_fill(columns < 0, 0.0)
            w = (w / w.sum(1, keepdim=True)).to(found["queries"].dtype)
            found |= {"soft_targets": (columns, w)} if "soft" in draws else {"positives": columns}
        if "row_weights" in draws:
            found["row_weights"] = features(seed + 7, n).square() + 0.5
        if "column_bias" in draws:
            found["column_bias"] = features(seed + 8, m)
        if options.get("temperature") is None:
            found["temperature"] = torch.tensor(0.7)
        return found

    one_op = set(options) <= PLAIN and set(draws) <= {"targets"}
    return Entry(
        info_nce,
        InfoNCELoss,
        "mean_i −log(e^(s_i,t(i)) / Σ_j e^(s_ij))",
        "van den Oord et al. 2018, arXiv:1807.03748",
        draw,
        oracle,
        two_paths=() if one_op else ("queries", "keys", "hard_negatives", "row_weights", "column_bias"),
        paths=1 if one_op else 8,
        stopped=bool(options.get("hardness")),
        kinked=options.get("false_negative_margin") is not None or options.get("tau_plus") is not None,
    )


# Candidates take wide clips: torch's own tanh, of which their positives are made, has no digits of a slope near 0.
register(_entry(temperature=0.5))
register(_entry(), "learned temperature")
register(_entry(["targets"], temperature=0.4, clip=5.0, penalty=0.03), "targets, clip, penalty")
register(_entry(symmetric=True), "symmetric")
register(_entry(["targets"], symmetric=True, temperature=0.3, penalty=0.1), "symmetric, targets, penalty")
register(_entry(["targets"], hardness=0.8), "hardness")
register(_entry(["hard_negatives", "row_weights"]), "own hard negatives, row weights")
register(_entry(["hard_negatives"], label_smoothing=0.15), "own hard negatives, label smoothing")
register(
    _entry(["hard_negatives", "targets", "ids"], share_hard_negatives=True, hardness=0.8, directions=("q2k", "k2k")),
    "shared hard negatives, ids, hardness",
)
register(_entry(["targets"], false_negative_margin=0.125, penalty=0.02), "margin")
register(
    _entry(
        ["hard_negatives", "guide"],
        share_hard_negatives=True,
        filter_hard_negatives=True,
        false_negative_margin=0.625,
        guide_margin=0.125,
        directions=candidates.DIRECTIONS,
        joint=True,
    ),
    "margin, guide, joint directions",
)
register(
    _entry(
        ["ids", "guide"], guide_margin=0.3, guide_margin_kind="relative", label_smoothing=0.2, max_scale=1.2, clip=30.0
    ),
    "guide, smoothing",
)
register(_entry(["targets", "column_bias"], label_smoothing=0.1, temperature=0.6), "column bias, smoothing")
register(_entry(["several", "hard_negatives"], label_smoothing=0.1, clip=30.0), "several positives, hard negatives")
register(_entry(["soft", "row_weights"], temperature=0.5, hardness=0.4), "soft targets, hardness")
register(_entry(["targets"], prefixes=(2, 5, 3), prefix_weights=(0.5, 1.0, 2.0)), "prefixes")
register(
    _entry(["hard_negatives", "ids"], prefixes=(2, 4), share_hard_negatives=True, directions=("q2k", "k2q")),
    "prefixes, shared hard negatives, ids",
)
register(_entry(["unit"], temperature=0.3, tau_plus=0.1, directions=("q2k", "q2q"), joint=True), "debiased, joint")
