"""The losses as tables and as measured cases, from their registry: what is added there is here and in the documents."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import pictures
from fused_nce.core import flop
from fused_nce.core.cost import Call
from fused_nce.core.ops import COUNT, Scores
from fused_nce.losses.registry import LOSSES, Entry, Size

MICRO = Size(n=512, m=16384, d=128, p=4)  # a batch beside a queue, of the width that projection heads have


def entries() -> list[Entry]:
    """One of each function, by name."""
    return [LOSSES[name] for name in sorted(LOSSES) if "/" not in name] + [
        entry for name, entry in sorted(LOSSES.items()) if "/" in name and entry.name not in LOSSES
    ]


def table(page: str) -> str:
    """Name, module, formula and paper of each, linked into the page."""
    rows = ["| loss | module | formula | source |", "| --- | --- | --- | --- |"]
    for entry in entries():
        formula = entry.formula.replace("|", "\\|")
        link = f"[`{entry.name}`]({page}#{entry.name})"
        rows.append(f"| {link} | `{entry.module.__name__}` | {formula} | {entry.source} |")
    return "\n".join(rows)


def reference() -> str:
    """Formula, cost, picture, signature and docstring of each."""
    parts = []
    for entry in entries():
        drawings = [name for name in pictures.drawn() if name.partition("/")[0] == entry.name]
        shown = [f"![{name}: {pictures.KEY}](pictures/{pictures.file_of(name)})" for name in drawings]
        about, _, example = (inspect.getdoc(entry.function) or "").partition("\n\nExample:\n")
        text = f"```text\n{signature(entry)}\n\n{about}\n```"
        code = textwrap.dedent(example).replace("```", "```python", 1)
        parts += [f"## {entry.name}", f"`{entry.formula}`, {entry.source}. {cost(entry)}", *shown, text, code]
    return "\n\n".join(parts)


def api() -> str:
    """What mkdocstrings renders of each: the function, and its module."""
    found = [x for entry in entries() for x in (entry.function, entry.module)]
    return "\n\n".join(f"::: {x.__module__}.{x.__qualname__}" for x in found)


class _Asked(TorchDispatchMode):
    """What the losses below ask of a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fused_nce.loss.default:
            tail, needs = args[COUNT : COUNT + 2]
            self.calls.append(flop.call_of("loss", Scores(*args[:COUNT]), tail, needs))
        return func(*args, **(kwargs or {}))


def cost(entry: Entry) -> str:
    """How often its score GEMM's work is done, forward and backward together, as torch's counter counts it."""
    if entry.closed:
        return "It scores no pairs: its cost is linear in its inputs."
    inputs = entry.example(0, Size(n=8, m=32, d=8, p=2))
    leaves = [x.requires_grad_() for x in entry.differentiable(inputs).values()]
    with FlopCounterMode(display=False) as both:
        torch.autograd.grad(entry.function(**inputs, backend="chunked").loss, leaves)
    with torch.no_grad(), FlopCounterMode(display=False) as scores:
        entry.function(**inputs, backend="chunked")
    with _Asked() as asked:
        entry.function(**inputs, backend="chunked")
    text = f"Costs {both.get_total_flops() / scores.get_total_flops():g} GEMMs of its scores' size"
    call = asked.calls[0] if len(asked.calls) == 1 else Call()
    if call.columns or call.symmetric:
        kept, streamed = (call.gemms("cpu", call.tiles(kept=kept)) for kept in (True, False))
        text += f"; on a CPU {kept:g} where the workspace keeps the scores, {streamed:g} where it does not"
    return f"{text}."


def signature(entry: Entry) -> str:
    """A parameter a line, with its type."""
    lines, keyword = [], False
    for parameter in inspect.signature(entry.function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            lines.append("*")
            keyword = True
        lines.append(str(parameter).replace("'", ""))
    return f"{entry.name}(\n" + "".join(f"    {line},\n" for line in lines) + ") -> NCEOutput"


def step(name: str, size: Size = MICRO, backend: str | None = None) -> Callable[[], Tensor]:
    """One forward and backward of a registered loss, at a size: the loss, its gradients dropped."""
    entry = LOSSES[name]
    inputs = entry.example(0, size)
    leaves = [x.requires_grad_() for x in entry.differentiable(inputs).values()]
    options = {} if entry.closed else {"backend": backend}

    def run() -> Tensor:
        loss = entry.function(**inputs, **options).loss
        torch.autograd.grad(loss, leaves)
        return loss.detach()

    return run
