"""InfoNCE (van den Oord, Li, Vinyals 2018, arXiv:1807.03748), with the choices of negatives that embedders train with.

Each query is classified among all keys, of which one is its own: mean_i −log(e^(s_i,t(i)) / Σ_j e^(s_ij)),
s = ⟨q, k⟩ / temperature. `symmetric` averages it with the same of every key among all queries (Radford et al. 2021).
What else may be a candidate, and what may not, is `losses/candidates.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.engine import loss_of
from fused_nce.core.group import Group
from fused_nce.core.spec import Block, Index, Spec, cached
from fused_nce.core.tails import REDUCTIONS, Nce
from fused_nce.losses import blocks, candidates
from fused_nce.losses.candidates import Batch, Rules
from fused_nce.losses.common import check_rows, inverse
from fused_nce.losses.heard import heard
from fused_nce.losses.module import Copied, check_options
from fused_nce.losses.output import NCEOutput
from fused_nce.losses.targets import checked as checked_targets


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
    positives: Tensor | None = None,  # (N, P) int64
    soft_targets: tuple[Tensor, Tensor] | None = None,  # (N, P) int64 and (N, P)
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
        positives: (N, P) int64, keys that answer each query, -1 for none, among this process's: the mean over them of
            −log softmax, all in the denominator (`losses/targets.py`). Without soft_targets and what has one positive a
            row (targets, ids, margin, guide, tau_plus, prefixes, directions, symmetric).
        soft_targets: (N, P) int64 keys, -1 for none, and (N, P) weights >= 0 of sum 1 a row: the cross entropy with
            that distribution, −Σ w·log softmax. No gradient to the weights; with the same exceptions.
        hard_negatives: (N, H, D), negatives of each row's own. No filter and no id takes them out.
        share_hard_negatives: they are other rows' negatives too, where keys are candidates.
        query_ids: (N,) int64; a key whose id is the row's is none of its negatives. The row's own key has the row's id.
        key_ids: (M,) int64; None is `query_ids`, without targets.
        false_negative_margin: m in units of ⟨q,k⟩: a candidate with ⟨q,k⟩ > ⟨q,k⁺⟩ + m is no negative; in the other
            directions likewise (Qwen3-Embedding, arXiv:2506.05176). What equals that within rounding stays.
        guide: (N, G), (M, G) and, where hard negatives meet it, (N, H, G), another model's embeddings of queries, keys
            and hard negatives: a candidate whose dot product there is above the positive's less the margin is no
            negative (GISTEmbed, arXiv:2402.16829). They have no gradient.
        guide_margin: that margin.
        guide_margin_kind: "absolute", or "relative": times the magnitude of the positive's dot product.
        filter_hard_negatives: margin and guide look at a row's own hard negatives too.
        directions: which pairs are candidates, "q2k" (the row's query, all keys), "k2q" (its key, all queries), "q2q",
            "k2k"; never a row with itself.
        joint: one denominator a row, in which the positive stands once for "q2k" and once for "k2q" (Li et al. 2023,
            arXiv:2308.03281); otherwise the mean of one loss a direction.
        hardness: α of t = s + α·stopgrad(⟨q,k⟩) on the negatives of "q2k" (Lan et al. 2025, arXiv:2503.04812); no clip.
        tau_plus: the share of false negatives, whose part is taken out of the negatives' sum, down to no less than n
            negatives of cosine −1 would have (Chuang et al. 2020, arXiv:2007.00224); for unit rows.
        label_smoothing: ε: the target gives ε/n to each of a row's n candidates.
        row_weights: (N,), differentiable: they weigh the mean, and the sum, and multiply elements under "none".
        column_bias: (M,), added to each score of its column: −log Q of sampled softmax. Differentiable; without clip,
            hardness, false_negative_margin, symmetric and other directions than "q2k". −∞ leaves the column out, and a
            row whose key it is has the loss ∞. A large finite mask does so too, but not beside label_smoothing, which
            takes the mean of all scores.
        max_scale: the largest 1 / temperature; a learned one has no gradient beyond it.
        prefixes: widths, each a loss of its own of that many first columns, normalised anew, and the sum of them
            (Matryoshka, arXiv:2205.13147), in one sweep that reads the operands once; with a bias a column one each.
        prefix_weights: of the prefixes' losses; None is 1 each.
        group: processes whose rows are negatives too (see `fused_nce.losses`); None for this one alone. Hard negatives
            that are not shared stay where they are; positives and targets are among this process's keys.
        backend: a name of `fused_nce.backends()`, or None to choose the fastest. On a CPU all but prefixes with
            smoothing, or debiased with ids or filters, have kernels; on a GPU guides, several positives and
            prefixes in "cuda" alone, else in "chunked".

    Returns:
        NCEOutput, float32 (float64 for float64 inputs), in nats; chance is log M. `stats` is of the queries' direction:
        top1, pos_mean, neg_lse_mean, nce_minus_chance, mi_bound. What needs more than keys and filters has the first
        three alone (top1 among all candidates), with hardness pos_mean and neg_lse_mean; prefixes have `top1_64`, ….

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        queries, keys, hard = torch.randn(8, 16), torch.randn(8, 16), torch.randn(8, 3, 16)
        info_nce(queries, keys, normalize=True, temperature=0.05, hard_negatives=hard).loss
        ```
    """
    several = positives is not None or soft_targets is not None
    check_rows("queries", queries, "keys", keys, same_n=targets is None and not several, other=", or targets")
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
    given = (
        *(hard_negatives, query_ids, key_ids, false_negative_margin, guide, tau_plus, row_weights, column_bias),
        *(max_scale, prefixes, prefix_weights, positives, soft_targets),
    )
    on = (joint, hardness, label_smoothing, guide_margin, share_hard_negatives, filter_hard_negatives)
    chosen = [x for x in given if x is not None] or [x for x in on if x]
    alone = not chosen and directions == ("q2k",) and guide_margin_kind == "absolute"
    # The op looks by itself, but after other processes' keys have come: they would wait for this one's gradients.
    if targets is not None and not symmetric and (group is not None or not alone):
        checks.check_within("targets", targets, m)
    if alone:
        spec = _spec(targets is not None, clip, 0.0, tail.stats, symmetric, normalize, ())
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
    batch = batch._replace(several=checked_targets(positives, soft_targets, n, m, queries))
    batch = candidates.checked(batch, rules)
    if prefixes is not None:
        widths, weights = candidates.checked_prefixes(prefixes, prefix_weights, queries.shape[1])
        _check_no_penalty(penalty)
        if several:
            raise ValueError("prefixes: got them with positives or soft_targets, need one of the two")
        if normalize:  # queries, keys and hard negatives are, at each width
            batch = candidates.unit_guide(batch)
        return blocks.contrast_prefixes(batch, scale, rules, widths, weights, **how)
    if prefix_weights is not None:
        raise ValueError("prefix_weights: got some without prefixes, need None")
    if batch.h is not None or hardness:
        _check_no_penalty(penalty)
    batch = candidates.merged(batch, rules)
    one, found = candidates.one_block(batch, rules, symmetric), candidates.filters(batch, rules)
    if normalize and (found or not one):  # else the engine does, in one function with the rest
        batch = candidates.unit_rows(batch)
    if not one:
        _check_no_penalty(penalty)
        return blocks.contrast(batch, scale, rules, **how)
    spec = _spec(batch.targets is not None, clip, hardness, tail.stats, len(rules.directions) == 2, normalize, found)
    more = candidates.filter_arguments(batch, rules)
    unit = normalize and not batch.unit_norm
    return _one_block(batch.q, batch.k, spec, tail, scale=scale, row_ids=batch.targets, normalize=unit, **more, **how)


def _one_block(queries: Tensor, keys: Tensor, spec: Spec, tail: Nce, **options: Any) -> NCEOutput:
    parts = loss_of(queries, keys, spec, tail, **options)
    nce = parts.nce.squeeze(1) if tail.reduction == "none" else parts.nce
    return NCEOutput(parts.loss, nce, parts.penalty, blocks.reported(parts.report, spec.hardness))


@cached
def _spec(
    targets: bool,
    clip: float | None,
    hardness: float,
    stats: tuple[str, ...],
    both: bool,
    normalize: bool,
    filters: tuple[str, ...],
) -> Spec:
    """The C++ kernels compute neg_lse, neg_max and square at once; `square` costs the others a pass."""
    layout, columns = Index() if targets else Block(1), ("neg_lse",) if both else ()
    transform = candidates.transform(clip, hardness)
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
    if checks.is_wrong(~whole, need):
        if not checks.is_batched(targets):
            checks.check_range("targets", targets, m)
        raise ValueError(need)


class InfoNCELoss(Copied):
    """InfoNCE of queries among keys (`info_nce`), its settings kept; the temperature may be learned.

    Args:
        temperature: a number > 0; the start where it is learned.
        learnable: make it a parameter, `log_scale` = log(1 / temperature), 0-d.
        options: the settings of `info_nce`; its tensors come with each call.

    Shape:
        queries: (N, D).
        keys: (M, D).
        targets: (N,) int64, the key of each query; i for query i if left out.
        positives: (N, P) int64.
        soft_targets: (N, P) int64 and (N, P).
        hard_negatives: (N, H, D).
        query_ids, row_weights: (N,).
        key_ids, column_bias: (M,).
        guide: as in `info_nce`.

    Example:
        ```
        InfoNCELoss(learnable=True)(torch.randn(8, 16), torch.randn(8, 16)).loss
        ```
    """

    def __init__(self, temperature: float = 0.1, *, learnable: bool = False, **options: Any) -> None:
        super().__init__()
        check_options(InfoNCELoss, info_nce, options)
        checks.check_number("temperature", temperature, above=0, others=", and learnable=True for a parameter")
        inverse("temperature", temperature, torch.device("cpu"))
        candidates.clamped(1.0, options.get("max_scale"))  # its check
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
        positives: Tensor | None = None,
        soft_targets: tuple[Tensor, Tensor] | None = None,
        hard_negatives: Tensor | None = None,
        query_ids: Tensor | None = None,
        key_ids: Tensor | None = None,
        guide: tuple[Tensor, ...] | None = None,
        row_weights: Tensor | None = None,
        column_bias: Tensor | None = None,
    ) -> NCEOutput:
        """`info_nce` of the batch."""
        names = ("positives", "soft_targets", "hard_negatives", "query_ids", "key_ids", "guide")
        given = (positives, soft_targets, hard_negatives, query_ids, key_ids, guide)
        more: dict[str, Any] = dict(zip(names, given, strict=True))
        temperature = self.temperature if self.log_scale is None else (-self.log_scale).exp()
        more |= {"temperature": temperature, "row_weights": row_weights, "column_bias": column_bias}
        return info_nce(queries, keys, targets, **more, **self.options)
