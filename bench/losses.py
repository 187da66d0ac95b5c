"""The losses as tables and as measured cases, from their registry: what is added there is here and in the documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

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
    """The signature and the docstring of each."""
    parts = [
        f"## {entry.name}\n\n```text\n{signature(entry)}\n\n{inspect.getdoc(entry.function)}\n```"
        for entry in entries()
    ]
    return "\n\n".join(parts)


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
    leaves = []
    for key, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point() and key not in entry.frozen:
            leaves.append(x.requires_grad_())
    options = {} if entry.closed else {"backend": backend}

    def run() -> Tensor:
        loss = entry.function(**inputs, **options).loss
        torch.autograd.grad(loss, leaves)
        return loss.detach()

    return run
