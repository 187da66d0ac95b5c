"""A model that processes hold in parts (FSDP2), and its checkpoints, which are written while the training goes on.

Each process writes its parts by `torch.distributed.checkpoint`, as safetensors: no pickle here either. When all have,
the first completes the folder as it does any other, with hashes and a new name. Any number of processes reads it.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_nce.train.files import aside, clear, one_line

PARTS = "shard-*.safetensors"  # as torch names them


def shard(module: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Split every parameter's rows over all processes, in place: they meet for a block's pass, and part again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a `DTensor`, whose own module takes half a second to import."""
    return hasattr(x, "device_mesh")


def whole(x: Any) -> Tensor:
    """A sharded tensor put together, by all processes at once; any other as it is."""
    found: Tensor = x.full_tensor() if is_sharded(x) else x
    return found


def local(x: Any) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    found: Tensor = x.to_local() if is_sharded(x) else x
    return found


def like(value: Tensor, other: Any) -> Tensor:
    """A whole tensor, which every process has, sharded as another is."""
    if not is_sharded(other):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = other.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, other.placements, src_data_rank=None)


def placed(value: Tensor, other: Any) -> Tensor:
    """A result sharded as another tensor is: torch keeps no shards of fewer rows than processes."""
    return cast(Any, value).redistribute(other.device_mesh, other.placements) if is_sharded(other) else value


class Writer:
    """Writes one checkpoint at a time, beside the training.

    Args:
        folder: of the checkpoints.
        complete: called by the first process, in a thread, with the folder that holds the parts of all, the step and
            the state.
        limit: for which a process waits for another; None: torch's own.
    """

    def __init__(
        self, folder: Path, complete: Callable[[Path, int, dict[str, Any]], Any], limit: timedelta | None = None
    ) -> None:
        self.folder, self.complete = folder, complete
        # Its own: the training's messages must not mix with a thread's.
        self.group: Any = dist.new_group(backend="gloo", timeout=limit)
        self.thread, self.pending = ThreadPoolExecutor(1), None
        if dist.get_rank() == 0:
            clear(folder)

    pending: Future[None] | None
    temporary: Path  # of the pending one

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Begin a checkpoint, after `wait` for the one before; its numbers are copied when this returns.

        Raises:
            OSError: the folder cannot be made.
            RuntimeError: the one before was not waited for: its folder and its group are in use.
        """
        if self.pending is not None:
            raise RuntimeError(
                f"checkpoint: step {step} cannot be saved before `wait` for the one that is being written"
            )
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        # A name that was never used: another node may still know one as the folder that is a checkpoint by now.
        temporary, first = aside(self.folder / f"step_{step:08d}"), dist.get_rank() == 0
        failed = None
        if first:
            try:
                clear(self.folder)
                temporary.mkdir(parents=True)
            except OSError as error:
                failed = error
        self.temporary = temporary = self.folder / self._together(failed, temporary.name)
        flat = {f"{name}/{key}": value.detach() for name, values in tensors.items() for key, value in values.items()}
        written: Any = dcp.async_save(
            flat,
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            # What is not sharded is the first process's: running statistics are each process's own.
            planner=dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True),
            process_group=self.group,
        )

        def finish() -> None:
            written.result()
            if first:
                self.complete(temporary, step, state)

        self.pending = self.thread.submit(finish)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: it could not be, on all processes where it could not on one.
        """
        if self.pending is None:
            return
        error, self.pending = self.pending.exception(), None
        try:
            self._together(error)
        except OSError:
            # Every process has ended its part: a full disk gets the room back now, not at the next save.
            if dist.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _together(self, error: BaseException | None, name: str = "") -> str:
        """The first process's name, on all; or raise on all what one has to say."""
        said: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(said, (name, None if error is None else _said(error)), group=self.group)
        if failed := [words for _, words in said if words is not None]:
            raise OSError(failed[0])
        return str(said[0][0])


def _said(error: BaseException) -> str:
    """In one line: torch tells every process of each that failed, with tracebacks."""
    failures: Any = getattr(error, "failures", None)
    return one_line(str(next(iter(failures.values()))[0] if failures else error))


def read(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one name, put together from all parts, on the CPU."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    known: Any = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.empty(x.size, dtype=x.properties.dtype) for key, x in known.items() if key.startswith(f"{name}/")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process reads alone: as asked for
        dcp.load(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"{name}/"): value for key, value in found.items()}
