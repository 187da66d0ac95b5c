"""`python -m tests.losses.table` writes `docs/losses.md` from the registry; a test holds the page to it."""

from __future__ import annotations

import inspect
from pathlib import Path

from fused_nce.losses.registry import LOSSES, Entry

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "losses.md"
HEAD = """\
# The losses

Generated from `fused_nce/losses` by `python -m tests.losses.table`.

Each returns an `NCEOutput(loss, nce, penalty, stats)` and has an `nn.Module` twin that keeps its settings. What is never held are
the scores of pairs, dot products or Euclidean distances. A critic of another kind (an MLP, concat-and-convolve) makes its scores in
torch, and `mine_dv` and `binary_nce` take them from there. `fused_nce.last_path()` tells which backend ran and why no faster one.

"""  # noqa: E501  (Markdown, at the width of the other pages)


def entries() -> list[Entry]:
    """One of each function, by name."""
    return [LOSSES[name] for name in sorted(LOSSES) if "/" not in name] + [
        entry for name, entry in sorted(LOSSES.items()) if "/" in name and entry.name not in LOSSES
    ]


def page() -> str:
    """The whole page."""
    rows = ["| loss | module | formula | source |", "|---|---|---|---|"]
    parts = []
    for entry in entries():
        formula = entry.formula.replace("|", "\\|")
        rows.append(f"| [`{entry.name}`](#{entry.name}) | `{entry.module.__name__}` | {formula} | {entry.source} |")
        parts.append(f"## {entry.name}\n\n```text\n{signature(entry)}\n\n{inspect.getdoc(entry.function)}\n```\n")
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(parts)


def signature(entry: Entry) -> str:
    """A parameter a line, with its type."""
    lines, keyword = [], False
    for parameter in inspect.signature(entry.function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            lines.append("*")
            keyword = True
        lines.append(str(parameter).replace("'", ""))
    return f"{entry.name}(\n" + "".join(f"    {line},\n" for line in lines) + ") -> NCEOutput"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
