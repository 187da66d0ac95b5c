"""`python -m bench.pictures`: the site's drawings, into `docs/pictures`; `--check` exits 1 where one is out of date.

Which scores of a loss are positives, negatives or left out is not written down here: each loss's oracle is
differentiated by its scores. A score that the loss wants higher is a positive, one that it wants lower a negative, and
one without a gradient is left out. The colours can be read on a light and on a dark page.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.host import ROOT
from fused_nce.losses.registry import LOSSES, Entry, Size, dense_scores

FOLDER = ROOT / "docs/pictures"
SIZE = Size(n=6, m=9, d=5, p=3)
DRAWN = (
    "info_nce/own hard negatives, row weights",
    "cpc_nce/sampled",
    "info_nce/debiased, joint",
)  # beside the plain ones
POSITIVE, NEGATIVE, OUT, INK, BOX = "#0b78c1", "#e08a4f", "#8a8a8a", "#808080", "#0b78c1"
TINY = 1e-12
KEY = "which scores are positives, negatives and left out"


def drawn() -> dict[str, Entry]:
    """The losses with scores of pairs: each once, and some of its variants."""
    return {
        name: entry for name, entry in sorted(LOSSES.items()) if not entry.closed and ("/" not in name or name in DRAWN)
    }


def file_of(name: str) -> str:
    """The file of a loss's picture."""
    return "".join(c if c.isalnum() or c == "_" else "-" for c in name).replace("--", "-") + ".svg"


def signs(entry: Entry) -> list[Tensor]:
    """For each score matrix of the oracle, (N, M): 1 a positive, −1 a negative, 0 left out."""
    example: dict[str, Any] = entry.example(0, SIZE)
    example = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in example.items()}
    if "penalty" in inspect.signature(entry.oracle).parameters:
        example["penalty"] = 0.0  # it pulls every score to 0, whatever it is
    seen: list[Tensor] = []
    symmetric = []

    def probe(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
        seen.append(dense_scores(q, k, scale).detach().requires_grad_())
        symmetric.append(q is k)
        return seen[-1]

    with mock.patch.object(sys.modules[entry.oracle.__module__], "dense_scores", probe):
        gradients = torch.autograd.grad(entry.oracle(**example), seen)
    found = [(g < -TINY).int() - (g > TINY).int() for g in gradients]
    # A row's product with itself is the square of its norm, of which distances are made: no pair.
    return [x.fill_diagonal_(0) if same else x for x, same in zip(found, symmetric, strict=True)]


def svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    """A drawing that scales with the page."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img"'
    style = f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}"'
    return "\n".join([f"{head} {style}><title>{escape(label)}</title>", *body, "</svg>\n"])


def mask_picture(name: str, entry: Entry) -> str:
    """The score matrices side by side, each square one score, and the key below."""
    cell, gap, top = 17, 36, 22
    body, x = [], 4
    matrices = signs(entry)
    for matrix in matrices:
        body.append(f'<text x="{x}" y="14">{matrix.shape[0]} rows × {matrix.shape[1]} columns</text>')
        for i, row in enumerate(matrix.tolist()):
            for j, sign in enumerate(row):
                paint = {
                    1: f'fill="{POSITIVE}"',
                    -1: f'fill="{NEGATIVE}"',
                    0: f'fill="none" stroke="{OUT}" stroke-opacity=".45"',
                }
                body.append(
                    f'<rect x="{x + j * cell}" y="{top + i * cell}" width="14" height="14" rx="2" {paint[sign]}/>'
                )
        x += matrix.shape[1] * cell + gap
    bottom = top + max(m.shape[0] for m in matrices) * cell + 12
    at = 4
    for text, colour in (("positive", f'fill="{POSITIVE}"'), ("negative", f'fill="{NEGATIVE}"'),
                        ("left out", f'fill="none" stroke="{OUT}"')):  # fmt: skip
        body.append(f'<rect x="{at}" y="{bottom}" width="12" height="12" rx="2" {colour}/>')
        body.append(f'<text x="{at + 18}" y="{bottom + 10}">{text}</text>')
        at += 86
    return svg(max(x - gap + 6, at), bottom + 20, body, f"{name}: {KEY}")


# ---- the flow of data: boxes on a grid, and arrows between them ---------------------------------------------------

Flow = tuple[dict[str, tuple[float, float, str]], list[tuple[str, str, str]], str]
FLOWS: dict[str, Flow] = {
    "sweep": (
        {"q": (0, 0, "q|N × D"), "k": (0, 1.4, "k|M × D"), "tile": (1, 0.7, "score tile|s = scale · q kᵀ"),
         "t": (2, 0.7, "transform|clip, bias"), "fold": (3, 0.7, "fold|statistics of rows"),
         "tail": (4, 0.7, "tail|loss, dL/d statistic"), "w": (3, 2.1, "weights of the tile|w = dL/ds"),
         "d": (1.6, 2.1, "gradients|dq += w k, dk += wᵀ q")},
        [("q", "tile", ""), ("k", "tile", ""), ("tile", "t", ""), ("t", "fold", ""), ("fold", "tail", ""),
         ("tail", "w", ""), ("t", "w", ""), ("w", "d", "")],
        "One sweep: tiles become statistics, the tail makes them the loss, and the same tiles give the gradients",
    ),
    "layers": (
        {"losses": (0, 0, "losses|formula → spec + tail"), "engine": (1.2, 0, "engine|tile_loss, tile_stats"),
         "dispatch": (2.4, 0, "dispatch|why_not → backend"), "cpu": (3.7, -1, "cpu|C++, AVX2, AVX-512"),
         "triton": (3.7, 0, "triton, cuda|NVIDIA GPUs"), "chunked": (3.7, 1, "chunked|plain torch, any device")},
        [("losses", "engine", ""), ("engine", "dispatch", ""), ("dispatch", "cpu", ""), ("dispatch", "triton", ""),
         ("dispatch", "chunked", "")],
        "A loss is a spec and a tail; the dispatcher asks each backend why it cannot, and takes the first that can",
    ),
    "ring": (
        {"a": (0, 0, "process 0|rows 0, keys 0"), "b": (1.5, 0, "process 1|rows 1, keys 1"),
         "c": (1.5, 1.5, "process 2|rows 2, keys 2"), "d": (0, 1.5, "process 3|rows 3, keys 3")},
        [("a", "b", "keys"), ("b", "c", "keys"), ("c", "d", "keys"), ("d", "a", "keys")],
        "A ring: rows stay, keys and their gradients go round; after as many steps as processes each is home again",
    ),
    "cache": (
        {"x": (0, 0.7, "images in parts"), "e": (1, 0.7, "encoder|no graph"), "z": (2, 0.7, "all features|as leaves"),
         "l": (3, 0.7, "loss of all|dL/d features"), "r": (3, 2, "encoder again|a part, with a graph"),
         "p": (1.5, 2, "parameters' gradients")},
        [("x", "e", ""), ("e", "z", ""), ("z", "l", ""), ("l", "r", ""), ("r", "p", "")],
        "GradientCache: features of all parts first, one loss over all of them, then each part again with its gradient",
    ),
}  # fmt: skip


def flow_picture(name: str) -> str:
    """Boxes of two lines, arrows from edge to edge."""
    boxes, arrows, title = FLOWS[name]
    w, h, step_x, step_y = 152.0, 46.0, 186.0, 66.0
    low = min(y for _, y, _ in boxes.values())
    centre = {key: (x * step_x + w / 2 + 4, (y - low) * step_y + h / 2 + 4) for key, (x, y, _) in boxes.items()}
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
    body = [f'<defs><marker id="a" {size}><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>']
    for start, end, text in arrows:
        (x0, y0), (x1, y1) = _edge(centre[start], centre[end], w, h), _edge(centre[end], centre[start], w, h)
        body.append(
            f'<line x1="{x0:.0f}" y1="{y0:.0f}" x2="{x1:.0f}" y2="{y1:.0f}" stroke="{INK}" stroke-width="1.4" '
            'marker-end="url(#a)"/>'
        )
        if text:
            body.append(f'<text x="{(x0 + x1) / 2 + 6:.0f}" y="{(y0 + y1) / 2 - 6:.0f}" font-size="11">{text}</text>')
    for key, (_, _, text) in boxes.items():
        x, y = centre[key]
        body.append(
            f'<rect x="{x - w / 2:.0f}" y="{y - h / 2:.0f}" width="{w:g}" height="{h:g}" rx="7" fill="{BOX}" '
            f'fill-opacity=".09" stroke="{BOX}"/>'
        )
        lines = text.split("|")
        for i, line in enumerate(lines):
            weight = ' font-weight="600"' if i == 0 else ""
            body.append(
                f'<text x="{x:.0f}" y="{y + 4 + (i - (len(lines) - 1) / 2) * 16:.0f}" text-anchor="middle"{weight}>'
                f"{escape(line)}</text>"
            )
    return svg(
        max(x for x, _ in centre.values()) + w / 2 + 4, max(y for _, y in centre.values()) + h / 2 + 4, body, title
    )


def _edge(of: tuple[float, float], towards: tuple[float, float], w: float, h: float) -> tuple[float, float]:
    """Where the line from a box's centre leaves the box."""
    dx, dy = towards[0] - of[0], towards[1] - of[1]
    share = min(w / 2 / abs(dx) if dx else 9e9, h / 2 / abs(dy) if dy else 9e9)
    return of[0] + dx * share, of[1] + dy * share


def pictures() -> Iterator[tuple[str, str]]:
    """File name and content of each."""
    for name, entry in drawn().items():
        yield file_of(name), mask_picture(name, entry)
    for name in FLOWS:
        yield f"flow-{name}.svg", flow_picture(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw or compare; 1 where one differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where a file differs")
    options = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    wanted = dict(pictures())
    there = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
    stale = sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))
    for name in stale:
        if not options.check:
            (FOLDER / name).unlink(missing_ok=True)
            if name in wanted:
                (FOLDER / name).write_text(wanted[name], encoding="utf-8")
        print(f"docs/pictures/{name}: {'differs' if options.check else 'written'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
