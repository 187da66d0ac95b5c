"""What pytorch-metric-learning's losses share: the call, the rows that it means, and the way out to upstream."""

from __future__ import annotations

import importlib
import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fused_nce.compat.base import Adapter, class_ids, tensor
from fused_nce.core import checks
from fused_nce.core.tails import fixed_sum
from fused_nce.losses.common import check_rows, normalized, widened

PACKAGE = "pytorch_metric_learning"
OPTIONS = ("distance", "reducer", "embedding_regularizer", "embedding_reg_weight", "collect_stats")
REDUCERS = ("MeanReducer", "AvgNonZeroReducer")
Indices = Sequence[Tensor]
_logger = logging.getLogger("fused_nce")
_logged: set[tuple[str, str]] = set()


class _Alone(nn.Module):
    """In the place of upstream's class where the package is not installed: its words as attributes."""

    def __init__(self, **words: Any) -> None:
        super().__init__()
        for name, value in words.items():
            setattr(self, name, value)

    def forward(self, *arguments: Any) -> Tensor:
        """What only upstream could compute.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"{type(self).__name__}: got what is not fused, need {PACKAGE} installed for it")


def upstreams(name: str, part: str = "losses") -> Any:
    """The package's class, which ours is a kind of: its surface, its hooks and its code for what is not fused."""
    try:
        return getattr(importlib.import_module(f"{PACKAGE}.{part}"), name)
    except ImportError:
        return _Alone


INSTALLED = upstreams("NTXentLoss") is not _Alone


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

    @classmethod
    def of_labels(cls, q: Tensor, labels: Tensor, k: Tensor, other: Tensor | None, itself: int | None) -> Rows:
        """Labels of both sides, of any dtype, on any device."""
        for name, x, rows in (("labels", labels, q), ("ref_labels", other, k)):
            if (seen := tensor(name, x).shape) != rows.shape[:1]:
                raise ValueError(f"{name}: got shape {tuple(seen)}, need {tuple(rows.shape[:1])}")
        ids = class_ids("labels", labels.to(q.device), other.to(q.device))  # type: ignore[union-attr]
        return cls(q, ids[0], k, ids[1], itself)

    def normalized(self) -> Rows:
        """Of unit rows; the columns in the rows' dtype, as a memory of another must be."""
        k = None if self.k is None else normalized(self.k).to(self.q.dtype)
        return self._replace(q=normalized(self.q), k=k)


class Upstreams(Adapter):
    """A kind of upstream's class. What the kernels do not honour, a subclass's hooks too, upstream's code computes."""

    UPSTREAM = PACKAGE
    overridden: str | None = None  # a hook of a subclass or an object, of which upstream's code is to hear

    @staticmethod
    def refuse(holder: Any, name: str) -> None:
        """A hook of the user's own leads to upstream's code, or, where that is not installed, to a refusal."""
        if not INSTALLED:
            Adapter.refuse(holder, name)
        holder.overridden = name

    @property
    def reason(self) -> str | None:
        """What the kernels cannot honour; None for nothing."""
        raise NotImplementedError

    def upstream(self, reason: str, *arguments: Any) -> Tensor:
        """The result of upstream's code, with a line in the log the first time.

        Raises:
            NotImplementedError: where it is not installed.
        """
        name = type(self).__name__
        if not INSTALLED:
            raise NotImplementedError(
                f"{name}: got {reason}, which is not fused, need pytorch-metric-learning installed for it"
            )
        if (name, reason) not in _logged:
            _logged.add((name, reason))
            _logger.warning("pml: %s runs in pytorch-metric-learning: %s is not fused", name, reason)
        found: Tensor = super().forward(*arguments)
        return found


class PairLoss(Upstreams):
    """A loss of labelled rows: upstream's call, fused, or upstream's code. Settings count as they are at the call.

    Args:
        words: the constructor words of the loss itself.
        options: upstream's `distance`, `reducer`, `embedding_regularizer`, `embedding_reg_weight`, `collect_stats`.
    """

    HOOKS = (
        *("compute_loss", "_compute_loss", "mat_based_loss", "pair_based_loss", "get_per_pair_loss"),
        *("pos_calc", "neg_calc", "zero_loss", "zero_losses", "add_embedding_regularization_to_loss_dict"),
        *(() if INSTALLED else ("get_default_distance", "get_default_reducer")),  # upstream's constructor asks them
    )
    DISTANCES: ClassVar[tuple[str, ...]]  # that are fused
    REDUCER: ClassVar[str]  # upstream's default
    LOSSES: ClassVar[tuple[str, ...]] = ("loss",)  # that are reduced one by one
    distance: Any
    reducer: Any

    def __init__(self, words: dict[str, Any], options: dict[str, Any]) -> None:
        checks.check_names(type(self).__name__, options, OPTIONS)
        super().__init__(**words, **(dict.fromkeys(OPTIONS) if isinstance(self, _Alone) else {}) | options)

    @property
    def reduction(self) -> str:
        """The class of the reducer, or of all those of a `MultipleReducers`."""
        if self.reducer is None:
            return self.REDUCER
        if type(self.reducer).__name__ != "MultipleReducers":
            return type(self.reducer).__name__
        every = {type(x).__name__ for x in self._reducers()}
        return every.pop() if len(every) == 1 else "MultipleReducers"

    def _reducers(self) -> list[Any]:
        several = type(self.reducer).__name__ == "MultipleReducers"
        parts = dict(self.reducer.reducers.items()) if several else {}
        return [parts.get(name, self.reducer.default_reducer if several else self.reducer) for name in self.LOSSES]

    @property
    def normalize(self) -> bool:
        """Whether rows are brought to norm 1."""
        return self.distance is None or bool(getattr(self.distance, "normalize_embeddings", False))

    def unfused(self) -> str | None:
        """The part of `reason` that is a subclass's own; a compiler follows `super()` to methods alone."""
        return None

    @property
    def reason(self) -> str | None:
        """What the kernels cannot honour; None for nothing."""
        if self.overridden is not None:
            return f"{self.overridden} of its own"
        if (own := self.unfused()) is not None:
            return own
        seen = self.distance
        plain = seen is None or (
            _packages(seen, self.DISTANCES) and (getattr(seen, "p", 2), getattr(seen, "power", 1)) == (2, 1)
        )
        if not plain:
            return f"distance={type(seen).__name__}"  # fault: pml-distance-set
        if self.reducer is not None:
            for x in self._reducers():
                if not _packages(x, REDUCERS) or (getattr(x, "low", None) or 0, getattr(x, "high", None)) != (0, None):
                    return f"reducer={type(x).__name__}"
            if self.reduction not in REDUCERS:
                return f"reducer={self.reduction}"
        given = [name for name in ("embedding_regularizer", "collect_stats") if getattr(self, name, None)]
        return given[0] if given else None

    def forward(
        self,
        embeddings: Tensor,  # (N, D)
        labels: Tensor | None = None,  # (N,)
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,  # (M, D)
        ref_labels: Tensor | None = None,  # (M,)
    ) -> Tensor:
        """The loss, 0-d: of all pairs of rows, or of rows with `ref_emb`, by their labels. 0 where there are none.

        Args:
            embeddings: normalised here, as the distance says.
            labels: equal for positives.
            indices_tuple: a miner's choice: three tensors or four. Goes to upstream's code.
            ref_emb: columns in the place of the other rows; without `ref_labels`, or where those are the very object
                `labels`, row i is its column i, and no pair.
            ref_labels: the columns' labels.

        Raises:
            TypeError, ValueError: naming the argument, the value seen and the value needed.
            NotImplementedError: for what only upstream can honour, where it is not installed.
        """
        reason = self.reason or ("indices_tuple" if indices_tuple is not None else None)
        if reason is not None:
            return self.upstream(reason, embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if labels is None:
            raise ValueError("labels: got None, need (N,) numbers, or an indices_tuple")
        columns = embeddings if ref_emb is None else ref_emb
        if any(isinstance(x, Tensor) and x.dim() == 2 and not len(x) for x in (embeddings, columns)):
            return 0 * widened(embeddings).sum()
        checks.check_tensor("embeddings", embeddings, ("N", "D"))
        if ref_emb is None:
            ids = row_ids("labels", labels, embeddings)
            return self.of(Rows(embeddings, ids, None, ids, 0))
        check_rows("embeddings", embeddings, "ref_emb", ref_emb, same_n=ref_labels is None)
        # fault: pml-same-labels
        same = ref_labels is None or (ref_labels is labels and labels.device == embeddings.device)
        if same:
            ids = row_ids("labels", labels, embeddings)
            return self.of(Rows(embeddings, ids, ref_emb, ids, 0))
        return self.of(Rows.of_labels(embeddings, labels, ref_emb, ref_labels, None))

    @abstractmethod
    def of(self, rows: Rows) -> Tensor:
        """The loss, fused."""

    def reduced(self, losses: Tensor) -> Tensor:
        """The mean of all, or, under AvgNonZero, of those above 0; of none, 0. A NaN is none of those at 0."""
        # fault: pml-nan-loss
        kept = ~(losses <= 0) if self.reduction == "AvgNonZeroReducer" else torch.ones_like(losses, dtype=torch.bool)
        return fixed_sum(torch.where(kept, losses, 0.0)) / kept.sum().clamp(min=1)


def _packages(thing: Any, names: tuple[str, ...]) -> bool:
    """Whether it is of one of the package's classes, no subclass, and keeps no statistics."""
    kind = type(thing)
    known = kind.__name__ in names and kind.__module__.startswith(f"{PACKAGE}.")
    return known and not getattr(thing, "collect_stats", False)


def row_ids(name: str, labels: Tensor, rows: Tensor) -> Tensor:
    """Labels as (N,) int64 on the rows' device."""
    ids: Tensor = class_ids(name, labels)
    ids = ids.to(rows.device)
    checks.check_ids(name, ids, rows.shape[0], "N", rows.device)
    return ids


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
    with checks.uncast(q):
        return torch.bmm(q, k.transpose(1, 2)), pairs


def block_pairs(rows: Rows, block: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(C, n, D) rows and (C, m, D) columns of a block, float32 at least; which are pairs: a row with itself is none."""
    r, c = block
    k = rows.q if rows.k is None else rows.k
    itself = torch.full_like(r, -1) if rows.itself is None else r + rows.itself
    return widened(rows.q[r]), widened(k[c]), c[:, None, :] != itself[:, :, None]  # fault: pml-row-own
