"""`python -m tests.repro '<json>'`: one case of the fuzz, alone. Prints every η; exit status 1 if one exceeds 1."""

from __future__ import annotations

import sys

from .cases import can_run, load, run


def main(text: str) -> int:
    """Run the case and say how far each result is from the oracle, in units of its budget."""
    case = load(text)
    reason = can_run(case)
    if reason is not None:
        print(f"{case.backend} cannot run this: {reason}")
        return 2
    etas = run(case)
    for name, value in etas.items():
        print(f"{name:25} eta = {value:.3g}{'   FAILED' if not value <= 1 else ''}")
    return int(not all(value <= 1 for value in etas.values()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m tests.repro '<json>', got {len(sys.argv) - 1} arguments")
    sys.exit(main(sys.argv[1]))
