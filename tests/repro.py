"""`python -m tests.repro '<json>'`: one case of the fuzz, alone. Prints every η; exit status 1 if one exceeds 1."""

from __future__ import annotations

import json
import sys

from .cases import can_run, load, run
from .losses import fuzz


def main(text: str) -> int:
    """Run the case, of the engine or a loss, and say how far each result is from the oracle, in units of its budget."""
    fields = json.loads(text)
    if "loss" in fields:
        of_loss = fuzz.load(fields)
        found = fuzz.Judge(of_loss).run(of_loss.backend)
        if found is None:
            print(f"{of_loss.backend} cannot run {of_loss.loss}")
            return 2
        etas = found
    else:
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
