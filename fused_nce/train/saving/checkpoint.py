"""Checkpoints that survive a crash: safetensors and JSON in one folder, verified before use.

`RUN/checkpoints/step_00001234/` holds `*.safetensors`, `state.json` and `MANIFEST.json` (each file's size and SHA-256).
It is written under a temporary name, synced, renamed, and only then named in `LATEST`; a sharded model's has the parts
of each process instead (`sharding`). No pickle is written or read: loading one runs whatever code it holds. The hashes
are ours to check, since safetensors takes a flipped bit as data.
"""

import fnmatch
import hashlib
import json
import logging
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fused_nce.models.base import Model
from fused_nce.train import config as config_module
from fused_nce.train.files import aside, clear, read_json, write_text
from fused_nce.train.method import Method
from fused_nce.train.saving import sharding

log = logging.getLogger("fused_nce")

FOLDER, MANIFEST, STATE, LATEST = "checkpoints", "MANIFEST.json", "state.json", "LATEST"
STEP_NAME = re.compile(r"step_(\d{8,})")

Tensors = dict[str, Tensor]


class CheckpointError(ValueError):
    """No checkpoint of a run can be used."""


def save(run_dir: str | Path, step: int, tensors: dict[str, Tensors], state: dict[str, Any], keep: int) -> Path:
    """Write `step_<step>`, point `LATEST` at it, verify it, then remove those before the newest `keep` whole ones.

    A damaged checkpoint is none of the `keep`. None of a later step is removed: a run that went back reaches it again.

    Args:
        run_dir: folder of the run.
        step: updates done.
        tensors: `{file name without suffix: {key: tensor}}`.
        state: JSON-able.
        keep: how many to leave, at least 2.

    Raises:
        OSError: if the disk is full or not writable; earlier checkpoints are untouched and the temporary is removed.
    """
    target = Path(run_dir) / FOLDER / f"step_{step:08d}"
    temporary = aside(target)
    if target.exists() and damage(target) is None:
        return target  # a run that resumed here and did nothing since
    clear(target.parent)
    try:
        temporary.mkdir(parents=True)
        for name, values in tensors.items():
            write_tensors(values, temporary / f"{name}.safetensors")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return complete(temporary, step, state, keep)


def complete(temporary: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """The rest of `save`, for a folder beside the checkpoints that holds the tensors."""
    root = temporary.parent
    target = root / f"step_{step:08d}"
    try:
        if target.exists() and damage(target) is None:
            shutil.rmtree(temporary)
            return target
        (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
        files = {path.name: fingerprint(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)  # damaged: checked above
        temporary.replace(target)
        _sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if problem := damage(target):
        raise OSError(f"checkpoint {target} did not read back as written: {problem}")
    write_text(root / LATEST, target.name + "\n")
    _sync(root)
    whole = 1
    for old in (path for path in reversed(steps(root.parent)) if int(path.name[5:]) < step):
        if whole >= keep:
            shutil.rmtree(old, ignore_errors=True)
        else:
            whole += damage(old) is None
    return target


class Writer:
    """Checkpoints of a run that its first process writes, each at once.

    Args:
        run_dir: folder of the run.
        keep: how many whole ones to leave.
        first: whether this is that process, which holds the run's lock.
    """

    def __init__(self, run_dir: Path, keep: int, *, first: bool) -> None:
        self.run_dir, self.keep, self.first = run_dir, keep, first
        if first:
            clear(run_dir / FOLDER)

    def save(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any]) -> None:
        """See `save`; all processes may call it."""
        if self.first:
            save(self.run_dir, step, tensors, state, self.keep)

    def wait(self) -> None:
        """Nothing is left to do."""


def plain(values: Tensors) -> Tensors:
    """Tensors as safetensors takes them: on the CPU, contiguous, and each with memory of its own.

    Layers that share a weight have it under two names; both are written.
    """
    found: Tensors = {}
    seen = set()
    for key, value in values.items():
        tensor = sharding.local(value.detach()).cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        found[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def write_tensors(values: Tensors, path: Path, facts: dict[str, str] | None = None) -> None:
    """As safetensors, whole or not at all, `facts` in the header, with the mode of any new file: its own is 0600.

    Raises:
        OSError: if the disk is full or not writable.
    """
    part = aside(path)
    part.touch()
    mode = part.stat().st_mode & 0o777
    try:
        save_file(plain(values), part, facts)
        part.chmod(mode)
        part.replace(path)
    except SafetensorError as error:  # a full disk, too
        raise OSError(f"{path.name}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def steps(run_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; temporary names never match."""
    root = Path(run_dir) / FOLDER
    return sorted((p for p in root.glob("step_*") if STEP_NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def newest(run_dir: str | Path) -> Path:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning.

    Raises:
        CheckpointError: if there is none.
    """
    found = steps(run_dir)
    for path in reversed(found):
        problem = damage(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
    what = f"no whole checkpoint, {len(found)} damaged" if found else "no checkpoint"
    raise CheckpointError(f"run: {run_dir} has {what}; it must be the folder of a training run that saved one")


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: its files against its manifest."""
    try:
        files = read_json(path / MANIFEST)["files"]
        if STATE not in files or not ("model.safetensors" in files or fnmatch.filter(files, sharding.PARTS)):
            return f"{MANIFEST} does not list the model and its state"
        for name, expected in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names a file outside the checkpoint: {name}"
            if not (path / name).is_file():
                return f"{name} is missing"
            if fingerprint(path / name) != expected:
                return f"{name} differs from its SHA-256 or size"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def load_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return read_json(path / STATE)


def load_tensors(path: Path, name: str) -> Tensors:
    """The tensors of one name, "model" say, of a checkpoint, on the CPU."""
    try:
        if not (path / f"{name}.safetensors").exists() and any(path.glob(sharding.PARTS)):
            return sharding.read(path, name)
        return load_file(path / f"{name}.safetensors")
    except Exception as error:  # safetensors raises its own type
        raise CheckpointError(f"checkpoint {path}: {name}.safetensors cannot be read: {error}") from error


def load_into(module: nn.Module, tensors: Tensors, what: str) -> None:
    """Strict load: same keys, shapes and dtypes, or an error that names the first that differs."""
    own = module.state_dict()
    for key in own.keys() | tensors.keys():
        mine, other = own.get(key), tensors.get(key)
        if mine is None or other is None:
            raise CheckpointError(f"{what}: {key} is {'missing' if other is None else 'unknown'}")
        if mine.shape != other.shape or mine.dtype != other.dtype:
            seen = f"{tuple(other.shape)} {other.dtype}"
            raise CheckpointError(f"{what}: {key} is {seen}, the model needs {tuple(mine.shape)} {mine.dtype}")
    module.load_state_dict({key: sharding.like(value, own[key]) for key, value in tensors.items()})


def load_run(run_dir: str | Path) -> tuple[Model, Method, dict[str, Any]]:
    """The newest model of a run, in eval mode, the run's configuration, and the checkpoint's state.

    Raises:
        ValueError: if the folder holds no run, or no whole checkpoint.
    """
    config = config_module.load(run_dir)
    path = newest(run_dir)
    state = load_state(path)
    model = config.build(images=int(state.get("images", 1)))  # fault: bank-one-image
    load_into(model, load_tensors(path, "model"), f"{path}/model.safetensors")
    return model.eval(), config, state


def load_model(run_dir: str | Path) -> tuple[Model, Method]:
    """The first two of `load_run`."""
    return load_run(run_dir)[:2]


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """The moments as `{"<parameter number>.<name>": tensor}`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": v for i, values in state.items() for name, v in values.items() if v is not None}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, name: str = "optimizer") -> None:
    """The inverse of `pack_optimizer`, in the memory format of each parameter; `name` is what an error says.

    A fused step walks a parameter and its moments by address: moments in another memory format would be applied to
    the wrong weights, in silence.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, moment = key.partition(".")
        if not number.isdigit() or int(number) >= len(params):
            raise CheckpointError(f"{name}.safetensors: {key} belongs to none of the {len(params)} parameters")
        like = params[int(number)]
        if value.dim() and value.shape != like.shape:
            raise CheckpointError(f"{name}.safetensors: {key} is {tuple(value.shape)}, not {tuple(like.shape)}")
        # fault: moments-another-memory
        fits = torch.empty_like(like, dtype=value.dtype) if value.dim() else torch.empty_like(value)
        state.setdefault(int(number), {})[moment] = fits.copy_(sharding.like(value, fits))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


class Generators(NamedTuple):
    """The state of this process's random generators."""

    torch: Tensor
    cuda: list[Tensor]  # of this process's own device; none where it uses no GPU
    python: Any
    numpy: Any


def generators() -> Generators:
    """As they are now."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return Generators(torch.get_rng_state(), cuda, random.getstate(), numpy.random.get_state(legacy=True))


def put_back(state: Generators) -> None:
    """As they were then."""
    torch.set_rng_state(state.torch)
    if state.cuda:
        torch.cuda.set_rng_state(state.cuda[0])
    random.setstate(state.python)
    numpy.random.set_state(state.numpy)


def capture_rng() -> dict[str, Any]:
    """The state of the generators as plain JSON, since pickle is never read."""
    now = generators()
    version, words, gauss = now.python
    name, keys, place, has_gauss, cached = now.numpy
    return {
        "torch": _hex(now.torch),
        "cuda": [_hex(state) for state in now.cuda],
        "python": [version, list(words), gauss],
        "numpy": [str(name), [int(k) for k in keys], int(place), int(has_gauss), float(cached)],
    }


def restore_rng(state: dict[str, Any], place: int = 0) -> None:
    """The inverse of `capture_rng`.

    Args:
        state: what it returned; an older one lists all GPUs that its process saw.
        place: of this process on its machine, and so of its GPU in such a list.
    """
    version, words, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    numbers = (name, numpy.array(keys, dtype=numpy.uint32), *rest)
    listed = state["cuda"]
    own = listed[place : place + 1] if len(listed) > 1 else listed
    if torch.cuda.is_initialized() and not own:
        log.warning(
            "the checkpoint has no random state of GPU %d, of %d: what is drawn on it is drawn anew", place, len(listed)
        )
    cuda = [_bytes(text) for text in own if torch.cuda.is_initialized()]
    put_back(Generators(_bytes(state["torch"]), cuda, (version, tuple(words), gauss), numbers))


def _hex(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
