"""One forward pass as one module (the unit that DDP and autocast wrap), the loss's own time, and window averages."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fused_nce.models.base import Embedded, Losses, Model
from fused_nce.train.evaluation.features import as_vectors
from fused_nce.train.method import Method
from fused_nce.train.monitor.online_probes import OnlineProbes
from fused_nce.train.monitor.profile import part
from fused_nce.train.saving import sharding

# The order of the numbers that a step returns: means over images, then those that a method adds, then counts.
MEANS = ("loss", "nce", "nce_minus_chance", "penalty", "top1", "mi_bound")
COUNTS = ("linear_correct", "mlp_correct", "labelled")


class LossTimer:
    """Seconds spent in the loss, forward and backward, where `active`.

    Backward is the time from the gradient of the loss to the last gradient of its inputs: the loss's nodes are the
    newest of the graph, and autograd runs the newest first.
    """

    def __init__(self) -> None:
        self.active, self.seconds, self._start, self._end = False, 0.0, 0.0, 0.0

    def __call__(self, loss: nn.Module, inputs: tuple[Any, ...]) -> Losses:
        if not self.active:
            return loss(*inputs)
        # Aliases, so that a gradient that a map gets from elsewhere too (h5 feeds f1) is not waited for.
        inputs = tree_map_only(Tensor, self._watched, inputs)
        start = _clock()
        out: Losses = loss(*inputs)
        self.seconds += _clock() - start
        out.loss.register_hook(self._on_start)
        return out

    def _watched(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        alias = tensor.view_as(tensor)
        alias.register_hook(self._on_end)
        return alias

    def begin(self, active: bool) -> None:
        """At the start of an update."""
        self.active, self.seconds = active, 0.0

    def after_backward(self) -> None:
        """After each backward pass."""
        if self.active:
            self.seconds += max(0.0, self._end - self._start)

    def _on_start(self, grad: Tensor) -> None:
        self._start = self._end = _clock()

    def _on_end(self, grad: Tensor) -> None:
        self._end = _clock()


def _clock() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Passed(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor  # 0-d: to minimise
    numbers: Tensor  # (len(means) + len(COUNTS),) detached float32


class TrainStep(nn.Module):
    """A batch and its labels to the scalar to minimise and the numbers to log.

    Args:
        model: the method's.
        probes: trained on the first tap of every view, or None.
        timer: of the loss.
        autocast: dtype of the matrix products, or None for the weights' own.
        config: says which tap, and which statistics of the loss are logged.
    """

    def __init__(
        self,
        model: Model,
        probes: OnlineProbes | None,
        timer: LossTimer,
        autocast: torch.dtype | None,
        config: Method,
    ) -> None:
        super().__init__()
        self.model, self.probes, self.timer, self.autocast = model, probes, timer, autocast
        self.tap, self.means = config.taps[0], MEANS + config.stats
        self.view_count = config.view_count

    def forward(
        self,
        batch: tuple[Tensor, ...],  # (B, ...) each: the views, and whatever else the model takes
        labels: Tensor,  # (B,)
    ) -> Passed:
        with self._precision(labels):
            return self._finished(self.model.embed(batch), labels)

    def begin(
        self,
        inputs: tuple[tuple[Tensor, ...], Tensor],  # a part of the batch, and its labels
    ) -> tuple[Any, tuple[Tensor, ...], Tensor]:
        """What `whole` needs of a part."""
        batch, labels = inputs
        with self._precision(labels):
            return self.model.begin(batch), batch[self.view_count :], labels

    def whole(self, begun: tuple[Any, tuple[Tensor, ...], Tensor]) -> Passed:
        """`forward` of the whole batch, from what `begin` returned for its parts."""
        found, extras, labels = begun
        with self._precision(labels):
            return self._finished(self.model.finish(found, extras), labels)

    def _precision(self, x: Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None)

    def _finished(self, embedded: Embedded, labels: Tensor) -> Passed:
        model: Any = self.model
        taps, inputs = embedded
        counts = torch.zeros(len(COUNTS), device=labels.device)
        extra = None
        if self.probes is not None:  # before the loss, so that the loss's nodes are the newest: see LossTimer
            with part("probes"):
                seen = torch.cat([as_vectors(view[self.tap].detach()) for view in taps])
                probe = self.probes(seen, labels.repeat(len(taps)))
                extra = probe.loss
                counts = torch.stack((*probe.correct, probe.labelled)).float()
        with part("loss"):
            out = self.timer(model.loss, inputs)
        known = {"loss": out.loss, "nce": out.nce, "penalty": out.penalty} | out.stats
        means = torch.stack([_number(known.get(name), out.loss) for name in self.means])
        total = out.loss if extra is None else out.loss + extra
        return Passed(total, torch.cat((means, counts)))


def _number(value: Any, like: Tensor) -> Tensor:
    """A statistic that an injected loss does not report is NaN, which the log writes as null."""
    return torch.full_like(like, torch.nan).detach().float() if value is None else value.detach().float()


def memory_names(module: nn.Module, model: Model) -> list[str]:
    """The buffers of a module that no forward pass of the model in it writes."""
    held = {id(b) for name in model.memories for b in model.get_submodule(name).buffers()}
    return [name for name, buffer in module.named_buffers() if id(buffer) in held]


class Kept:
    """Copies of a module's buffers, made once and filled before each update, so that it can be undone.

    Args:
        module: whose buffers; they may come, go, and change their shape between updates.
        without: names of those that are left out.
    """

    def __init__(self, module: nn.Module, without: Collection[str] = ()) -> None:
        self.module, self.without = module, frozenset(without)
        self._live: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = []  # of a dtype: a launch each on a GPU

    @torch.no_grad()
    def keep(self) -> None:
        """As they are now."""
        live = {n: b for n, b in self.module.named_buffers() if n not in self.without}
        held = zip(live.values(), self._live.values(), self._copies.values(), strict=False)
        # fault: kept-once
        known = [(b is was, b.shape, b.dtype, b.device) == (True, c.shape, c.dtype, c.device) for b, was, c in held]
        if live.keys() != self._live.keys() or not all(known):
            self._live, self._copies = live, {n: torch.empty_like(b) for n, b in live.items()}
            kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
            for name, buffer in live.items():
                pair = kinds.setdefault((buffer.dtype, buffer.device), ([], []))
                pair[0].append(self._copies[name])
                pair[1].append(buffer)
            self._pairs = list(kinds.values())
        for copies, buffers in self._pairs:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def restore(self, prefix: str = "") -> None:
        """As they were: all of them, or those whose names begin so."""
        for name, buffer in self.module.named_buffers():
            if name in self._copies and name.startswith(prefix):
                buffer.copy_(self._copies[name])


def gradient_norm(module: nn.Module | None) -> Tensor:
    """Of all gradients of a module together; 0 without any."""
    grads = [p.grad for p in module.parameters() if p.grad is not None] if module is not None else []
    return sharding.whole(torch.nn.utils.get_total_norm(grads))


class Meter:
    """Sums of the numbers of a window of forward passes; saved with a checkpoint, so that the log resumes exactly.

    Args:
        means: names of the numbers before the counts.
        sums: of an open window.
        passes: in it.
    """

    def __init__(self, means: Sequence[str], sums: list[float] | None = None, passes: int = 0) -> None:
        self.means, self.passes = tuple(means), passes
        self.sums = torch.tensor(sums or [0.0] * (len(means) + len(COUNTS)), dtype=torch.float64)

    def add(self, numbers: Tensor) -> None:
        """One forward pass."""
        self.sums = self.sums.to(numbers.device) + numbers.double()
        self.passes += 1

    def state(self) -> dict[str, Any]:
        """JSON-able; `Meter(means, **state)` restores it."""
        return {"sums": self.sums.tolist(), "passes": self.passes}

    @classmethod
    def shared(cls, means: Sequence[str], states: Sequence[dict[str, Any]], rank: int, world: int) -> Meter:
        """A process's own of so many; where there were others, the first takes the sums of all."""
        if len(states) == world:
            return cls(means, **states[rank])
        if rank:
            return cls(means)
        sums = [sum(values) for values in zip(*(state["sums"] for state in states), strict=True)]
        return cls(means, sums, sum(state["passes"] for state in states))

    def close(self, total: Callable[[Tensor], Tensor] = lambda numbers: numbers) -> dict[str, float | None]:
        """The averages of the window, which starts anew; over all processes by what adds up their numbers."""
        *sums, passes = total(torch.cat([self.sums, self.sums.new_tensor([self.passes])])).tolist()
        line: dict[str, float | None] = {
            name: value / passes if passes else None for name, value in zip(self.means, sums, strict=False)
        }
        linear, mlp, labelled = sums[len(self.means) :]
        line["linear_acc"] = linear / labelled if labelled else None
        line["mlp_acc"] = mlp / labelled if labelled else None
        self.sums, self.passes = torch.zeros_like(self.sums), 0
        return line
