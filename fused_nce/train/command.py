"""`fused-nce train`: settings from preset, YAML and command line, in that order, then the loop."""

import difflib
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_nce.train import config, methods
from fused_nce.train.files import named, printable
from fused_nce.train.machine import slurm, torchrun
from fused_nce.train.method import Method
from fused_nce.train.monitor import journal
from fused_nce.train.saving import checkpoint, lock

SHORT = {
    "--epochs": "--optim.epochs",
    "--lr": "--optim.lr",
    "--batch-size": "--optim.batch_size",
    "--negatives": "--scale.negatives",
    "--checkpoint-activations": "--scale.checkpoint_activations",
    "--sync-norm": "--scale.sync_norm",
    "--max-steps": "--run.max_steps",
    "--max-minutes": "--run.max_minutes",
}

DEVICE = (
    "a GPU that torch sees is used, the first of several; CUDA_VISIBLE_DEVICES=1 takes the second, "
    'CUDA_VISIBLE_DEVICES="" the CPU, and torchrun starts a process on each of several'
)

# As accelerate reads them; on a CPU `accelerate launch` starts its processes by MPI.
RANKS = {
    "RANK": "WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_RANK": "MV2_COMM_WORLD_SIZE",
}


def main(argv: Sequence[str]) -> int:
    """Run `fused-nce train METHOD [options]`.

    Returns:
        0 if it finished or was interrupted (a checkpoint is saved), 1 if the loss was not finite for too long.

    Raises:
        ValueError: for settings, data or a run that cannot be used.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: fused-nce train {{{','.join(methods.METHODS)}}} [options]; add --help for the options")
        return 0
    slurm.join()
    start = _parse(argv[0] if argv else None, argv[1:])
    settings, run_dir, resume = start[:3]
    first = _first_process()
    logging.getLogger("fused_nce").setLevel(logging.INFO if first else logging.WARNING)

    from fused_nce.train.loop import Diverged, Trainer
    from fused_nce.train.words import describe

    if first:
        print(printable(describe(settings)), flush=True)
    trainer = None
    try:
        trainer = Trainer(settings, run_dir, resume=resume, other_data="data" in start.allowed, profile=start.profile)
        if resume and first:
            config.save(settings, run_dir)
        reason = trainer.run()
        trainer.close()
    except Diverged as error:
        print(f"fused-nce: {error}", file=sys.stderr)
        return 1
    except BaseException:  # Ctrl-C while the images are read, too
        if first and not resume and (trainer is None or trainer.step == 0):
            _clear(run_dir, start.made)
        raise
    finally:
        lock.release(run_dir, refused=trainer is None)
    if first:
        done = f"{reason} at step {trainer.step} after {trainer.time_s:.0f} s{lost(trainer)}"
        print(printable(f"{done}; run saved in {run_dir}"), flush=True)
        if trainer.profile is not None:
            print("", trainer.profile.table(), sep="\n", flush=True)
    if trainer.preempted:
        slurm.queue_again(trainer.interrupt.preempted, first)
    return 0


def _clear(run_dir: Path, made: bool) -> None:
    """Nothing was trained: the corrected command must not find a run there."""
    if checkpoint.steps(run_dir):
        return
    if made:
        shutil.rmtree(run_dir, ignore_errors=True)
    else:
        (run_dir / config.CONFIG_NAME).unlink(missing_ok=True)


def lost(trainer: Any) -> str:
    """What did not go into the weights, in words; empty if everything did."""
    parts = []
    if trainer.skipped:
        parts.append(f"{trainer.skipped} of {trainer.step} updates skipped (loss or gradient not finite)")
    if trainer.probes_skipped:
        parts.append(f"the online probes skipped {trainer.probes_skipped}")
    if trainer.loader.damaged:
        parts.append(f"{trainer.loader.damaged} {trainer.loader.kind} could not be read")
    if trainer.saves.made_anew is not None:
        parts.append(f"its folder was deleted and made anew at step {trainer.saves.made_anew}, without the log before")
    return "".join(f", {part}" for part in parts)


class Start(NamedTuple):
    """What a command asks for."""

    settings: Method
    run_dir: Path
    resume: bool
    allowed: list[str]  # settings that a resume may change
    made: bool  # the folder is new
    profile: bool


def parse(name: str | None, argv: Sequence[str]) -> tuple[Method, Path, bool]:
    """The settings, the run's folder (made, with `config.yaml` in it), and whether to resume.

    Args:
        name: of the method.
        argv: what follows it.

    Raises:
        ValueError: for an unknown method or preset, a bad setting, a folder that holds a run already or that another
            process trains in, or a resume that would change the run.
    """
    return _parse(name, argv)[:3]


def _parse(name: str | None, argv: Sequence[str]) -> Start:
    method = methods.get(name)
    parser = _parser(method)
    argv = [_long(word) for word in argv]
    values = parser.parse_args(argv)
    if values.preset not in method.presets:
        raise ValueError(f"preset: must be one of {', '.join(method.presets)}, got {values.preset!r}")
    known = config.flatten(config.to_dict(method()))
    for name in values.allow_changed:
        if name not in known:
            near = [f"did you mean {other}?" for other in difflib.get_close_matches(name, known, 1)]
            raise ValueError(f"--allow-changed: {name} is no setting; {(near or ['--help lists them'])[0]}")
    if values.resume is not None and (values.out is not None or values.overwrite or values.go_on):
        raise ValueError(f"resume: goes on in {values.resume} itself; leave out --out, --overwrite and --go-on")
    if values.go_on and values.overwrite:
        raise ValueError("--go-on: keeps the run that --out holds; leave out --overwrite")
    if values.resume is not None:
        return _resumed(method, parser, argv, Path(values.resume), values)
    parser.set_defaults(config.flatten(method.presets[values.preset]))
    values = parser.parse_args(argv)
    settings = config.instantiate(method, parser, values)
    run_dir = named(values.out or f"runs/{method.method}-{settings.preset}")
    # By torchrun after a process was lost, or by SLURM after the job was preempted; what another command began never
    # goes on unasked. Refusals, --overwrite and the launch's mark all come after the processes have agreed.
    mine = values.go_on or torchrun.goes_on(run_dir) or slurm.goes_on(run_dir)
    again, saved = torchrun.agreed(mine, any((run_dir / "checkpoints").glob("step_*")))
    wait_s = lock.LEASE_S if again else 0.0
    if again and saved:
        start = _resumed(method, parser, [word for word in argv if word != "--overwrite"], run_dir, values, wait_s)
        if _first_process():
            torchrun.began(run_dir)
        return start
    if not _first_process():
        return Start(settings, run_dir, False, [], False, values.profile)
    if values.go_on and (run_dir / config.CONFIG_NAME).exists():  # a run that had no checkpoint yet begins anew
        _refuse_changed(_of_method(method, run_dir), settings, run_dir, values.allow_changed)
    made = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    held = lock.take(run_dir, wait_s)
    if (run_dir / config.CONFIG_NAME).exists() and not again and not (held.left_behind and not _began(run_dir)):
        lock.release(run_dir, refused=True)
        if not values.overwrite:
            torchrun.refused(run_dir)
            raise ValueError(
                f"out: {run_dir} holds a run already; use --resume {run_dir}, --overwrite, or another --out"
            )
        aside = run_dir.with_name(f"{run_dir.name}.replaced-{time.strftime('%Y%m%d-%H%M%S')}")
        run_dir.rename(aside)
        print(printable(f"moved the run that {run_dir} held to {aside}"))
        made = True
        run_dir.mkdir(parents=True)
        lock.take(run_dir)
    config.save(settings, run_dir)
    torchrun.began(run_dir)
    slurm.began(run_dir)
    return Start(settings, run_dir, False, [], made, values.profile)


def _began(run_dir: Path) -> bool:
    """Whether the trainer that was killed in a folder had come to a first line of its log, or to a checkpoint."""
    log = run_dir / journal.LOG_NAME
    return bool(checkpoint.steps(run_dir)) or (log.is_file() and log.stat().st_size > 0)


def _long(word: str) -> str:
    """`--epochs=3` to `--optim.epochs=3`."""
    name, equals, value = word.partition("=")
    return SHORT.get(name, name) + equals + value


def _resumed(
    method: type[Method], parser: Any, argv: Sequence[str], run_dir: Path, values: Any, wait_s: float = 0.0
) -> Start:
    saved = _of_method(method, run_dir)
    checkpoint.newest(run_dir)
    parser.set_defaults({k: v for k, v in config.flatten(config.to_dict(saved)).items() if k != "method"})
    settings = config.instantiate(method, parser, parser.parse_args(argv))
    _refuse_changed(saved, settings, run_dir, values.allow_changed)
    if _first_process():
        lock.take(run_dir, wait_s)
    return Start(settings, run_dir, True, values.allow_changed, False, values.profile)


def _of_method(method: type[Method], run_dir: Path) -> Method:
    saved = config.load(run_dir)
    if saved.method != method.method:
        raise ValueError(f"resume: {run_dir} is a run of {saved.method}; got method {method.method}, need the same")
    return saved


def _refuse_changed(saved: Method, settings: Method, run_dir: Path, allowed: Sequence[str]) -> None:
    changed = [line for line in config.differences(saved, settings) if line.split(":")[0] not in allowed]
    if changed:
        raise ValueError(
            f"resume: the settings differ from those of {run_dir} ({'; '.join(changed)}); leave them out, or add "
            f"--allow-changed {' '.join(line.split(':')[0] for line in changed)}"
        )


def _first_process() -> bool:
    """Whether this process looks after the folder; torchrun and `slurm.join` set RANK, MPI one of its own.

    A rank that is left in the environment, by an MPI job around this run say, is none of a run of one process.
    """
    for rank, size in RANKS.items():
        if rank in os.environ and size in os.environ:
            return os.environ[rank] == "0" or os.environ[size] == "1"
    return True


def _parser(method: type[Method]) -> Any:
    from fused_nce.train import options

    parser = options.parser(
        prog=f"fused-nce train {method.method}",
        description=f"Train an encoder by {method.title}. Settings come from the preset, then --config, then the "
        f"command line. Presets: {', '.join(method.presets)}. Device: {DEVICE}. Short forms: "
        + ", ".join(f"{short} for {full}" for short, full in SHORT.items()),
    )
    parser.hints = {options.DEVICE: DEVICE, options.BARE: "data are named by --data {}"}
    parser.fixed = {"method": method.method}  # so that a run's own config.yaml may be given
    parser.add_argument("--config", type=str | None, default=None, help="YAML file of settings; may be given again")
    parser.add_argument("--out", type=str | None, default=None, help="folder (default: runs/METHOD-PRESET)")
    parser.add_argument("--resume", type=str | None, default=None, help="folder of a run to continue")
    parser.add_argument("--go-on", action="store_true", help="resume the run that --out holds, or else begin it")
    parser.add_argument("--overwrite", action="store_true", help="move the run that --out holds aside")
    parser.add_argument("--allow-changed", type=str, nargs="*", default=[], help="settings that a resume may change")
    parser.add_argument("--profile", action="store_true", help="train a few updates, and say where their time went")
    parser.add_class_arguments(method)
    return parser
