"""The ways to compute one problem's loss with its gradients: eager torch, torch.compile, and every backend of ours."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.machine import Machine
from bench.gpu.problems import Problem
from bench.rivals import require_close
from fused_nce import last_path
from fused_nce.bench.formulas import FORMULAS, LOGIT_SCALE
from fused_nce.bench.rivals import RIVALS, Rival, as_classes, of_library, step
from fused_nce.bench.timers import Call
from fused_nce.core import dispatch

LABELS = {"naive": "eager torch", "compile": "torch.compile", "ours": "fused_nce"}
NAIVE = ("naive", "compile")
DTYPE = torch.bfloat16

Inputs = tuple[Tensor, ...]
Loss = Callable[..., Tensor]


def _memeff(module: Any) -> Loss:
    """Its temperature is a constant; `stable`, its default, would scale the gradients by √batch."""
    loss = module.MemoryEfficientCLIPLoss(temperature=1 / LOGIT_SCALE, normalized_inputs=True, stable=False)
    return lambda image, text, logit_scale: loss(image, text) + 0 * logit_scale


# Others' losses, where they are installed; the last four need a GPU.
LIBRARIES: dict[str, Rival] = {name: RIVALS[name] for name in ("linear_cross_entropy", "lightly", "open_clip")} | {
    name: of_library(label, module, {loss: make})
    for name, label, module, loss, make in (
        ("memeff", "memeff", "memeff", "clip_loss", _memeff),
        ("liger", "Liger", "liger_kernel.transformers.functional", "info_nce",
         lambda m: as_classes(m.liger_fused_linear_cross_entropy)),
        ("quack", "QuACK", "quack.linear_cross_entropy", "info_nce",
         lambda m: as_classes(m.chunked_linear_cross_entropy)),
        ("siglip_kernel", "siglip-kernel", "siglip_kernel", "siglip_loss",
         lambda m: lambda image, text, scale, bias: m.fused_siglip_loss(image, text, scale.log(), bias)),
    )
}  # fmt: skip
CHUNKER = "auto_chunker"
THEIRS = (*NAIVE, CHUNKER, *LIBRARIES)


def rotation(calls: Sequence[Call]) -> Call:
    """A call that takes the next set of inputs each time, so that none is in the cache from the call before."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def losses(problem: Problem, machine: Machine, compiled: bool) -> dict[str, Loss]:
    """Each contender by name. Ours are `ours`, the automatic choice, and every backend but the oracle's by its own."""
    formula = FORMULAS[problem.loss]
    found: dict[str, Loss] = {"naive": formula.naive}
    compile_it = partial(torch.compile, formula.naive, dynamic=False, fullgraph=True)
    if compiled:
        import torch._inductor.config as inductor

        found["compile"] = compile_it(backend=machine.compiler)
        if machine.compiler == "inductor" and problem.loss == "info_nce" and hasattr(inductor, CHUNKER):
            found[CHUNKER] = compile_it(options={f"{CHUNKER}.enable": True})  # it changes no other loss
    others = ((name, rival.make(problem)) for name, rival in LIBRARIES.items())
    found |= {name: loss for name, loss in others if loss is not None}
    for name in (None, *(name for name in dispatch.BACKENDS if name != "reference")):
        found[name or "ours"] = with_backend(formula.ours, name)
    return found


def with_backend(loss: Loss, backend: str | None) -> Loss:
    """One of ours, as a loss of its tensors alone."""
    return lambda *inputs: loss(*inputs, backend)


def failure(call: Call) -> tuple[Any, str]:
    """(result, "") of a call, or (None, why it has none) in one line: a rival that fails does not end the run."""
    try:
        return call(), ""
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return None, f"{type(error).__name__}: {first}"[:300]


def agreeing(
    problem: Problem, contenders: dict[str, Loss], inputs: Inputs
) -> tuple[dict[str, Loss], dict[str, str], str]:
    """Who runs and computes the same loss and gradients as the first that runs: eager torch where its memory is there.

    Returns:
        The contenders to time, the others with the reason, and the backend that the automatic choice took.
    """
    able: dict[str, Loss] = {}
    refused: dict[str, str] = {}
    expected: dict[str, Tensor] | None = None
    chosen = ""
    for name, loss in contenders.items():
        if name == chosen:
            continue  # it is `ours`
        result, reason = failure(partial(step, loss, inputs))
        if not reason:
            path = last_path()
            chosen = path.backend if name == "ours" and path else chosen
            # A scalar leaf's gradient is a sum that cancels: it says little about who is right.
            found = {f"output {i}": x for i, x in enumerate(result) if i == 0 or x.dim()}
            expected = found if expected is None else expected
            where = f"{name} on {problem.label}"
            _, reason = failure(partial(require_close, where, found, expected, str(DTYPE).removeprefix("torch.")))
        if reason:
            refused[name] = reason
        else:
            able[name] = loss
    return able, refused, chosen


def gemm_operands(problem: Problem, machine: Machine, sets: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, w) for each set of inputs, w being the weights, n × m.

    Weights larger than the cache are out of it by themselves: they are one tensor for all sets.
    """
    n, m, d = problem.n, problem.m, problem.d
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for seed in range(sets):
        draw = machine.draw(seed, DTYPE)
        w = found[0][2] if found and 2 * n * m > machine.cache_bytes else draw(n, m)
        found.append((draw(n, d), draw(m, d), w))
    return found


def gemm_calls(problem: Problem, machine: Machine, sets: int) -> dict[tuple[str, str], Call]:
    """(GEMM, kind of result) → a call, for the least GEMMs of the problem; empty where they do not fit.

    Scores leave in float32, as a loss needs them; gradients in float32 or in the inputs' dtype, whichever is faster.
    """
    if not machine.fits((2 + 4) * problem.scores):
        return {}
    operands = gemm_operands(problem, machine, sets)
    products: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "scores": lambda q, k, w: (q, k.T),
        "scores_again": lambda q, k, w: (q, k.T),
        "grad_q": lambda q, k, w: (w, k),
        "grad_k": lambda q, k, w: (w.T, q),
    }
    calls: dict[tuple[str, str], Call] = {}
    for gemm in problem.gemms:
        kinds = {"float32": torch.float32} | ({} if gemm.startswith("scores") else {"bfloat16": None})
        every = {
            kind: rotation([partial(_mm, *products[gemm](*x), out) for x in operands]) for kind, out in kinds.items()
        }
        able = {kind: call for kind, call in every.items() if not failure(call)[1]}
        if not able:  # this torch or device has no float32 result of bf16 operands
            able = {"bfloat16": rotation([partial(_mm, *products[gemm](*x), None) for x in operands])}
        calls |= {(gemm, kind): call for kind, call in able.items()}
    return calls


def _mm(x: Tensor, y: Tensor, out: torch.dtype | None) -> Tensor:
    return torch.mm(x, y) if out is None else torch.mm(x, y, out_dtype=out)


@contextmanager
def workspace(limit_mb: int | None) -> Iterator[None]:
    """`FUSED_NCE_WORKSPACE_MB`, set for a while; None leaves the default."""
    before = os.environ.pop("FUSED_NCE_WORKSPACE_MB", None)
    if limit_mb is not None:
        os.environ["FUSED_NCE_WORKSPACE_MB"] = str(limit_mb)
    try:
        yield
    finally:
        os.environ.pop("FUSED_NCE_WORKSPACE_MB", None)
        if before is not None:
            os.environ["FUSED_NCE_WORKSPACE_MB"] = before
