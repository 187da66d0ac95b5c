"""Whom the loss is measured against. All compute the same number and gradients; `bound` is their common floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.cases import CLIP, PENALTY, Case
from fused_nce.measure import naive_loss

Step = Callable[[], Tensor]  # one forward and backward: the loss; gradients in the leaves' .grad
Loss = Callable[[Tensor, Tensor], Tensor]


class Rival(NamedTuple):
    """A way to compute the loss."""

    label: str
    loss: Callable[[], Loss]  # built once a shape, so that a compiler starts afresh
    recompiles: bool = False  # a new shape costs a compilation, which no measurement includes


def _naive() -> Loss:
    return lambda a, c: naive_loss(a, c, clip=CLIP, penalty=PENALTY)


def _compiled() -> Loss:
    import logging

    import torch._inductor.config as inductor

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA that nobody asked for
    inductor.compile_threads = 1  # a pool of compilers would share the cores with whatever is timed next
    torch._dynamo.reset()
    return torch.compile(_naive(), dynamic=False, fullgraph=True)


def _fused(backend: str | None) -> Loss:
    from fused_nce import amdim_nce

    return lambda a, c: amdim_nce(a, c, clip=CLIP, penalty=PENALTY, backend=backend).loss


RIVALS: dict[str, Rival] = {
    "naive": Rival("eager torch", _naive),
    "compile": Rival("torch.compile", _compiled, recompiles=True),
    "chunked": Rival("fused_nce, plain torch", lambda: _fused("chunked")),
    "ours": Rival("fused_nce", lambda: _fused(None)),
}


def prepare(rival: str, a: Tensor, c: Tensor) -> Step:
    """One training step's worth of a rival's loss on two leaves: forward and both gradients, no optimizer."""
    loss = RIVALS[rival].loss()

    def step() -> Tensor:
        value = loss(a, c)
        value.backward()
        return value.detach()

    return step


def clear(a: Tensor, c: Tensor) -> None:
    """Drop the gradients, so that the next step writes fresh ones."""
    a.grad = c.grad = None


def check_agreement(case: Case, steps: dict[str, Step], a: Tensor, c: Tensor) -> None:
    """Refuse to time a rival that computes something else: loss and gradients against the naive ones.

    Raises:
        ValueError: naming the rival, the quantity and the relative difference.
    """
    found = {}
    for name in ("naive", *(name for name in steps if name != "naive")):
        step = steps[name] if name in steps else prepare(name, a, c)
        clear(a, c)
        value = step()
        assert a.grad is not None
        assert c.grad is not None
        found[name] = {"loss": value, "antecedents' gradient": a.grad, "consequents' gradient": c.grad}
        require_close(f"{name} on {case.name} {case.dtype}", found[name], found["naive"], case.dtype)
    clear(a, c)


def require_close(where: str, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> None:
    """Each quantity within the dtype's rounding of what another way of computing it gave, in the Euclidean norm.

    Raises:
        ValueError: naming the place, the quantity and the relative difference.
    """
    # 16-bit leaves agree to their own rounding; in float32 two orders of summation differ by about 1e-5 of the largest.
    tolerance = 1e-3 if dtype == "float32" else 5e-2
    for quantity, tensor in found.items():
        wanted = expected[quantity].float()
        difference = ((tensor.float() - wanted).norm() / wanted.norm()).item()
        if not difference <= tolerance:
            raise ValueError(f"{where}: {quantity} differs by {difference:.1e}, need <= {tolerance:.0e}")


@dataclass(frozen=True)
class Subject:
    """A rival on a case, for `fused_nce.bench.memory`."""

    rival: str
    case: Case

    @property
    def name(self) -> str:
        return f"{self.rival} on {self.case.name}"

    @property
    def gradients_bytes(self) -> int:
        return self.case.inputs_bytes

    def warm_up(self) -> None:
        prepare(self.rival, *Case(n_a=4, n_c=3, d=16, dtype=self.case.dtype).inputs())()

    def prepare(self) -> Step:
        a, c = self.case.inputs()
        step = prepare(self.rival, a, c)
        if RIVALS[self.rival].recompiles:
            step()
            clear(a, c)
        return step
