"""InfoNCE (van den Oord, Li, Vinyals 2018, arXiv:1807.03748), with the choices of negatives that embedders train with.

Each query is classified among all keys, of which one is its own: mean_i −log(e^(s_i,t(i)) / Σ_j e^(s_ij)),
s = ⟨q, k⟩ / temperature. `symmetric` averages it with the same of every key among all queries (Radford et al. 2021).
What else may be a candidate, and what may not, is `losses/candidates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.group import Group
from fused_nce.core.spec import Block, Identity, Index, Spec, TanhClip, cached
from fused_nce.core.tails import REDUCTIONS, Nce
from fused_nce.losses import blocks, candidates
from fused_nce.losses.candidates import Batch, Rules
from fused_nce.losses.common import check_rows, inverse, masked_lse
from fused_nce.losses.heard import heard
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.registry import Entry, Size, dense_scores, features, ids, places, register

NO_CHOICE = (None,) * 17
"""Of candidates: the keys alone."""


@heard
def info_nce(
    queries: Tensor,  # (N, D)
    keys: Tensor,  # (M, D)
    targets: Tensor | None = None,  # (N,) int64
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = False,
    symmetric: bool = False,
    clip: float | None = None,
    penalty: float = 0.0,
    reduction: str = "mean",
    hard_negatives: Tensor | None = None,  # (N, H, D)
    share_hard_negatives: bool = False,
    query_ids: Tensor | None = None,  # (N,) int64
    key_ids: Tensor | None = None,  # (M,) int64
    false_negative_margin: float | None = None,
    guide: tuple[Tensor, ...] | None = None,  # (N, G), (M, G) and, for hard negatives, (N, H, G)
    guide_margin: float = 0.0,
    guide_margin_kind: str = "absolute",
    filter_hard_negatives: bool = False,
    directions: Sequence[str] = ("q2k",),
    joint: bool = False,
    hardness: float = 0.0,
    tau_plus: float | None = None,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,  # (N,)
    column_bias: Tensor | None = None,  # (M,)
    max_scale: float | None = None,
    prefixes: Sequence[int] | None = None,
    prefix_weights: Sequence[float] | None = None,
    group: Group = None,
    backend: str | None = None,
) -> NCEOutput:
    """InfoNCE of queries among keys, without holding the (N, M) scores.

    A row is a query with its key, the positive; its candidates are the positive and its negatives.

    Args:
        queries: (N, D), float64, 32, 16 or bfloat16.
        keys: (M, D), same dtype and device; M = N without targets.
        targets: (N,) int64, the key of each query, among this process's; None is i for query i.
        temperature: of the softmax, > 0; a 0-d tensor is learnable.
        normalize: scale every row to unit norm first, those of `hard_negatives` and of `guide` too.
        symmetric: average with the keys' classification among the queries; needs targets to be a permutation.
        clip: range c of a soft clip c·tanh(s/c) of the scores; None for none.
        penalty: λ of λ·mean(s²) over all scores, before the clip. Beside the filters alone of what follows.
        reduction: of `nce`: "mean", "sum", or "none" for (N,). The penalty stays a mean.
        hard_negatives: (N, H, D), negatives of each row's own. No filter and no id takes them out.
        share_hard_negatives: they are other rows' negatives too, where keys are candidates.
        query_ids: (N,) int64; a key whose id is the row's is none of its negatives. The row's own key has the row's id.
        key_ids: (M,) int64; None is `query_ids`, without targets.
        false_negative_margin: m in units of ⟨q,k⟩: a candidate with ⟨q,k⟩ > ⟨q,k⁺⟩ + m is no negative; in the other
            directions likewise (Qwen3-Embedding, arXiv:2506.05176). What equals that within rounding stays.
        guide: another model's embeddings of the queries, keys and, where hard negatives meet them, hard negatives: a
            candidate whose dot product there is above the positive's less the margin is no negative (GISTEmbed,
            arXiv:2402.16829). They have no gradient.
        guide_margin: that margin.
        guide_margin_kind: "absolute", or "relative": times the magnitude of the positive's dot product.
        filter_hard_negatives: margin and guide look at a row's own hard negatives too.
        directions: which pairs are candidates, "q2k" (the row's query, all keys), "k2q" (its key, all queries), "q2q",
            "k2k"; never a row with itself.
        joint: one denominator a row, in which the positive stands once for "q2k" and once for "k2q" (Li et al. 2023,
            arXiv:2308.03281); otherwise the mean of one loss a direction.
        hardness: α of t = s + α·stopgrad(⟨q,k⟩) on the negatives of "q2k" (Lan et al. 2025, arXiv:2503.04812).
        tau_plus: the share of false negatives, whose part is taken out of the negatives' sum, down to no less than n
            negatives of cosine −1 would have (Chuang et al. 2020, arXiv:2007.00224); for unit rows.
        label_smoothing: ε: the target gives ε/n to each of a row's n candidates.
        row_weights: (N,): the mean, and the sum, are weighted by them; elements under "none" are multiplied.
        column_bias: (M,), added to each score of its column: −log Q of sampled softmax. Differentiable; without clip
            and hardness. −∞ leaves the column out, and a row whose key it is has the loss ∞.
        max_scale: the largest 1 / temperature; a learned one has no gradient beyond it.
        prefixes: widths, each a loss of its own of that many first columns, normalised anew, and the sum of them
            (Matryoshka, arXiv:2205.13147).
        prefix_weights: of the prefixes' losses; None is 1 each.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone. Hard negatives
            that are not shared stay where they are; filters do not go round a ring.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest. Filters and label smoothing run on
            "chunked" and "reference".

    Returns:
        NCEOutput, float32 (float64 for float64 inputs), in nats; chance is log M. `stats` is of the queries' direction:
        top1, pos_mean, neg_lse_mean, nce_minus_chance, mi_bound. What needs more than keys and filters has the first
        three alone, top1 among all candidates; prefixes have theirs under `top1_64`, ….

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    check_rows("queries", queries, "keys", keys, same_n=targets is None)
    n, m = queries.shape[0], keys.shape[0]
    if clip is not None:
        checks.check_number("clip", clip, above=0)
    checks.check_number("penalty", penalty, at_least=0)
    checks.check_choice("reduction", reduction, REDUCTIONS)
    if targets is not None:
        checks.check_ids("targets", targets, n, "N", queries.device)
        if symmetric:
            _check_permutation(targets, m)
    scale = inverse("temperature", temperature, queries.device)
    tail = Nce(float(penalty), reduction)
    how: dict[str, Any] = {"group": group, "backend": backend}
    chosen = (
        *(hard_negatives, query_ids, key_ids, false_negative_margin, guide, tau_plus, row_weights, column_bias),
        *(max_scale, prefixes, prefix_weights, joint or None, hardness or None, label_smoothing or None),
        *(guide_margin or None, share_hard_negatives or None, filter_hard_negatives or None),
    )
    if chosen == NO_CHOICE and directions == ("q2k",) and guide_margin_kind == "absolute":
        spec = _spec(targets is not None, clip, tail.stats, symmetric, normalize, ())
        return _one_block(queries, keys, spec, tail, scale=scale, row_ids=targets, normalize=normalize, **how)
    scale = candidates.clamped(scale, max_scale)
    rules = Rules(
        directions=candidates.checked_directions(directions, symmetric),
        joint=joint,
        shared=("q2k", "k2k") if share_hard_negatives else (),
        filter_own=filter_hard_negatives,
        margin=false_negative_margin,
        guide_margin=guide_margin,
        relative=candidates.checked_kind(guide_margin_kind),
        hardness=hardness,
        own_hardness=hardness,
        tau_plus=tau_plus,
        smoothing=label_smoothing,
        clip=clip,
        reduction=reduction,
    )
    batch = Batch(queries, keys, targets, hard_negatives, query_ids, key_ids, guide, row_weights, column_bias)
    batch = candidates.checked(batch, rules)
    if prefixes is not None:
        widths, weights = candidates.checked_prefixes(prefixes, prefix_weights, queries.shape[1])
        _check_no_penalty(penalty)
        if normalize:  # queries, keys and hard negatives are, at each width
            batch = candidates.unit_guide(batch)
        return blocks.contrast_prefixes(batch, scale, rules, widths, weights, **how)
    if prefix_weights is not None:
        raise ValueError("prefix_weights: got some without prefixes, need None")
    alone = candidates.one_block(batch, rules, symmetric) and not candidates.filters(batch, rules)
    if normalize and not alone:  # else the engine does, in one function with the rest
        batch = candidates.unit(batch)
    if batch.h is not None:
        _check_no_penalty(penalty)
    batch = candidates.merged(batch, rules)
    if not candidates.one_block(batch, rules, symmetric):
        _check_no_penalty(penalty)
        return blocks.contrast(batch, scale, rules, **how)
    both = len(rules.directions) == 2
    spec = _spec(batch.targets is not None, clip, tail.stats, both, normalize, candidates.filters(batch, rules))
    more = candidates.filter_arguments(batch, rules)
    unit = normalize and not batch.unit
    return _one_block(batch.q, batch.k, spec, tail, scale=scale, row_ids=batch.targets, normalize=unit, **more, **how)


def _one_block(queries: Tensor, keys: Tensor, spec: Spec, tail: Nce, **options: Any) -> NCEOutput:
    parts = loss_of(queries, keys, spec, tail, **options)
    nce = parts.nce.squeeze(1) if tail.reduction == "none" else parts.nce
    return NCEOutput(parts.loss, nce, parts.penalty, parts.report)


@cached
def _spec(
    targets: bool, clip: float | None, stats: tuple[str, ...], both: bool, normalize: bool, filters: tuple[str, ...]
) -> Spec:
    """The C++ kernels compute neg_lse, neg_max and square at once; `square` costs the others a pass."""
    transform = Identity() if clip is None else TanhClip(float(clip))
    layout, columns = Index() if targets else Block(1), ("neg_lse",) if both else ()
    return Spec(layout, transform, stats, columns, unit_norm=normalize, filters=filters)


def _check_no_penalty(penalty: float) -> None:
    if penalty:
        raise ValueError(f"penalty: got {penalty!r} with more than keys, clip and filters, need 0")


def _check_permutation(targets: Tensor, m: int) -> None:
    """Each key the target of one query. Only a CPU's targets are read; a GPU checks its own, without a wait."""
    if targets.shape[0] != m:
        raise ValueError(f"targets: got N = {targets.shape[0]} for M = {m} keys, need a permutation for symmetric=True")
    whole = (targets.sort().values == torch.arange(m, device=targets.device)).all()
    need = "targets: got one key twice or none, need a permutation for symmetric=True"
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(whole):
            raise ValueError(need)
    else:
        torch._assert_async(whole, need)


class InfoNCELoss(nn.Module):
    """InfoNCE of queries among keys (`info_nce`), its settings kept; the temperature may be learned.

    Args:
        temperature: a number > 0; the start where it is learned.
        learnable: make it a parameter, `log_scale` = log(1 / temperature), 0-d.
        options: the settings of `info_nce`; its tensors come with each call.

    Shape:
        queries: (N, D).
        keys: (M, D).
        targets: (N,) int64, the key of each query; i for query i if left out.
        hard_negatives: (N, H, D); query_ids, row_weights: (N,); key_ids, column_bias: (M,); guide: as in `info_nce`.

    Example:
        ```
        InfoNCELoss(learnable=True)(torch.randn(8, 16), torch.randn(8, 16)).loss
        ```
    """

    def __init__(self, temperature: float = 0.1, *, learnable: bool = False, **options: Any) -> None:
        super().__init__()
        checks.check_number("temperature", temperature, above=0)
        self.temperature, self.options = temperature, options
        self.log_scale = nn.Parameter(-torch.tensor(float(temperature)).log()) if learnable else None

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return f"temperature={self.temperature}, learnable={self.log_scale is not None}, {self.options}"

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        targets: Tensor | None = None,
        *,
        hard_negatives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        guide: tuple[Tensor, ...] | None = None,
        row_weights: Tensor | None = None,
        column_bias: Tensor | None = None,
    ) -> NCEOutput:
        """`info_nce` of the batch."""
        temperature = self.temperature if self.log_scale is None else (-self.log_scale).exp()
        return info_nce(
            queries,
            keys,
            targets,
            temperature=temperature,
            hard_negatives=hard_negatives,
            query_ids=query_ids,
            key_ids=key_ids,
            guide=guide,
            row_weights=row_weights,
            column_bias=column_bias,
            **self.options,
        )


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
    **options: Any,
) -> Tensor:
    """The loss, dense."""
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
) -> Tensor:
    """Every direction's scores whole, and a mask of the negatives beside each."""
    rows = torch.arange(len(q))
    own = rows if targets is None else targets
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

    def scored(a: str, b: str) -> tuple[Tensor, Tensor]:
        """(t, who of them is kept), (N, columns)."""
        s = pairs if (a, b) == ("q", "k") else dense_scores(names[a], names[b], scale)
        kept = torch.ones_like(s, dtype=torch.bool)
        if false_negative_margin is not None:
            kept &= s <= (positive + scale * false_negative_margin)[:, None]
        if b in guide_of:
            kept &= guide_of[a] @ guide_of[b].T <= ceiling[:, None]
        t = s if clip is None else clip * torch.tanh(s / clip)
        if hardness and a == "q" and b != "q":
            t = t + hardness / scale.detach() * s.detach()
        return t, kept

    def direction(name: str) -> list[tuple[Tensor, Tensor]]:
        a, b = {"q2k": ("q", "k"), "k2q": ("own", "q"), "q2q": ("q", "q"), "k2k": ("own", "k")}[name]
        t, kept = scored(a, b)
        itself = own if b == "k" else rows
        kept = kept & (itself[:, None] != torch.arange(t.shape[1]))
        if query_ids is not None:
            kept = kept & (query_ids[:, None] != ids_of[b])
        if column_bias is not None and b == "k":
            t = t + column_bias
        found = [(t, kept)]
        if h is not None and b == "k":
            t, kept = scored(a, "h")
            mine = rows[:, None] == torch.arange(t.shape[1]) // h.shape[1]
            some = mine & (kept | (not filter_hard_negatives)) if name == "q2k" else torch.zeros_like(mine)
            found.append((t, some | (~mine & kept) if share_hard_negatives else some))
        return found

    top = positive if clip is None else clip * torch.tanh(positive / clip)
    if column_bias is not None:
        top = top + column_bias[own]

    def loss(found: list[tuple[Tensor, Tensor]], times: int) -> Tensor:
        t, kept = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
        count, lse = kept.sum(1).to(t.dtype), masked_lse(t, kept)
        if tau_plus is not None:
            total = torch.where(kept, t, -1e4).exp().sum(1)
            left = (total - count * tau_plus * top.exp()) / (1 - tau_plus)
            lse = torch.maximum(left, count * (-scale).exp()).log()
        value = -nn.functional.logsigmoid(top + math.log(times) - lse) + math.log(times)
        spread = top - (times * top + (t * kept).sum(1)) / (times + count)
        return value + label_smoothing * spread

    each = {name: direction(name) for name in directions}
    if joint:
        times = max(1, ("q2k" in each) + ("k2q" in each))
        losses = loss([pair for found in each.values() for pair in found], times)
    else:
        losses = torch.stack([loss(found, 1) for found in each.values()]).mean(0)
    return losses.mean() if row_weights is None else (row_weights * losses).sum() / row_weights.sum()


PLAIN = {"temperature", "symmetric", "clip", "penalty", "false_negative_margin"}


def _lattice(x: Tensor) -> Tensor:
    """Multiples of ½: dot products are exact in every dtype, and none lies near a margin of an odd eighth."""
    return (2 * x).round() / 2


def _entry(draws: Sequence[str] = (), **options: Any) -> Entry:
    """An example with these options, and of the tensors those that `draws` names."""

    def draw(seed: int, size: Size) -> dict[str, Any]:
        n, m = size.n, size.m if "targets" in draws and not options.get("symmetric") else size.n
        found = {"queries": features(seed, n, size.d), "keys": features(seed + 1, m, size.d), **options}
        if "unit" in draws:
            found |= {name: nn.functional.normalize(found[name], dim=-1) for name in ("queries", "keys")}
        if "hard_negatives" in draws:
            found["hard_negatives"] = features(seed + 2, n, size.p, size.d)
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
        if "row_weights" in draws:
            found["row_weights"] = features(seed + 7, n).square() + 0.5
        if "column_bias" in draws:
            found["column_bias"] = features(seed + 8, m)
        if options.get("temperature") is None:
            found["temperature"] = torch.tensor(0.7)
        return found

    one_op = set(options) <= PLAIN and set(draws) <= {"targets"}
    return Entry(
        "info_nce",
        info_nce,
        InfoNCELoss,
        "mean_i −log(e^(s_i,t(i)) / Σ_j e^(s_ij))",
        "van den Oord et al. 2018, arXiv:1807.03748",
        draw,
        oracle,
        frozen=("row_weights",),
        two_paths=() if one_op else ("queries", "keys", "hard_negatives", "column_bias"),
        paths=1 if one_op else 8,
        stopped=bool(options.get("hardness")),
        kinked=options.get("false_negative_margin") is not None or options.get("tau_plus") is not None,
    )


register(_entry(temperature=0.5))
register(_entry(), "learned temperature")
register(_entry(["targets"], temperature=0.4, clip=5.0, penalty=0.03), "targets, clip, penalty")
register(_entry(symmetric=True), "symmetric")
register(_entry(["targets"], symmetric=True, temperature=0.3, penalty=0.1), "symmetric, targets, penalty")
register(_entry(["hard_negatives", "row_weights"]), "own hard negatives, row weights")
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
        ["ids", "guide"], guide_margin=0.3, guide_margin_kind="relative", label_smoothing=0.2, max_scale=1.2, clip=6.0
    ),
    "guide, smoothing",
)
register(_entry(["targets", "column_bias"], label_smoothing=0.1, temperature=0.6), "column bias, smoothing")
register(_entry(["unit"], temperature=0.3, tau_plus=0.1, directions=("q2k", "q2q"), joint=True), "debiased, joint")
