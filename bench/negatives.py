"""`python -m bench.negatives`: draws `docs/negatives.png`, which negatives meet which rows in `info_nce`."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from bench.host import ROOT

PATH = ROOT / "docs" / "negatives.png"
COLUMNS = [f"{name}{i}" for name in ("k", "h", "q") for i in "₁₂₃"]
# One letter a column; blank: no part of that direction.
ROWS = (
    ("q2k", "q₁ among the keys", "pnnoss   "),
    ("k2q", "k₁ among the queries", "      pnn"),
    ("q2q", "q₁ among the queries", "      xnn"),
    ("k2k", "k₁ among the keys", "xnnxss   "),
)
KINDS = {  # of Okabe and Ito's colours, told apart by a sign too
    "p": ("#009E73", "+", "white", "the positive"),
    "n": ("#56B4E9", "−", "black", "negative, unless an id, a margin or the guide takes it out"),
    "o": (
        "#D55E00",
        "−",
        "white",
        "the row's own hard negative; filter_hard_negatives=True lets margin and guide see it",
    ),
    "s": ("#F6C79B", "−", "black", "with share_hard_negatives=True, unless a margin or the guide takes it out"),
    "x": ("#EEEEEE", "·", "#777777", "never: the row itself, or its own, which are no negatives of its key"),
}


def draw() -> Figure:
    """Rows are directions, columns the rows of the operands."""
    figure = Figure(figsize=(8.6, 4.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 17.2), ylim=(9.8, 0))
    axes.axis("off")
    places = [5.4 + j + 0.45 * (j // 3) for j in range(9)]
    for first, title in ((0, "keys (N, D)"), (3, "hard negatives (N, H, D)"), (6, "queries (N, D)")):
        axes.text(places[first + 1] + 0.45, 0.55, title, ha="center", va="center", fontsize=9, color="#444444")
    for x, name in zip(places, COLUMNS, strict=True):
        axes.text(x + 0.45, 1.25, name, ha="center", va="center", fontsize=12)
    for i, (direction, who, letters) in enumerate(ROWS):
        y = 1.7 + 1.05 * i
        axes.text(0.3, y + 0.45, f'"{direction}"', va="center", fontsize=11, family="monospace", fontweight="bold")
        axes.text(1.9, y + 0.45, who, va="center", fontsize=10)
        for x, letter in zip(places, letters, strict=True):
            if letter != " ":
                _cell(axes, x, y, letter)
    for i, letter in enumerate(KINDS):
        y = 6.3 + 0.66 * i
        _cell(axes, 0.4, y, letter, 0.5)
        axes.text(1.2, y + 0.25, KINDS[letter][3], va="center", fontsize=9.5)
    return figure


def _cell(axes: Axes, x: float, y: float, letter: str, size: float = 0.9) -> None:
    colour, sign, ink, _ = KINDS[letter]
    axes.add_patch(FancyBboxPatch((x, y), size, size, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="none"))
    axes.text(x + size / 2, y + size / 2, sign, ha="center", va="center", color=ink, fontsize=15 * size)


def main() -> None:
    """Write it."""
    draw().savefig(PATH, dpi=130, metadata={"Software": None})
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
