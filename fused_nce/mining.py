"""Nearest rows of a corpus, and hard negatives among them, exactly and without the matrix of similarities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_nce.core import checks, workspace

BUFFERS = 4  # tiles of similarities alive together: the scores, what is masked, and what `topk` sorts
MIN_PANEL = 1024  # columns; narrower ones spend their time in `topk`

Valid = Callable[[slice, slice, Tensor], Tensor]  # (rows, columns, tile of scores) to (rows, columns) bool


class Mined(NamedTuple):
    """Of each query the hardest negatives, hardest first; where there are fewer than k, −1 and −inf."""

    indices: Tensor  # (N, k) int64, rows of the corpus
    scores: Tensor  # (N, k)


def mine_hard_negatives(
    queries: Tensor,  # (N, D)
    corpus: Tensor,  # (M, D)
    k: int,
    *,
    positives: Tensor | None = None,  # (N,) or (N, P) int64
    query_ids: Tensor | None = None,  # (N,) int64
    corpus_ids: Tensor | None = None,  # (M,) int64
    normalize: bool = True,
    range_min: int = 0,
    range_max: int | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    progress: bool = True,
) -> Mined:
    """The k rows of the corpus that score highest with each query and are no positives, of all M, exactly.

    A tile of similarities is held at a time, within `FUSED_NCE_WORKSPACE_MB`, beside unit rows in float32. Among equal
    scores any may come first. There is no gradient.

    Args:
        queries: (N, D), any float dtype; sums are taken in float32 at least.
        corpus: (M, D), same dtype and device.
        k: negatives wanted of each query, >= 1.
        positives: (N,) or (N, P) int64, each query's own rows of the corpus, -1 for none: they are left out.
        query_ids: (N,) int64; rows of the corpus with the query's id are left out.
        corpus_ids: (M,) int64, with `query_ids`.
        normalize: scores are cosines; otherwise dot products.
        range_min: so many of the highest that all else leaves are passed over.
        range_max: none beyond this rank among those that are neither positives nor of the query's id; None for no end.
        min_score: none that scores less.
        max_score: none that scores more.
        absolute_margin: none above the query's lowest positive less this; needs positives.
        relative_margin: none above the query's lowest positive less this share of its magnitude; needs positives.
        progress: show a bar, where tqdm is installed.

    Returns:
        Mined: `indices` (N, k) int64 and `scores` (N, k).

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.

    Example:
        ```
        queries, corpus = torch.randn(8, 16), torch.randn(100, 16)
        hard = corpus[mine_hard_negatives(queries, corpus, 3, progress=False).indices]
        ```
    """
    checks.check_tensor("queries", queries, ("N", "D"))
    checks.check_tensor("corpus", corpus, ("M", "D"))
    checks.check_pair("queries", queries, "corpus", corpus)
    n, m, device = queries.shape[0], corpus.shape[0], queries.device
    _check_finite("queries", queries)
    _check_finite("corpus", corpus)
    _check_counts(k, range_min, range_max)
    for name, x in (("min_score", min_score), ("max_score", max_score)):
        if x is not None:
            checks.check_number(name, x)
    if (query_ids is None) != (corpus_ids is None):
        raise ValueError("query_ids and corpus_ids: got one of them, need both or none")
    if query_ids is not None:
        checks.check_ids("query_ids", query_ids, n, "N", device)
        checks.check_ids("corpus_ids", corpus_ids, m, "M", device)
    own = None if positives is None else _checked_positives(positives, n, m, device)
    queries, corpus = queries.detach(), corpus.detach()
    if normalize:
        queries, corpus = _unit(queries), _unit(corpus)
    ceiling = _ceiling(queries, corpus, own, max_score, absolute_margin, relative_margin)

    def candidate(rows: slice, columns: slice, scores: Tensor) -> Tensor:
        kept = torch.ones_like(scores, dtype=torch.bool)
        if query_ids is not None and corpus_ids is not None:
            kept = query_ids[rows, None] != corpus_ids[columns]
        if own is not None:
            place = own[rows] - columns.start
            inside = (place >= 0) & (place < scores.shape[1])
            at = torch.where(inside, place, scores.shape[1])
            kept = torch.nn.functional.pad(kept, (0, 1)).scatter_(1, at, False)[:, :-1]  # fault: mined-positive
        return kept

    def limited(rows: slice, scores: Tensor) -> Tensor:
        kept = torch.ones_like(scores, dtype=torch.bool) if ceiling is None else scores <= ceiling[rows, None]
        return kept if min_score is None else kept & (scores >= min_score)

    def wanted(rows: slice, columns: slice, scores: Tensor) -> Tensor:
        return candidate(rows, columns, scores) & limited(rows, scores)

    if range_max is None:
        scores, indices = top_k(queries, corpus, min(range_min + k, m), valid=wanted, progress=progress)
    else:  # ranks are of all candidates: by place, since scores may tie
        scores, indices = top_k(queries, corpus, min(range_max, m), valid=candidate, progress=progress)
        kept = limited(slice(None), scores)  # fault: mined-range-limits
        scores, order = scores.masked_fill(~kept, float("-inf")).sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
    scores, indices = scores[:, range_min:], indices[:, range_min:]  # fault: mined-range-kept
    missing = max(0, k - scores.shape[1])
    scores = torch.nn.functional.pad(scores[:, :k], (0, missing), value=float("-inf"))
    indices = torch.nn.functional.pad(indices[:, :k], (0, missing), value=-1)
    return Mined(indices.masked_fill(scores == float("-inf"), -1), scores)


def top_k(
    queries: Tensor,  # (N, D)
    corpus: Tensor,  # (M, D)
    k: int,
    *,
    valid: Valid | None = None,
    strip: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k highest dot products of each query and where they are: (N, k) scores, descending, and int64 indices.

    Args:
        queries: (N, D).
        corpus: (M, D), same dtype.
        k: at most M.
        valid: which of a tile's pairs count; the others score −inf.
        strip: queries at a time; None for what the workspace holds.
        progress: show a bar, where tqdm is installed.
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    n, m = queries.shape[0], corpus.shape[0]
    elements = workspace.limit_bytes(queries.device.type) // (BUFFERS * wide.itemsize)
    panel = min(m, max(MIN_PANEL, 4 * k))
    strip = max(1, min(n, elements // (panel + 2 * k))) if strip is None else strip
    found: list[tuple[Tensor, Tensor]] = []
    for start in _bar(range(0, n, strip), progress):
        rows = slice(start, min(start + strip, n))
        q = queries[rows].to(wide)
        best = q.new_full((q.shape[0], k), float("-inf"))
        where = torch.full(best.shape, -1, dtype=torch.int64, device=q.device)
        for first in range(0, m, panel):
            columns = slice(first, min(first + panel, m))
            with checks.uncast(q):
                scores = q @ corpus[columns].to(wide).T
            if valid is not None:
                scores.masked_fill_(~valid(rows, columns, scores), float("-inf"))
            high, at = scores.topk(min(k, scores.shape[1]), dim=1)
            best, order = torch.cat([best, high], dim=1).topk(k, dim=1)
            where = torch.cat([where, at + first], dim=1).gather(1, order)  # fault: mined-panels-overwrite
        found.append((best, where))
    return torch.cat([best for best, _ in found]), torch.cat([where for _, where in found])


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _check_finite(name: str, x: Tensor) -> None:
    """A NaN would rank first, or vanish under a limit."""
    low, high = torch.aminmax(x, dim=1)  # NaN where any is
    bad = (~(low.isfinite() & high.isfinite())).nonzero()
    if len(bad):
        raise ValueError(f"{name}: row {int(bad[0])} has a NaN or an infinity, need finite numbers")


def _check_counts(k: int, range_min: int, range_max: int | None) -> None:
    checks.checked_int("k", k, at_least=1)
    checks.checked_int("range_min", range_min, at_least=0)
    if range_max is not None and checks.checked_int("range_max", range_max) <= range_min:
        raise ValueError(f"range_max: got {range_max}, need > range_min = {range_min}")


def _checked_positives(positives: Tensor, n: int, m: int, device: torch.device) -> Tensor:
    """(N, P)."""
    if not isinstance(positives, Tensor) or positives.dtype != torch.int64:
        kind = positives.dtype if isinstance(positives, Tensor) else type(positives).__name__
        raise TypeError(f"positives: got {kind}, need a (N,) or (N, P) int64 tensor")
    own = positives[:, None] if positives.dim() == 1 else positives
    if own.dim() != 2 or own.shape[0] != n or own.shape[1] < 1 or own.device != device:
        seen = f"shape {tuple(positives.shape)} on {positives.device}"
        raise ValueError(f"positives: got {seen}, need ({n},) or ({n}, P) on {device}")
    low, high = (int(x) for x in torch.aminmax(own))
    if low < -1 or high >= m:
        raise ValueError(f"positives: got {low if low < -1 else high}, need -1 <= index < M = {m}")
    return own


def _ceiling(
    queries: Tensor,
    corpus: Tensor,
    own: Tensor | None,
    max_score: float | None,
    absolute: float | None,
    relative: float | None,
) -> Tensor | None:
    """(N,) what a negative may score at most."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    lines = [] if max_score is None else [torch.full((queries.shape[0],), max_score, dtype=wide, device=queries.device)]
    for name, margin in (("absolute_margin", absolute), ("relative_margin", relative)):
        if margin is None:
            continue
        checks.check_number(name, margin)
        if own is None:
            raise ValueError(f"{name}: got {margin} without positives, need some")
        best = torch.full((queries.shape[0],), float("inf"), dtype=wide, device=queries.device)
        for column in own.T:
            scores = (queries.to(wide) * corpus[column.clamp(min=0)].to(wide)).sum(dim=1)
            best = torch.minimum(best, scores.masked_fill(column < 0, float("inf")))
        line = best - margin * (best.abs() if name == "relative_margin" else 1.0)
        lines.append(line.masked_fill(best == float("inf"), float("inf")))  # without a positive nothing is near it
    return torch.stack(lines).amin(dim=0) if lines else None


def _bar(steps: range, shown: bool) -> Any:
    if not shown:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps
    return tqdm(steps, desc="mining", unit="strip", leave=False)
