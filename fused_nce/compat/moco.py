"""MoCo's builder (facebookresearch/moco, moco/builder.py, whose repository is empty since February 2026).

The same class on a CPU, one GPU or many, any batch size. In place of the (N, 1 + K) logits it returns an object that
answers what a trainer asks of them, and becomes them for anything else.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_nce.compat.base import Adapter, number, scalar
from fused_nce.compat.processes import rank
from fused_nce.core import checks
from fused_nce.core.engine import tile_loss, tile_stats
from fused_nce.core.group import gathered, world_size
from fused_nce.core.statistics import deficit, softplus
from fused_nce.core.tails import Nce
from fused_nce.losses.common import widened
from fused_nce.losses.moco import SPEC

PANEL = 8192  # columns whose scores a search for the largest holds at a time
_logger = logging.getLogger("fused_nce")
_logged: set[str] = set()


@dataclass(eq=False, repr=False)  # DistributedDataParallel looks for an output's tensors in the fields of dataclasses
class MoCoLogits:
    """The logits ⟨q, [key; queue]⟩ / T, (N, 1 + K), without the scores.

    `F.cross_entropy` (and so `nn.CrossEntropyLoss`) of them with the labels that came beside them, as they came, is the
    fused loss;
    `topk`, `argmax` of rows, `shape`, `size`, `len`, `dtype`, `device`, `detach` and `float` hold nothing large either.
    All else, torch functions, operators and indexing, is asked of `full()`, the real tensor; one log line says so. Once
    something writes to that tensor, in place or for a gradient of its own, it is kept, and answers everything.

    Attributes:
        labels: (N,) zeros.
    """

    _q: Tensor  # (N, D), unit rows
    _k: Tensor  # (N, D), unit rows, no gradient
    _negatives: Tensor  # (K, D), which nobody writes to
    _temperature: float | Tensor
    labels: Tensor
    _written: Tensor | None = None  # the logits, where somebody has changed them
    _zeros: bool = True  # what the labels were when this was made

    def __post_init__(self) -> None:
        q = self._q
        self.shape = torch.Size((q.shape[0], 1 + self._negatives.shape[0]))
        self.device, self.dtype, self.ndim = q.device, widened(q.detach()[:0]).dtype, 2
        self._version = None if self.labels.is_inference() else self.labels._version

    # ---- what is answered without the logits ------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        """Whether the queries have a gradient."""
        return self._q.requires_grad

    def cross_entropy(self, reduction: str = "mean") -> Tensor:
        """The loss of class 0, in nats: 0-d, or (N,) under "none"."""
        checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
        if self._written is not None:
            return nn.functional.cross_entropy(self._written, self.labels, reduction=reduction)
        scale, positives = 1 / self._temperature, self._positives()
        if reduction == "none":
            found = tile_stats(self._q, self._negatives, SPEC, scale=scale, positives=positives)
            return softplus(deficit(found["neg_lse"], found["pos"].squeeze(1)))
        tail = Nce(reduction=reduction)
        return tile_loss(self._q, self._negatives, SPEC, tail, scale=scale, positives=positives, parts=False).loss

    def topk(
        self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> tuple[Tensor, Tensor] | torch.return_types.topk:
        """The k largest logits of each row and their classes, (N, k) each, panel by panel."""
        if dim not in (1, -1) or not largest or k > min(PANEL, self.shape[1]) or self._written is not None:
            return self._full_for("topk of this kind").topk(k, dim, largest, sorted)
        q = widened(self._q.detach())
        best, place = self._positives().detach(), torch.zeros(len(q), 1, dtype=torch.int64, device=q.device)
        with checks.uncast(q):
            for start in range(0, len(self._negatives), PANEL):
                scores = q @ self._negatives[start : start + PANEL].to(q.dtype).T / self._temperature
                here = torch.arange(start + 1, start + 1 + scores.shape[1], device=q.device).expand_as(scores)
                # fault: moco-search-largest
                best, at = torch.cat((best, scores), dim=1).topk(min(k, best.shape[1] + scores.shape[1]), dim=1)
                place = torch.cat((place, here), dim=1).gather(1, at)
        values = self._at(place) if torch.is_grad_enabled() and self._q.requires_grad else best
        found: torch.return_types.topk = torch.return_types.topk((values, place))
        return found

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """The class of each row's largest logit, (N,); of other dimensions or none, as of a tensor."""
        if dim not in (1, -1):
            return self._full_for("argmax of this kind").argmax(dim, keepdim)
        found = self.topk(1, dim)[1]
        return found if keepdim else found.squeeze(1)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """2."""
        return 2

    def __len__(self) -> int:
        return self.shape[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> MoCoLogits:
        """A copy of the labels counts its writes anew."""
        copies = [copy.deepcopy(getattr(self, name), memo) for name in _FIELDS]
        return MoCoLogits(*(*copies, self._labels_are_zeros()))

    def detach(self) -> MoCoLogits:
        """The same without a gradient."""
        written = None if self._written is None else self._written.detach()
        return replace(self, _q=self._q.detach(), _written=written, _zeros=self._labels_are_zeros())

    def float(self) -> MoCoLogits | Tensor:
        """Itself: scores are float32 whatever the encoder's dtype (float64 for float64)."""
        return self if self.dtype == torch.float32 else self._full_for("float").float()

    # ---- and all else -----------------------------------------------------------------------------------------------

    def full(self) -> Tensor:
        """The logits, (N, 1 + K), differentiable in the queries."""
        if self._written is not None:
            return self._written
        q = widened(self._q)
        with checks.uncast(q):
            negative = q @ self._negatives.to(q.dtype).T / self._temperature
        return torch.cat((self._positives(), negative), dim=1)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        full = self._full_for(name)
        if name in KEPT or name.endswith("_"):
            self._written = full  # fault: moco-written-forgotten
        return getattr(full, name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        asked = args[0] if args else kwargs.get("input")
        if func is nn.functional.cross_entropy and getattr(asked, "_written", None) is None:
            plain = _plain_cross_entropy(*args, **kwargs)
            if plain is not None:
                return asked.cross_entropy(plain)  # type: ignore[union-attr]
        others = kwargs.keys() - {"input"}
        if isinstance(asked, cls) and others <= SEARCHES.get(func, set()):
            return getattr(asked, func.__name__)(*args[1:], **{name: kwargs[name] for name in others})
        name = getattr(func, "__name__", "a torch function")
        opened = pytree.tree_map(
            lambda x: x._full_for(name) if isinstance(x, cls) else x,
            (args, kwargs),
            is_leaf=lambda x: isinstance(x, cls),
        )
        return func(*opened[0], **opened[1])

    def _full_for(self, reason: str) -> Tensor:
        """The logits, with a line in the log the first time."""
        if self._written is not None:
            return self._written
        if reason not in _logged:
            _logged.add(reason)
            _logger.warning("moco: holding the %s logits for %s", tuple(self.shape), reason)
        return self.full()

    def _labels_are_zeros(self) -> bool:
        """Still; only inference tensors, whose writes torch does not count, are read."""
        if self._version is None:
            return not self.labels.any()
        return self._zeros and self.labels._version == self._version  # fault: moco-labels-written

    def _positives(self) -> Tensor:
        """(N, 1), in float32 at least."""
        with checks.uncast(self._q):
            return (widened(self._q) * widened(self._k)).sum(dim=1, keepdim=True) / self._temperature

    def _at(self, place: Tensor) -> Tensor:
        """The logits of some classes of each row, (N, p), differentiable in the queries."""
        rows = self._negatives[(place - 1).clamp(min=0)].to(self.dtype)
        with checks.uncast(self._q):
            scores = torch.einsum("nd,npd->np", widened(self._q), rows) / self._temperature
        return torch.where(place == 0, self._positives(), scores)


def _of_full(name: str) -> Callable[..., Any]:
    """A tensor's operator, asked of the real logits."""

    def operator(self: MoCoLogits, *others: Any) -> Any:
        full = self._full_for("indexing" if "item" in name else "arithmetic")
        if name not in WRITE:
            return getattr(full, name)(*others)
        self._written = full
        getattr(full, name)(*others)
        return self

    return operator


def _operators(names: str) -> list[str]:
    return [f"__{name}__" for name in names.split()]


SEARCHES: dict[Any, set[str]] = {torch.topk: {"k", "dim", "largest", "sorted"}, torch.argmax: {"dim", "keepdim"}}
KEPT = ("data", "grad", "register_hook", "retain_grad")  # they change the tensor, or tell of a change
WRITE = _operators("setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor")
for _name in WRITE + _operators(
    "getitem iter contains bool float int array abs neg pos invert eq ne lt le gt ge add radd sub rsub mul rmul "
    "truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul and rand or ror xor rxor"
):
    setattr(MoCoLogits, _name, _of_full(_name))
_FIELDS = [field.name for field in fields(MoCoLogits)][:-1]
pytree.register_pytree_node(
    MoCoLogits,
    lambda x: ([getattr(x, name) for name in _FIELDS], x._labels_are_zeros()),
    lambda values, zeros: MoCoLogits(*(*values, zeros)),
)


def _plain_cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> str | None:
    """The reduction of a call that is the fused loss: that of our labels, without options; None for another."""
    ours = isinstance(input, MoCoLogits) and target is input.labels and input._labels_are_zeros()
    bare = weight is None and size_average is None and reduce is None and label_smoothing == 0.0 and ignore_index != 0
    return reduction if ours and bare else None


class MoCo(Adapter):
    """A query encoder, a key encoder that follows it, and a queue of keys.

    Args:
        base_encoder: called with num_classes=dim, twice; with `mlp` its last layer is `fc`, as torchvision's ResNets'.
        dim: D of the features.
        K: keys in the queue, of any relation to the batch: it wraps without dropping.
        m: the key encoder's parameters are m·themselves + (1 − m)·the query encoder's, before each use.
        T: temperature.
        mlp: put a hidden layer before the last.
        logits: "fused" returns `MoCoLogits`; "full" the (N, 1 + K) tensor itself.
        bn_splits: encode a batch in so many parts (the keys' shuffled), each with BatchNorm statistics of its own:
            what several GPUs do, for one. 1 on one device leaves the batch whole, and a network with BatchNorm can
            then tell a key's batch from its statistics.

    Attributes:
        queue: (dim, K), unit columns.
        queue_ptr: (1,) int64, where the next key goes. Keys and shapes of the state are upstream's.

    Raises:
        TypeError, ValueError: naming the argument, the value seen and the value needed.
    """

    SHOWN = ("K", "m", "T", "logits", "bn_splits")
    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
        *,
        logits: str = "fused",
        bn_splits: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "K": K, "bn_splits": bn_splits}
        dim, K, bn_splits = (checks.checked_int(*size, at_least=1) for size in sizes.items())
        checks.check_number("m", m, at_least=0)
        number("T", T, above=0)
        checks.check_choice("logits", logits, ("fused", "full"))
        self.K, self.m, self.T, self.logits, self.bn_splits = K, m, T, logits, bn_splits
        self.encoder_q, self.encoder_k = base_encoder(num_classes=dim), base_encoder(num_classes=dim)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                width = encoder.fc.weight.shape[1]  # type: ignore[union-attr,index]
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)  # type: ignore[arg-type]
        for ours, theirs in self._parameters_in_pairs():
            theirs.data.copy_(ours.data)
            theirs.requires_grad = False
        self.register_buffer("queue", nn.functional.normalize(torch.randn(dim, K), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(
        self,
        im_q: Tensor,  # (N, ...) one view of the images
        im_k: Tensor,  # (N, ...) another
    ) -> tuple[MoCoLogits | Tensor, Tensor]:
        """Logits (N, 1 + K), already divided by T, and their labels, (N,) zeros. The keys then enter the queue."""
        q = nn.functional.normalize(self._encode(self.encoder_q, im_q), dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            shuffled, order = self._batch_shuffle_ddp(im_k)
            k = self._batch_unshuffle_ddp(nn.functional.normalize(self._encode(self.encoder_k, shuffled), dim=1), order)
            # One copy, as upstream makes: the queue changes before the backward. In rows, as the kernels read.
            negatives = self.queue.t().clone(memory_format=torch.contiguous_format)  # fault: moco-queue-after
            self._dequeue_and_enqueue(k)
        labels = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        found = MoCoLogits(q, k, negatives, scalar(self.T, q), labels)
        return (found if self.logits == "fused" else found.full()), labels

    # Upstream's four helpers, by upstream's names: a subclass may have its own.

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        """The key encoder follows."""
        for ours, theirs in self._parameters_in_pairs():
            theirs.mul_(self.m).add_(ours, alpha=1 - self.m)

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As many images, drawn from those of all processes, and the order that undoes it."""
        if world_size() == 1 and self.bn_splits == 1:  # a permutation of one batch has its statistics
            return x, None
        everyone = gathered(x)
        order = torch.randperm(len(everyone), device=x.device)
        if world_size() > 1:
            torch.distributed.broadcast(order, src=0)
        return everyone[order[self._mine(x)]], order.argsort()  # fault: moco-keys-do

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: Tensor | None) -> Tensor:
        """The keys of this process's images."""
        return x if idx_unshuffle is None else gathered(x)[idx_unshuffle[self._mine(x)]]

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Those of all processes, over the oldest; of more than K the last K stay."""
        keys = gathered(keys)
        kept = keys[-self.K :]
        first = self.queue_ptr + len(keys) - len(kept)
        slots = (first + torch.arange(len(kept), device=keys.device)) % self.K
        self.queue.index_copy_(1, slots, kept.T.to(self.queue.dtype))
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % self.K)

    def _mine(self, x: Tensor) -> Tensor:
        """The places of this process's rows among all."""
        return torch.arange(len(x), device=x.device) + rank() * len(x)

    def _parameters_in_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True))

    def _encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        if self.bn_splits == 1:
            out: Tensor = encoder(x)
            return out
        if len(x) % self.bn_splits:
            raise ValueError(f"im_q: got N = {len(x)}, need a multiple of bn_splits = {self.bn_splits}")
        return torch.cat([encoder(part) for part in x.chunk(self.bn_splits)])
