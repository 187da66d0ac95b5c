"""`fused-nce COMMAND …`: each command is a function of its own arguments, imported when it is used."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

# name: (module, function, what it does). The function takes the arguments after the name and returns an exit status.
COMMANDS = {
    "train": ("fused_nce.train.command", "main", "train an encoder: fused-nce train amdim --preset digits"),
    "eval": ("fused_nce.cli", "evaluate", "evaluate a run and write its report: fused-nce eval RUN"),
    "compare": ("fused_nce.train.compare", "main", "one report of several evaluated runs: fused-nce compare RUN RUN"),
    "export": ("fused_nce.cli", "export", "write a run's encoder alone: fused-nce export RUN --out FOLDER"),
    "doctor": ("fused_nce.cli", "doctor", "say what this installation can do, and why not more"),
}

INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. An error is one line on stderr and status 2; FUSED_NCE_DEBUG=1 shows the traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from fused_nce import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"fused-nce: command: must be one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[name]
    try:
        status: int = getattr(importlib.import_module(module), function)(arguments[1:])
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("FUSED_NCE_DEBUG") == "1":
            raise
        print(f"fused-nce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the training loop catches its own, and saves
        print("fused-nce: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:8} {help_text}" for name, (_, _, help_text) in COMMANDS.items()]
    return "\n".join(["usage: fused-nce COMMAND [options]", *lines])


def evaluate(argv: Sequence[str]) -> int:
    """`fused-nce eval RUN [options]`."""
    from fused_nce.train.evaluate import run_and_print

    return _of_arguments(run_and_print, "fused-nce eval RUN", argv)


def export(argv: Sequence[str]) -> int:
    """`fused-nce export RUN --out FOLDER`."""
    from fused_nce.train.export import run_and_print

    return _of_arguments(run_and_print, "fused-nce export RUN --out FOLDER", argv)


def _of_arguments(function: Callable[..., int], usage: str, argv: Sequence[str]) -> int:
    """A function as a command: its arguments are the options."""
    from jsonargparse import auto_cli

    from fused_nce.train.options import Parser

    prog = " ".join(usage.split()[:2])
    status: int = auto_cli(function, args=list(argv), prog=prog, usage=f"{usage} [options]", parser_class=Parser)
    return status


def doctor(argv: Sequence[str]) -> int:
    """`fused-nce doctor`."""
    if argv:
        raise ValueError(f"doctor: takes no arguments, got {' '.join(argv)}")
    from fused_nce import doctor as report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
