"""One forward pass as one module (the unit that DDP and autocast wrap), the loss's own time, and window averages."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_nce.models.amdim import Losses
from fused_nce.train.limits import MAPS
from fused_nce.train.online_probes import OnlineProbes

# The order of the numbers that a step returns. All are means over images, except the last three, which are counts.
MEANS = ("loss", "nce", "nce_minus_chance", "penalty", "top1", "mi_bound")
COUNTS = ("linear_correct", "mlp_correct", "labelled")


class LossTimer:
    """Seconds spent in the loss, forward and backward, where `active`.

    Backward is the time from the gradient of the loss to the last gradient of its inputs: the loss's nodes are the
    newest of the graph, and autograd runs the newest first.
    """

    def __init__(self) -> None:
        self.active, self.seconds, self._start, self._end = False, 0.0, 0.0, 0.0

    def __call__(self, loss: nn.Module, view1: dict[str, Tensor], view2: dict[str, Tensor]) -> Losses:
        if not self.active:
            return loss(view1, view2)
        # Aliases, so that a gradient that a map gets from elsewhere too (h5 feeds f1) is not waited for.
        inputs = [{name: tap.view_as(tap) for name, tap in view.items()} for view in (view1, view2)]
        start = _clock()
        out: Losses = loss(*inputs)
        self.seconds += _clock() - start
        out.loss.register_hook(self._on_start)
        for tap in (*inputs[0].values(), *inputs[1].values()):
            if tap.requires_grad:
                tap.register_hook(self._on_end)
        return out

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


class TrainStep(nn.Module):
    """Views and labels to the scalar to minimise and the numbers to log.

    Args:
        model: has `encode` and `loss`.
        probes: trained on the top features of both views, or None.
        timer: of the loss.
        autocast: dtype of the matrix products, or None for the weights' own.
    """

    def __init__(
        self, model: nn.Module, probes: OnlineProbes | None, timer: LossTimer, autocast: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model, self.probes, self.timer, self.autocast = model, probes, timer, autocast

    def forward(
        self,
        view1: Tensor,  # (B, 3, H, H)
        view2: Tensor,  # (B, 3, H, H)
        labels: Tensor,  # (B,)
    ) -> tuple[Tensor, Tensor]:  # 0-d; (len(MEANS) + len(COUNTS),) detached float32
        with torch.autocast(view1.device.type, self.autocast, enabled=self.autocast is not None):
            return self._forward(view1, view2, labels)

    def _forward(self, view1: Tensor, view2: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        taps1, taps2 = model.encode(view1), model.encode(view2)
        counts = torch.zeros(3, device=view1.device)
        extra = None
        if self.probes is not None:  # before the loss, so that the loss's nodes are the newest: see LossTimer
            probe = self.probes(torch.cat((taps1["f1"], taps2["f1"])), labels.repeat(2))
            extra = probe.loss
            counts = torch.stack((*probe.correct, probe.labelled)).float()
        out = self.timer(model.loss, taps1, taps2)
        known = {"loss": out.loss, "nce": out.nce, "penalty": out.penalty} | out.stats
        means = torch.stack([_number(known.get(name), out.loss) for name in MEANS])
        total = out.loss if extra is None else out.loss + extra
        return total, torch.cat((means, counts))


def _number(value: Any, like: Tensor) -> Tensor:
    """A statistic that an injected loss does not report is NaN, which the log writes as null."""
    return torch.full_like(like, torch.nan).detach().float() if value is None else value.detach().float()


def leaves_some_unused(pairs: Sequence[str]) -> bool:
    """Whether a loss of these pairs leaves some of the encoder's parameters without a gradient."""
    return {side for pair in pairs for side in pair.split(">")} != set(MAPS)


def gradient_norm(module: nn.Module | None) -> Tensor:
    """Of all gradients of a module together; 0 without any."""
    grads = [p.grad for p in module.parameters() if p.grad is not None] if module is not None else []
    return torch.nn.utils.get_total_norm(grads)


class Meter:
    """Sums of the numbers of a window of forward passes; saved with a checkpoint, so that the log resumes exactly."""

    def __init__(self, sums: list[float] | None = None, passes: int = 0) -> None:
        self.sums = torch.tensor(sums or [0.0] * (len(MEANS) + len(COUNTS)), dtype=torch.float64)
        self.passes = passes

    def add(self, numbers: Tensor) -> None:
        """One forward pass."""
        self.sums = self.sums.to(numbers.device) + numbers.double()
        self.passes += 1

    def state(self) -> dict[str, Any]:
        """JSON-able; `Meter(**state)` restores it."""
        return {"sums": self.sums.tolist(), "passes": self.passes}

    def close(self) -> dict[str, float | None]:
        """The averages of the window, which starts anew."""
        sums = self.sums.tolist()
        line: dict[str, float | None] = {
            name: value / self.passes if self.passes else None for name, value in zip(MEANS, sums, strict=False)
        }
        linear, mlp, labelled = sums[len(MEANS) :]
        line["linear_acc"] = linear / labelled if labelled else None
        line["mlp_acc"] = mlp / labelled if labelled else None
        self.sums, self.passes = torch.zeros_like(self.sums), 0
        return line
