"""`fused-nce COMMAND …`: each command is a function of its own arguments, imported when it is used."""

import argparse
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# name: (module, function, what it does). The function takes the arguments after the name and returns an exit status.
COMMANDS = {
    "train": ("fused_nce.train.command", "main", "train an encoder: fused-nce train amdim --preset digits"),
    "eval": ("fused_nce.cli", "evaluate", "evaluate a run and write its report: fused-nce eval RUN"),
    "fine-tune": ("fused_nce.cli", "fine_tune", "make a run's encoder a classifier: fused-nce fine-tune RUN"),
    "compare": ("fused_nce.train.compare", "main", "one report of several evaluated runs: fused-nce compare RUN RUN"),
    "export": ("fused_nce.cli", "export", "write a run's encoder alone: fused-nce export RUN --out FOLDER"),
    "bench": (
        "fused_nce.bench.command",
        "main",
        "time a loss on this machine: fused-nce bench --loss clip_loss --n 2048",
    ),
    "doctor": ("fused_nce.cli", "doctor", "say what this installation can do, and why not more"),
}

INTERRUPTED = 128 + 2  # as a shell reports a process that SIGINT ended
UNREAD = 128 + 13  # that SIGPIPE ended
USERS, BUG = 2, 1  # exit statuses of an error: whose it is


def main(argv: Sequence[str] | None = None) -> int:
    """The console script.

    What files, settings or the machine cause is one line on stderr and status 2, FUSED_NCE_DEBUG=1 for its traceback; a
    bug shows its traceback, and says that it is one. Where nobody reads any more (`| head`) it ends without a word.
    """
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            _flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return UNREAD


def _flush() -> None:
    if sys.stdout is not None:  # it was closed before the start
        sys.stdout.flush()


def _run(arguments: Sequence[str]) -> int:
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
        _log_to_terminal()
        status: int = getattr(importlib.import_module(module), function)(arguments[1:])
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            _flush()  # raises again unless the pipe is another's: a worker's, say
        if os.environ.get("FUSED_NCE_DEBUG") == "1":
            raise
        return _report(error)
    except KeyboardInterrupt:  # the training loop catches its own, and saves
        print("fused-nce: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status


def _report(error: Exception) -> int:
    from fused_nce.train.files import one_line, printable

    kind = type(error).__name__
    if refusal(error):
        said = printable(one_line(str(error))) or kind
        if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
            said = f"memory: {said}; a smaller optim.batch_size needs less"
        if isinstance(error, ModuleNotFoundError):
            from fused_nce.doctor import missing

            said += "".join(f"; add: pip install {' '.join(missing()[x])}" for x in ("train",) if x in missing())
        print(f"fused-nce: {said}", file=sys.stderr)
        return USERS
    traceback.print_exception(error)
    said = printable(one_line(str(error)))
    print(f"fused-nce: this is a bug of fused_nce, please report it: {kind}: {said}", file=sys.stderr)
    return BUG


def refusal(error: Exception) -> bool:
    """Whether files, settings or the machine are the cause.

    Disk, memory and missing packages are; and what this package raises by a `raise` of its own, the last line of the
    traceback, since it checks what it is given. The same types from a slip in an expression, or from within another
    package, are bugs: each place that hands a user's file to a parser names the file itself (`train.files.reading`).
    """
    if isinstance(error, OSError | ImportError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # of torch on a CPU
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not isinstance(error, ValueError | TypeError | RuntimeError):
        return False
    ours = Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
    return ours and (frames[-1].line or "").startswith("raise")


def _log_to_terminal() -> None:
    """Warnings, each as one line without what would steer the terminal."""
    from fused_nce.train.files import printable

    class Line(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record))

    def ended(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError):  # of TensorBoard's, on a full disk
            logging.getLogger("fused_nce").warning("a thread ended: %s", args.exc_value)
        else:
            threading.__excepthook__(args)

    threading.excepthook = ended
    logger = logging.getLogger()
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(Line("%(message)s"))
        logger.addHandler(handler)


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:9} {help_text}" for name, (_, _, help_text) in COMMANDS.items()]
    return "\n".join(["usage: fused-nce COMMAND [options]", *lines])


def evaluate(argv: Sequence[str]) -> int:
    """`fused-nce eval RUN [options]`."""
    from fused_nce.train.evaluate import run_and_print

    return _of_arguments(run_and_print, "fused-nce eval RUN", argv)


def fine_tune(argv: Sequence[str]) -> int:
    """`fused-nce fine-tune RUN [options]`."""
    from fused_nce.train.teacher import run_and_print

    return _of_arguments(run_and_print, "fused-nce fine-tune RUN", argv)


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
    """`fused-nce doctor [--gpu]`."""
    parser = argparse.ArgumentParser(prog="fused-nce doctor", description="What this installation can do.")
    parser.add_argument("--gpu", action="store_true", help="try every loss on the GPU's backends; minutes")
    options = parser.parse_args(argv)
    from fused_nce import doctor as report

    print(report())
    if not options.gpu:
        return 0
    from fused_nce.bench import card

    print(flush=True)
    return card.main()


if __name__ == "__main__":
    sys.exit(main())
