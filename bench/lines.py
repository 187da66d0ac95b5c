"""`python -m bench.lines`: the lines of the project beside its budget; exits 1 above it. `make lint` runs it."""

from __future__ import annotations

import sys

from bench.host import ROOT

ENDINGS = (".py", ".cpp", ".h", ".inl", ".cu", ".sh", ".html", ".css", ".txt")
BUDGET = {("fused_nce", "csrc", "bench"): 56_800, ("tests",): 37_950}


def lines(folder: str) -> int:
    """Of all source files below it."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS)
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def main() -> int:
    """Print; 1 where there are too many."""
    over = 0
    for folders, budget in BUDGET.items():
        counts = {folder: lines(folder) for folder in folders}
        total = sum(counts.values())
        over += total > budget
        print(f"{' + '.join(f'{folder} {n:,}' for folder, n in counts.items())}: {total:,} of {budget:,} lines")
    if over:
        print("bench/lines.py: more lines than the budget; docs/DESIGN.md says why there is one", file=sys.stderr)
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
