"""What pytorch-metric-learning's losses share: the call, the rows that it means, and the way out to upstream."""

from __future__ import annotations

import importlib
import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fused_nce.core import checks
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.common import check_rows, normalized, widened

PACKAGE = "pytorch_metric_learning"
OPTIONS = ("distance", "reducer", "embedding_regularizer", "embedding_reg_weight", "collect_stats")
Indices = Sequence[Tensor]
_logger = logging.getLogger("fused_nce")
_logged: set[tuple[str, str]] = set()


class Rows(NamedTuple):
    """What a loss is taken of: rows, the columns that they are compared with, and the labels of both."""

    q: Tensor  # (N, D)
    ids: Tensor  # (N,) int64
    k: Tensor | None  # (M, D); None: q
    other_ids: Tensor  # (M,) int64
    itself: int | None  # row i is column i + itself, no pair; None where rows are no columns

    @property
    def where(self) -> dict[str, Any]:
        """The engine's keywords."""
        return {"offset": self.itself or 0, "row_ids": self.ids, "column_ids": self.other_ids}

    def normalized(self) -> Rows:
        """Of unit rows; the columns in the rows' dtype, as a memory of another must be."""
        k = None if self.k is None else normalized(self.k).to(self.q.dtype)
        return self._replace(q=normalized(self.q), k=k)


class PairLoss(nn.Module):
    """A loss of labelled rows, upstream's call and its way out to upstream.

    Args:
        words: the constructor words of the loss itself.
        options: upstream's `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`, `collect_stats`.
    """

    DISTANCES: ClassVar[tuple[str, ...]]  # that are fused
    REDUCER: ClassVar[str]  # upstream's default

    def __init__(self, words: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__()
        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise TypeError(f"{type(self).__name__}: got {sorted(unknown)[0]}, need one of {', '.join(OPTIONS)}")
        self.words, self.options = words, options
        self.distance, self.reducer = options.get("distance"), options.get("reducer")
        self.reduction = self.REDUCER if self.reducer is None else type(self.reducer).__name__
        self.normalize = self.distance is None or bool(getattr(self.distance, "normalize_embeddings", False))
        self.reason = self._why_not()
        self._theirs: nn.Module | None = None

    def _why_not(self) -> str | None:
        """What the kernels cannot honour; None for nothing."""
        seen = self.distance
        plain = seen is None or (
            type(seen).__name__ in self.DISTANCES
            and type(seen).__module__.startswith(f"{PACKAGE}.")
            and (getattr(seen, "p", 2), getattr(seen, "power", 1)) == (2, 1)
        )
        if not plain:
            return f"distance={type(seen).__name__}"
        if self.reduction not in ("MeanReducer", "AvgNonZeroReducer"):
            return f"reducer={self.reduction}"
        given = [name for name in ("embedding_regularizer", "collect_stats") if self.options.get(name)]
        return given[0] if given else None

    def extra_repr(self) -> str:
        """The settings, as `print(module)` shows them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.words.items())

    def forward(
        self,
        embeddings: Tensor,  # (N, D)
        labels: Tensor | None = None,  # (N,), integers
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,  # (M, D)
        ref_labels: Tensor | None = None,  # (M,), integers
    ) -> Tensor:
        """The loss, 0-d: of all pairs of rows, or of rows with `ref_emb`, by their labels. 0 where there are none.

        Args:
            embeddings: normalised here, as the distance says.
            labels: equal for positives.
            indices_tuple: a miner's choice: three tensors or four. Goes to upstream's code.
            ref_emb: columns in the place of the other rows; without `ref_labels` row i is its column i, and no pair.
            ref_labels: the columns' labels.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value needed.
            NotImplementedError: for what only upstream can honour, where it is not installed.
        """
        reason = self.reason or ("indices_tuple" if indices_tuple is not None else None)
        if reason is not None:
            if self._theirs is None:
                self._theirs = upstream(type(self).__name__, reason)(**self.words, **self.options)
            found: Tensor = self._theirs(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return found
        if labels is None:
            raise ValueError("labels: got None, need (N,) integers, or an indices_tuple")
        checks.check_tensor("embeddings", embeddings, ("N", "D"))
        ids = class_ids("labels", labels, embeddings)
        if ref_emb is None:
            return self.of(Rows(embeddings, ids, None, ids, 0))
        check_rows("embeddings", embeddings, "ref_emb", ref_emb, same_n=ref_labels is None)
        if ref_labels is None:
            return self.of(Rows(embeddings, ids, ref_emb, ids, 0))
        return self.of(Rows(embeddings, ids, ref_emb, class_ids("ref_labels", ref_labels, ref_emb), None))

    @abstractmethod
    def of(self, rows: Rows) -> Tensor:
        """The loss, fused."""

    def reduced(self, losses: Tensor) -> Tensor:
        """The mean of all, or, under AvgNonZero, of those above 0; of none, 0. A NaN is none of those at 0."""
        kept = ~(losses <= 0) if self.reduction == "AvgNonZeroReducer" else torch.ones_like(losses, dtype=torch.bool)
        return fixed_sum(torch.where(kept, losses, 0.0)) / kept.sum().clamp(min=1)


def class_ids(name: str, labels: Tensor, rows: Tensor) -> Tensor:
    """Labels as (N,) int64 on the rows' device."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: got {getattr(labels, 'dtype', type(labels).__name__)}, need integers")
    ids = labels.to(rows.device, torch.int64)
    checks.check_ids(name, ids, rows.shape[0], "N", rows.device)
    return ids


def upstream(name: str, reason: str) -> Any:
    """The package's own class, with a line in the log the first time.

    Raises:
        NotImplementedError: where it is not installed.
    """
    try:
        module = importlib.import_module(f"{PACKAGE}.losses")
    except ImportError as error:
        raise NotImplementedError(
            f"{name}: got {reason}, which is not fused, need pytorch-metric-learning installed for it"
        ) from error
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        _logger.warning("pml: %s runs in pytorch-metric-learning: %s is not fused", name, reason)
    return getattr(module, name)


def class_blocks(rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """(C, n) rows and (C, m) columns of the C classes that have n rows and m columns, for each such pair of numbers.

    Every row and column is in one block at most: blocks of scores hold the positive pairs and nothing else. The sizes
    are read on the host.
    """
    sides = []
    for ids in (rows.ids, rows.other_ids):
        order = ids.argsort(stable=True)
        values, counts = torch.unique_consecutive(ids[order], return_counts=True)
        sides.append((order, values, counts, counts.cumsum(0) - counts))
    (order_r, values_r, count_r, start_r), (order_c, values_c, count_c, start_c) = sides
    at = torch.searchsorted(values_c, values_r).clamp(max=len(values_c) - 1)
    sizes = torch.stack((count_r, count_c[at]), dim=1)
    sizes[values_c[at] != values_r] = 0
    blocks = []
    for n, m in torch.unique(sizes, dim=0).tolist():
        if n and (m > 1 or rows.itself is None):
            chosen = (sizes == torch.tensor((n, m), device=sizes.device)).all(dim=1)
            r, c = (torch.arange(x, device=sizes.device) for x in (n, m))
            blocks.append((order_r[start_r[chosen][:, None] + r], order_c[start_c[at[chosen]][:, None] + c]))
    return blocks


def block_scores(rows: Rows, block: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(C, n, m) dot products of a block, and which of them are pairs."""
    q, k, pairs = block_pairs(rows, block)
    with torch.autocast(q.device.type, enabled=False):
        return torch.bmm(q, k.transpose(1, 2)), pairs


def block_pairs(rows: Rows, block: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(C, n, D) rows and (C, m, D) columns of a block, float32 at least; which are pairs: a row with itself is none."""
    r, c = block
    k = rows.q if rows.k is None else rows.k
    itself = torch.full_like(r, -1) if rows.itself is None else r + rows.itself
    return widened(rows.q[r]), widened(k[c]), c[:, None, :] != itself[:, :, None]
