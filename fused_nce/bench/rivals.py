"""The ways to compute a loss that can be timed beside each other, ours and others', and what is compared of them."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fused_nce.bench import formulas
from fused_nce.bench.formulas import FORMULAS

Loss = Callable[..., Tensor]
Step = Callable[[], tuple[Tensor, ...]]  # the loss, and a fresh gradient of each leaf


@dataclass(frozen=True)
class Problem(formulas.Problem):
    """One that draws its inputs."""

    @property
    def gemms(self) -> int:
        """The least GEMMs of n·m·d: a queue wants no gradient, and a self-similarity has one for both sides."""
        return 2 if self.loss in ("moco_nce", "nt_xent", "sup_con") else 3

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
        """Leaves of the dtype; the same seed draws the same numbers for every dtype."""
        generator = torch.Generator().manual_seed(seed)
        drawn = FORMULAS[self.loss].inputs(self, lambda *sizes: torch.randn(*sizes, generator=generator))
        return tuple(
            x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in drawn
        )


class Rival(NamedTuple):
    """A way to compute a loss. `make` gives None where it does not compute this one, or is not installed."""

    label: str
    make: Callable[[formulas.Problem], Loss | None]
    compiles: bool = False
    losses: Collection[str] = tuple(FORMULAS)  # that it computes
    package: str = "torch"  # that has it

    def why_none(self, loss: str) -> str:
        """Why `make` gave None."""
        if loss not in self.losses:
            return f"does not compute {loss}"
        return "not in this version" if importlib.util.find_spec(self.package) else "not installed"


def _eager(problem: formulas.Problem) -> Loss:
    return FORMULAS[problem.loss].naive


def _compiled(problem: formulas.Problem, **options: Any) -> Loss:
    import torch._inductor.config as inductor

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of a CUDA that nobody asked for
    inductor.compile_threads = 1  # a pool of compilers would share the cores with whatever is timed next
    torch._dynamo.reset()
    return torch.compile(_eager(problem), dynamic=False, fullgraph=True, options=options or None)


def _auto_chunker(problem: formulas.Problem) -> Loss | None:
    """Of one direction alone: torch 2.14 compiles the others as it would without, and says nothing."""
    return _compiled(problem, **{"auto_chunker.enable": True}) if problem.loss == "info_nce" else None


def _linear_cross_entropy(problem: formulas.Problem) -> Loss | None:
    found = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if found is None or options is None or problem.loss != "info_nce":
        return None
    return as_classes(partial(found, options=options()))


def as_classes(loss: Callable[..., Tensor]) -> Loss:
    """InfoNCE by a linear layer's cross-entropy: the keys are the weights of as many classes."""
    return lambda q, k: loss(normalize(q, dim=1) / 0.1, normalize(k, dim=1), torch.arange(len(q), device=q.device))


def ours(backend: str | None, problem: formulas.Problem) -> Loss:
    formula = FORMULAS[problem.loss]
    return lambda *inputs: formula.ours(*inputs, backend)


def library(module: str, makers: dict[str, Callable[[Any], Loss]], problem: formulas.Problem) -> Loss | None:
    if problem.loss not in makers:
        return None
    try:
        return makers[problem.loss](importlib.import_module(module))
    except Exception as error:  # another version may have other names
        if not (isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]):
            logging.getLogger("fused_nce").warning("%s is left out: %s", module, error)
        return None


def of_library(label: str, module: str, makers: dict[str, Callable[[Any], Loss]]) -> Rival:
    """A library's losses as a rival."""
    return Rival(label, partial(library, module, makers), losses=makers, package=module.partition(".")[0])


def _two_views(loss: Callable[..., Any]) -> Loss:
    """A loss of embeddings and labels, on two views: row i and row i + n/2 share a label."""
    return lambda x, y: loss(torch.cat([x, y]), torch.arange(len(x), device=x.device).repeat(2))


LIGHTLY: dict[str, Callable[[Any], Loss]] = {"nt_xent": lambda m: m.NTXentLoss(temperature=0.5)}
OPEN_CLIP: dict[str, Callable[[Any], Loss]] = {
    "clip_loss": lambda m: m.ClipLoss(),
    "siglip_loss": lambda m: m.SigLipLoss(),
}
PML: dict[str, Callable[[Any], Loss]] = {
    "nt_xent": lambda m: _two_views(m.NTXentLoss(temperature=0.5)),
    "sup_con": lambda m: m.SupConLoss(temperature=0.1),
}
RIVALS: dict[str, Rival] = {
    "eager": Rival("eager torch", _eager),
    "compile": Rival("torch.compile", _compiled, compiles=True),
    "auto_chunker": Rival("torch.compile, auto_chunker", _auto_chunker, compiles=True, losses=("info_nce",)),
    "linear_cross_entropy": Rival("F.linear_cross_entropy", _linear_cross_entropy, losses=("info_nce",)),
    "lightly": of_library("lightly", "lightly.loss", LIGHTLY),
    "open_clip": of_library("open_clip", "open_clip.loss", OPEN_CLIP),
    "pml": of_library("pytorch-metric-learning", "pytorch_metric_learning.losses", PML),
    "chunked": Rival("fused_nce, plain torch", partial(ours, "chunked")),
    "ours": Rival("fused_nce", partial(ours, None)),
}


def step(loss: Loss, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a training step asks of a loss: its value, and fresh gradients of the leaves."""
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, [x for x in inputs if x.requires_grad])


@dataclass(frozen=True)
class Subject:
    """A rival on a problem, for `fused_nce.bench.memory`."""

    rival: str  # of `RIVALS`, or a backend's name
    problem: Problem
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.rival} on {self.problem.label}"

    @property
    def gradients_bytes(self) -> int:
        return sum(x.nbytes for x in self.problem.inputs(self.dtype) if x.requires_grad)

    def warm_up(self) -> None:
        p = self.problem
        tiny = Problem(p.loss, "tiny", 4, 4 * p.n_c, 16, p.n_c, p.steps)
        step(make(self.rival, tiny), tiny.inputs(self.dtype))

    def prepare(self) -> Step:
        inputs = self.problem.inputs(self.dtype)
        run = partial(step, make(self.rival, self.problem), inputs)
        if self.rival in RIVALS and RIVALS[self.rival].compiles:
            run()
        return run


def make(rival: str, problem: formulas.Problem) -> Loss:
    loss = RIVALS[rival].make(problem) if rival in RIVALS else ours(rival, problem)
    assert loss is not None
    return loss


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """Against float64: of the value, relative; of the gradients, the worst ‖g − g₆₄‖ / ‖g₆₄‖."""
    pairs = zip(found, exact, strict=True)
    relative = [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]  # fault: bench-error-absolute
    return {"value_error": relative[0], "gradient_error": max(relative[1:])}
