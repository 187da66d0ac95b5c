"""A run among SLURM's tasks: `srun fused-nce train …` without torchrun, and a preempted job that goes on by itself.

`srun` starts every process and tells each its place; what torch reads is set from that. Where a job asks for a signal
before its time is up (`#SBATCH --signal=USR1@120`), the run saves and its job is queued again; the same command then
goes on from the newest checkpoint. Variables: SLURM's documentation of `srun`, "output environment variables".
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
from collections.abc import Mapping, MutableMapping

PREEMPTION = (signal.SIGUSR1, signal.SIGUSR2)  # sent ahead of the end: the first by habit, the second is submitit's
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
    size = number(environment, "SLURM_STEP_NUM_TASKS", 1)  # of the step: a batch script outside of srun is one process
    if "RANK" in environment or size <= 1:
        return False
    local = number(environment, "SLURM_LOCALID")
    if devices is None:
        import torch

        devices = torch.cuda.device_count()
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    job, step = number(environment, "SLURM_JOB_ID"), number(environment, "SLURM_STEP_ID", 0)
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", str(size))
    made = {
        "RANK": number(environment, "SLURM_PROCID"),
        "WORLD_SIZE": size,
        "LOCAL_RANK": 0 if devices == 1 else local,
        "LOCAL_WORLD_SIZE": re.split(r"[(,]", tasks)[0],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": 20000 + (job * 31 + step) % 10000,  # the same for all tasks, another for another step
    }
    for name, value in made.items():
        environment.setdefault(name, str(value))
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


def first_host(nodes: str) -> str:
    """`gpu[003-005,9],cpu1` → gpu003; no list is this machine.

    Raises:
        ValueError: for what is no list of hosts.
    """
    if not nodes:
        return "127.0.0.1"
    found = re.match(r"([\w.-]+)(?:\[(\d+)[^\]]*\]([\w.-]*))?(?:,|$)", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST: got {nodes!r}, need a list of hosts, such as gpu[01-04]")
    return "".join(part or "" for part in found.groups())


def restarted() -> bool:
    """Whether this job was queued again, so that the same command is to go on."""
    return number(os.environ, "SLURM_RESTART_COUNT", 0) > 0


def queue_again(first: bool = True) -> None:
    """After a save that a signal of `PREEMPTION` asked for: the job is run anew.

    A handler that stood before the run's own, such as submitit's, queues it; else `scontrol` does, asked by the first
    process, and a line says so where it cannot.
    """
    for preemption in PREEMPTION:
        if callable(signal.getsignal(preemption)):
            signal.raise_signal(preemption)
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
