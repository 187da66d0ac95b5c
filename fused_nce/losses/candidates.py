"""What of InfoNCE may be chosen: who a row's candidates are and how they count. Settings, tensors, their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_nce.core import checks
from fused_nce.core.spec import Hardness, Identity, TanhClip, Transform
from fused_nce.losses.common import as_matmul, normalized, row_dots, widened
from fused_nce.losses.targets import Targets

DIRECTIONS = ("q2k", "k2q", "q2q", "k2k")


@dataclass(frozen=True)
class Rules:
    """What of a loss is no tensor of a row or a column.

    Attributes:
        directions: of `DIRECTIONS`; which blocks' negatives count.
        joint: one denominator a row, with the positive in it once for `q2k` and once for `k2q`, which both contain it
            (Li et al. 2023, arXiv:2308.03281); otherwise the mean of one loss a direction.
        shared: the directions in which a row's own hard negatives are also the other rows'.
        filter_own: the filters look at the own hard negatives too.
        margin: of a false negative's dot product above the positive's; None keeps all.
        guide_margin: by how much a guide's similarity must stay below the positive's.
        relative: guide_margin is of the positive's magnitude.
        hardness: α of the negatives of `q2k` that are other rows'.
        own_hardness: α of the row's own hard negatives.
        tau_plus: the share of false negatives to take out (Chuang et al. 2020, arXiv:2007.00224), or None.
        smoothing: ε.
        clip: c, or None.
        reduction: of the rows.
        local: the directions that stay on their process.
        itself: in `q2q` and `k2k` a row is its own candidate too, unless a filter takes it out.
    """

    directions: tuple[str, ...] = ("q2k",)
    joint: bool = False
    shared: tuple[str, ...] = ()
    filter_own: bool = False
    margin: float | None = None
    guide_margin: float = 0.0
    relative: bool = False
    hardness: float = 0.0
    own_hardness: float = 0.0
    tau_plus: float | None = None
    smoothing: float = 0.0
    clip: float | None = None
    reduction: str = "mean"
    local: tuple[str, ...] = ()
    itself: bool = False


class Batch(NamedTuple):
    """The tensors, checked; unit rows where `unit_norm`."""

    q: Tensor  # (N, D)
    k: Tensor  # (M, D)
    targets: Tensor | None  # (N,) int64, the key of each row; None is i for row i
    h: Tensor | None = None  # (N, H, D) own hard negatives
    query_ids: Tensor | None = None  # (N,) int64, equal to the own key's
    key_ids: Tensor | None = None  # (M,) int64
    guide: tuple[Tensor, ...] | None = None  # (N, G), (M, G) and, of hard negatives, (N, H, G)
    row_weights: Tensor | None = None  # (N,)
    column_bias: Tensor | None = None  # (M,)
    unit_norm: bool = False
    several: Targets | None = None  # instead of one own key each


def transform(clip: float | None, hardness: float = 0.0) -> Transform:
    """Of a block's scores; one of the two at most."""
    if hardness:
        return Hardness(float(hardness))
    return Identity() if clip is None else TanhClip(float(clip))


def own(x: Batch) -> Tensor:
    """(N,) the key of each row, or one of them."""
    if x.several is not None:
        return x.several.indices.amax(dim=1)
    return torch.arange(x.q.shape[0], device=x.q.device) if x.targets is None else x.targets


def unit_guide(x: Batch) -> Batch:
    """The guide's rows of norm one."""
    return x if x.guide is None else x._replace(guide=tuple(normalized(g) for g in x.guide))


def unit_rows(x: Batch) -> Batch:
    """Rows of norm one."""
    h = None if x.h is None else normalized(x.h)
    return unit_guide(x)._replace(q=normalized(x.q), k=normalized(x.k), h=h, unit_norm=True)


def as_keys(x: Batch, rules: Rules) -> bool:
    """Whether hard negatives count as keys do."""
    apart = (x.query_ids, x.guide, x.column_bias, x.several)
    if x.h is None or rules.shared[:1] != ("q2k",) or any(y is not None for y in apart):
        return False
    return rules.margin is None and rules.hardness == rules.own_hardness


def merged(x: Batch, rules: Rules) -> Batch:
    """Hard negatives that count as keys do, as keys."""
    if x.h is None or rules.directions != ("q2k",) or not as_keys(x, rules):
        return x
    return x._replace(k=torch.cat([x.k, x.h.flatten(0, 1)]), targets=own(x), h=None)


def one_block(x: Batch, rules: Rules, symmetric: bool) -> bool:
    """Whether the queries' positives and negatives are all among the keys, or these among those."""
    tensors = (x.h, x.query_ids, x.row_weights, x.column_bias, x.several)
    if any(y is not None for y in tensors) or rules.tau_plus is not None or rules.smoothing:
        return False
    alone = not (rules.joint or rules.hardness or filters(x, rules))  # fault: hardness-both-ways
    both = rules.directions == ("q2k", "k2q") and alone
    return rules.directions == ("q2k",) or (both and (symmetric or x.targets is None))


def filters(x: Batch, rules: Rules) -> tuple[str, ...]:
    """The engine's, in the order of `ceilings`."""
    return (("ceiling",) if rules.margin is not None else ()) + (("guide",) if x.guide is not None else ())


def guides(x: Batch) -> tuple[Tensor, ...] | None:
    """In the dtype that dot products are summed in, without a gradient."""
    if x.guide is None:
        return None
    return tuple(g.detach().to(torch.promote_types(x.q.dtype, torch.float32)) for g in x.guide)


def ceilings(x: Batch, rules: Rules, prefixes: Sequence[int] = ()) -> Tensor | None:
    """(F, N), of K prefixes (K·F, N): a candidate whose dot product is above is no negative."""
    if not filters(x, rules):
        return None
    each, found, keys = [], guides(x), own(x)  # of each filter, a line a prefix
    with torch.no_grad():
        if rules.margin is not None:  # else nobody needs the prefixes' unit rows, a tenth of a call
            pairs = cut(x.q.detach(), x.k[keys].detach(), prefixes)
            with checks.uncast(x.q):
                each.append([row_dots(q, k) + rules.margin + _slack(q, k) for q, k in pairs])
        if found is not None:
            height = (found[0] * found[1][keys]).sum(dim=1)
            height = height + _slack(found[0], found[1][keys])
            line = height - rules.guide_margin * (height.abs() if rules.relative else 1.0)
            each.append([line] * max(1, len(prefixes)))
    return torch.stack([line for lines in zip(*each, strict=True) for line in lines])


def cut(q: Tensor, k: Tensor, prefixes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Both, or their unit rows of each width, as the kernels have them: cast once, before a norm is taken."""
    q, k = widened(as_matmul(q)), widened(as_matmul(k))
    return [(normalized(q[..., :d]), normalized(k[..., :d])) for d in prefixes] or [(q, k)]


def dots(q: Tensor, k: Tensor, prefixes: Sequence[int]) -> Tensor:
    """`row_dots`, (N,) or (N, H); of each prefix the cosines, (K, …)."""
    pairs = cut(q, k, prefixes)
    with checks.uncast(q):
        each = [row_dots(*pair) for pair in pairs]
    return torch.stack(each) if prefixes else each[0]


def _slack(q: Tensor, k: Tensor) -> Tensor:
    """What two ways to sum one dot product may differ by, twice: the positive's equal is no false negative."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return 2 * torch.finfo(wide).eps * (4 + q.shape[1] ** 0.5) * row_dots(q.abs(), k.abs())


def filter_arguments(x: Batch, rules: Rules, prefixes: Sequence[int] = ()) -> dict[str, Any]:
    """Of `tile_loss`, for the queries among the keys."""
    found = guides(x)
    return {"ceilings": ceilings(x, rules, prefixes), "guide": None if found is None else found[:2]}


# ---- checks -----------------------------------------------------------------------------------------------------


def clamped(scale: float | Tensor, max_scale: float | None) -> float | Tensor:
    """At most `max_scale`, if there is one.

    Raises:
        TypeError, ValueError: for a limit that is no number > 0.
    """
    if max_scale is None:
        return scale
    checks.check_number("max_scale", max_scale, above=0)
    return scale.clamp(max=max_scale) if isinstance(scale, Tensor) else min(scale, max_scale)


def checked_kind(kind: str) -> bool:
    """Whether a guide's margin is relative.

    Raises:
        ValueError: for neither "absolute" nor "relative".
    """
    checks.check_choice("guide_margin_kind", kind, ("absolute", "relative"))
    return kind == "relative"


def checked_directions(directions: Sequence[str], symmetric: bool) -> tuple[str, ...]:
    """In the order of `DIRECTIONS`.

    Raises:
        TypeError: for what is no sequence.
        ValueError: for an unknown one, one twice, none, or others beside `symmetric`.
    """
    names = (directions,) if isinstance(directions, str) else checks.checked_items("directions", directions)
    if not names or not all(name in DIRECTIONS for name in names) or len(set(names)) != len(names):
        raise ValueError(f"directions: got {directions!r}, need some of {', '.join(map(repr, DIRECTIONS))}, each once")
    if symmetric and names != ("q2k",):
        raise ValueError(f"directions: got {directions!r} with symmetric=True, need one of the two")
    return ("q2k", "k2q") if symmetric else tuple(name for name in DIRECTIONS if name in names)


def checked_prefixes(
    prefixes: Sequence[int], weights: Sequence[float] | None, d: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Widths, ascending, and their weights, added up of one that comes twice.

    Raises:
        TypeError, ValueError: for none, one that is no width of the embeddings, or another number of weights.
    """
    prefixes = tuple(map(checks.plain, checks.checked_items("prefixes", prefixes)))
    for width in prefixes:
        checks.checked_int("prefixes", width)
        if not 1 <= width <= d:
            raise ValueError(f"prefixes: got {width}, need 1 <= prefix <= D = {d}")
    if not prefixes:
        raise ValueError("prefixes: got none, need at least one width")
    found = (1.0,) * len(prefixes) if weights is None else checks.checked_items("prefix_weights", weights)
    if len(found) != len(prefixes):
        raise ValueError(f"prefix_weights: got {len(found)}, need one for each of {len(prefixes)} prefixes")
    for weight in found:
        checks.check_number("prefix_weights", weight)
    total: dict[int, float] = {}
    for width, weight in sorted(zip(prefixes, found, strict=True)):
        total[width] = total.get(width, 0.0) + float(weight)
    return tuple(total), tuple(total.values())


def checked(x: Batch, rules: Rules) -> Batch:
    """The batch, with the ids of its keys.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """
    _check_rules(x, rules)
    n, m, device = x.q.shape[0], x.k.shape[0], x.q.device
    if x.h is not None:
        checks.check_tensor("hard_negatives", x.h, ("N", "H", "D"))
        checks.check_no_transform("hard_negatives", x.h)
        checks.check_pair("queries", x.q, "hard_negatives", x.h)
        if x.h.shape[0] != n:
            raise ValueError(f"hard_negatives: got N = {x.h.shape[0]}, need queries' {n}")
    vectors = ("row_weights", x.row_weights, n, "N"), ("column_bias", x.column_bias, m, "M")
    for name, vector, length, letter in vectors:
        if vector is not None:
            checks.check_tensor(name, vector, (letter,))
            if vector.shape != (length,) or vector.device != device:
                seen = f"shape {tuple(vector.shape)} on {vector.device}"
                raise ValueError(f"{name}: got {seen}, need ({letter},) = ({length},) on {device}")
    for name, vector, *_ in vectors:  # the loss's dtype is the rows', in float32 at least
        if vector is not None and vector.dtype != x.q.dtype:
            x = x._replace(**{name: vector.to(torch.promote_types(x.q.dtype, torch.float32))})  # type: ignore[arg-type]
    if x.guide is not None:
        _check_guide(x, x.guide, rules)
        x = _shown(x, x.guide)
    if x.query_ids is None:
        if x.key_ids is not None:
            raise ValueError("key_ids: got some without query_ids, need both")
        return x
    checks.check_ids("query_ids", x.query_ids, n, "N", device)
    key_ids = x.query_ids if x.key_ids is None and x.targets is None else x.key_ids
    if key_ids is None:
        raise ValueError("key_ids: got None with targets, need a (M,) int64 tensor")
    checks.check_ids("key_ids", key_ids, m, "M", device)
    if key_ids is not x.query_ids:
        _check_own_ids(x, x.query_ids, key_ids)
    return x._replace(key_ids=key_ids)


def _check_rules(x: Batch, rules: Rules) -> None:
    if rules.margin is not None:
        checks.check_number("false_negative_margin", rules.margin)
    checks.check_number("guide_margin", rules.guide_margin)
    checks.check_number("hardness", rules.hardness, at_least=0)
    checks.check_number("label_smoothing", rules.smoothing, at_least=0)
    if rules.smoothing >= 1:
        raise ValueError(f"label_smoothing: got {rules.smoothing}, need < 1")
    if rules.tau_plus is not None:
        checks.check_number("tau_plus", rules.tau_plus, above=0)
        if rules.tau_plus >= 1:
            raise ValueError(f"tau_plus: got {rules.tau_plus}, need < 1")
    together = {
        "hardness": (rules.hardness and rules.clip is not None, "clip", "clip=None"),
        "share_hard_negatives": (bool(rules.shared) and x.h is None, "no hard_negatives", "some"),
        "filter_hard_negatives": (
            rules.filter_own and (x.h is None or not filters(x, rules)),
            "no hard_negatives, or neither a margin nor a guide",
            "both",
        ),
        "guide_margin": (rules.guide_margin and x.guide is None, "no guide", "one"),
        "hard_negatives": (
            x.h is not None and not {"q2k", *rules.shared}.intersection(rules.directions),
            f"directions {rules.directions}, in which none is a candidate",
            "'q2k' among them",
        ),
        # The bias is one more dimension of the dot product: what is not linear in that would act on it.
        "column_bias": (
            x.column_bias is not None
            and (rules.directions != ("q2k",) or rules.margin is not None or rules.clip is not None or rules.hardness),
            f"directions {rules.directions}, false_negative_margin {rules.margin}, clip {rules.clip}, hardness "
            f"{rules.hardness}",
            "('q2k',) without symmetric, None, None and 0",
        ),
    }
    if x.several is not None:
        one = (x.targets, x.query_ids, x.guide, rules.margin, rules.tau_plus)
        beside = any(y is not None for y in one) or rules.directions != ("q2k",)
        seen = "targets, ids, a guide, a margin, tau_plus, symmetric or directions, which are of one positive a row"
        together[x.several.name] = (beside, seen, "none of them")
    for name, (wrong, seen, need) in together.items():
        if wrong:
            raise ValueError(f"{name}: got it with {seen}, need {need}")


def _check_guide(x: Batch, guide: tuple[Tensor, ...], rules: Rules) -> None:
    sizes = {"(N, G)": x.q.shape[:1], "(M, G)": x.k.shape[:1]}
    if x.h is not None and (rules.shared or rules.filter_own):
        sizes["(N, H, G)"] = x.h.shape[:2]
    if not isinstance(guide, (tuple, list)) or len(guide) != len(sizes):
        seen = f"{len(guide)} tensors" if isinstance(guide, (tuple, list)) else type(guide).__name__
        raise ValueError(f"guide: got {seen}, need a tuple of {' and '.join(sizes)}")
    width = guide[0].shape[-1] if isinstance(guide[0], Tensor) else 0
    for y, (letters, shape) in zip(guide, sizes.items(), strict=True):
        checks.check_tensor("guide", y, tuple(letters.strip("()").split(", ")))
        if y.shape != (*shape, width) or y.device != x.q.device:
            need = f"{letters} = {(*shape, width)} on {x.q.device}"
            raise ValueError(f"guide: got shape {tuple(y.shape)} on {y.device}, need {need}")


def _shown(x: Batch, guide: tuple[Tensor, ...]) -> Batch:
    """A guide's row that is not finite makes what it guides NaN: comparisons alone would pass it over."""

    def marked(y: Tensor, g: Tensor) -> Tensor:
        finite = g.detach().isfinite().all(dim=-1, keepdim=True)
        return y + torch.where(finite, 0.0, torch.nan).to(y.dtype)  # fault: guide-not-finite

    h = marked(x.h, guide[2]) if x.h is not None and len(guide) > 2 else x.h
    return x._replace(q=marked(x.q, guide[0]), k=marked(x.k, guide[1]), h=h)


def _check_own_ids(x: Batch, query_ids: Tensor, key_ids: Tensor) -> None:
    """The own key has the row's id. Only a CPU's are read; a GPU checks its own, without a wait."""
    same = key_ids[own(x)] == query_ids
    need = "query_ids: got another id than the row's own key has, need the same"
    if checks.is_wrong(~same, need):
        if checks.is_batched(same):
            raise ValueError(need)
        row = int((~same).to(torch.int64).argmax())
        raise ValueError(
            f"query_ids: got {int(query_ids[row])} for row {row}, whose own key has the id "
            f"{int(key_ids[own(x)][row])}, need the same"
        )
