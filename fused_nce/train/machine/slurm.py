"""A run among SLURM's tasks: `srun fused-nce train …` without torchrun, and a preempted job that goes on by itself.

`srun` starts every process and tells each its place; what torch reads is set from that. Where a job asks for a signal
before its time is up (`#SBATCH --signal=USR1@120`), the run saves and its job is queued again; the same command then
goes on from the newest checkpoint. With `FUSED_NCE_SLURM=0` each task is a run of its own. Variables: SLURM's
documentation of `srun`, "output environment variables".
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections.abc import Mapping, MutableMapping
from pathlib import Path

PREEMPTION = (signal.SIGUSR1, signal.SIGUSR2)  # sent ahead of the end: the first by habit, the second is submitit's
JOB_NAME = "slurm_job"  # in a run's folder: the job that began it
log = logging.getLogger(__name__)


def join(environment: MutableMapping[str, str] = os.environ, devices: int | None = None) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where `srun` started several
    tasks and nothing else did; whether it was so.

    Args:
        environment: of this process.
        devices: GPUs that it sees; None asks torch. Where a task sees one alone, that is its number 0.

    Raises:
        ValueError: for a variable of SLURM's that is missing or no number.
    """
    if environment.get("FUSED_NCE_SLURM") == "0":
        if environment.get("PMI_SIZE", "") == environment.get("SLURM_STEP_NUM_TASKS"):
            for name in ("PMI_RANK", "PMI_SIZE"):  # srun --mpi=pmi2's; accelerate would join the tasks by them
                environment.pop(name, None)
        return False
    size = number(environment, "SLURM_STEP_NUM_TASKS", 1)  # of the step: a batch script outside of srun is one process
    if "RANK" in environment or size <= 1:
        return False
    local = number(environment, "SLURM_LOCALID")
    if devices is None:
        import torch

        devices = torch.cuda.device_count()
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    job, step = number(environment, "SLURM_JOB_ID"), number(environment, "SLURM_STEP_ID", 0)
    tasks = tasks_of_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    made = {
        "RANK": number(environment, "SLURM_PROCID"),
        "WORLD_SIZE": size,
        "LOCAL_RANK": 0 if devices == 1 else local,
        "LOCAL_WORLD_SIZE": tasks[min(number(environment, "SLURM_NODEID", 0), len(tasks) - 1)],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": 20000 + (job * 31 + step) % 10000,  # the same for all tasks, another for another step
    }
    for name, value in made.items():
        environment.setdefault(name, str(value))
    if environment["RANK"] == "0":
        log.warning("SLURM: one run of %d tasks (FUSED_NCE_SLURM=0: a run of each)", size)
    return True


def number(environment: Mapping[str, str], name: str, missing: int | None = None) -> int:
    """A variable of SLURM's.

    Raises:
        ValueError: where it is missing, without a value for that, or no number.
    """
    value = environment.get(name)
    if value is None and missing is not None:
        return missing
    if value is None or not value.isdigit():
        raise ValueError(f"{name}: got {value!r}, need a number, as srun sets it")
    return int(value)


def tasks_of_nodes(text: str) -> list[int]:
    """`8(x2),4` → 8, 8, 4.

    Raises:
        ValueError: for anything else.
    """
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    if None in found:
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: got {text!r}, need counts, such as 8(x2),4")
    return [int(part[1]) for part in found if part is not None for _ in range(int(part[2] or 1))]


def first_host(nodes: str) -> str:
    """`gpu[003-005,9],cpu1` → gpu003; no list is this machine.

    Raises:
        ValueError: for what is no list of hosts.
    """
    if not nodes:
        return "127.0.0.1"
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", host) or nodes[0] == "[":
        raise ValueError(f"SLURM_STEP_NODELIST: got {nodes!r}, need a list of hosts, such as gpu[01-04]")
    return host


def began(run_dir: Path) -> None:
    """Remember the job that begins a run."""
    if "SLURM_JOB_ID" in os.environ:
        (run_dir / JOB_NAME).write_text(os.environ["SLURM_JOB_ID"], encoding="utf-8")


def goes_on(run_dir: Path) -> bool:
    """Whether the job that began a run was queued again, so that the same command is to go on."""
    file, job = run_dir / JOB_NAME, os.environ.get("SLURM_JOB_ID", "")
    again = number(os.environ, "SLURM_RESTART_COUNT", 0) > 0
    return again and file.is_file() and file.read_text(encoding="utf-8") == job


def queue_again(signalled: int | None, first: bool) -> None:
    """After a save that a signal of `PREEMPTION` asked for: the job is run anew.

    The handler that stood before the run's own, such as submitit's, queues it; without one `scontrol` does, asked by
    the first process, and a line says so where it cannot.

    Args:
        signalled: the signal that this process got, None where another did.
        first: whether this is the first process.
    """
    if signalled is not None and callable(signal.getsignal(signalled)):
        signal.raise_signal(signalled)
        return
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or not first:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        error = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as broken:
        error = str(broken)
    if error:
        log.warning("SLURM: job %s is not queued again (%s); --resume goes on by hand", job, error)
    else:
        log.info("SLURM: job %s is queued again", job)
