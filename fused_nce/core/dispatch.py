"""Which backend runs a call, and why not another: one predicate for every choice, the tests and the doctor."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_nce.core import cost, first_contact, workspace
from fused_nce.core.cost import Call
from fused_nce.core.problem import ASIDE, Backend, Needs, Problem
from fused_nce.core.spec import MARGINS, Spec
from fused_nce.core.tails import Tail

# The automatic choice takes the first that can of `automatic`. `reference` must be asked for: it holds the scores.
BACKENDS = ("cpu", "triton", "cuda", "chunked", "reference")
AUTOMATIC = ("cpu", "chunked")  # beside a GPU, where `core/cost.py` puts those of its own first
ANY_CALL = Call()
RING = "ring|"  # begins the backend string of a ring of processes (`core/distributed/ring.py`)

_logger = logging.getLogger("fused_nce")
_logged: set[tuple[str, str]] = set()
_local = threading.local()


class Path(NamedTuple):
    """What ran in a call, and why no kernel or nothing faster did (empty when the fastest ran)."""

    backend: str
    reason: str


@functools.cache
def backend_module(name: str) -> Backend:
    """The module of a backend, imported when first used.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, need one of {BACKENDS}")
    return cast(Backend, importlib.import_module(f"fused_nce.backends.{name}"))


def workspace_bytes(
    spec: Spec, n: int, m: int, d: int, dtype: torch.dtype = torch.float32, backend: str = "cpu", device: str = "cpu"
) -> int:
    """Peak bytes that one call of a backend allocates beside its inputs, outputs and gradients.

    Copies that a loss makes of its inputs first, unit rows for one, come on top: `docs/numerics.md` has their bytes.

    Args:
        spec: what happens to a score.
        n: rows N.
        m: columns M.
        d: width D.
        dtype: of the inputs.
        backend: a name of `fused_nce.backends()`.
        device: the device type whose limit holds.

    Raises:
        ValueError: for an unknown backend, or a dtype that it does not run.

    Example:
        ```
        from fused_nce.core.spec import Block, Spec
        workspace_bytes(Spec(Block(1)), 4096, 4096, 256, backend="chunked")
        ```
    """
    return backend_module(backend).workspace_bytes(spec, n, m, d, dtype.itemsize, workspace.limit_bytes(device))


def why_not(backend: str, spec: Spec, q: Tensor, k: Tensor | None, scale: float | Tensor = 1.0) -> str | None:
    """Why a backend cannot run a spec on these tensors; None if it can. k None is q: one gradient for both roles."""
    module = backend_module(backend)
    used = spec.atoms | ({"self"} if k is None else {"mixed"} if k.dtype != q.dtype else set())
    missing = used - module.ATOMS
    if missing:
        return f"it has no {', '.join(sorted(missing))}"
    reason = module.why_not(spec, q, q if k is None else k)
    return reason or first_contact.why_not(backend, backend_module, spec, q, k, scale)


def planned(call: Call, spec: Spec, q: Tensor, k: Tensor | None) -> Call:
    """With how `triton` takes wide rows and statistics of columns (`backends/triton/plan.py`)."""
    found = backend_module("triton").ways(spec, q, q if k is None else k, k is None)
    return call.planned(bool(spec.columns), *found)


def automatic(q: Tensor, k: Tensor | None, call: Call = ANY_CALL) -> tuple[str, ...]:
    """What the automatic choice tries for these tensors, the fastest first."""
    if q.device.type != "cuda":
        return AUTOMATIC
    n, m, d = q.shape[0], (q if k is None else k).shape[0], q.shape[1]
    return (*cost.fastest_first(call._replace(shared=k is None), n, m, d, q.dtype), "chunked")


def backend_of(problem: Problem, requested: str, call: Call = ANY_CALL) -> tuple[str, Backend]:
    """The name and backend that an op's backend string asks for. Raises as `choose` does."""
    if requested.startswith(RING):
        from fused_nce.core.distributed import ring

        return ring.backend(problem, requested, functools.partial(choose, scale=problem.scale))
    return choose(problem.spec, problem.q, None if problem.shared else problem.k, requested, call, problem.scale)


def whole_loss(
    spec: Spec,
    tail: Tail,
    leaves: tuple[Tensor | None, ...],
    scale: float,
    offset: int,
    normalize: bool,
    parts: bool,
    report_groups: int,
    requested: str,
    twins: bool = False,
) -> tuple[Any, ...] | None:
    """A loss as one function of a backend that has it (`problem.WholeLoss`); None: the ops serve the call.

    `twins`: q and k are two views, whose rows side by side are one tensor in both roles.
    """
    requested = requested or os.environ.get("FUSED_NCE_BACKEND", "")
    q, k = leaves[:2]
    if q is None or type(q) not in (Tensor, Parameter) or requested not in ("", *BACKENDS):
        return None
    if twins:  # which a CPU has no use for; else as what they will be
        if q.device.type == "cpu" and requested in ("", AUTOMATIC[0]):
            return None
        q, k = q.detach()[:1].expand(2 * q.shape[0], -1), None
    name, by = requested or AUTOMATIC[0], scale if leaves[2] is None else leaves[2]
    if not requested and q.device.type != "cpu":
        graph = torch.is_grad_enabled()
        on_q, on_k, on_scale = (graph and x is not None and x.requires_grad for x in leaves[:3])
        needs = Needs(on_q or on_k, False, on_scale) if twins else Needs(on_q, on_k, on_scale)
        name = choose(spec, q, k, "", Call.of("loss", needs, bool(tail.penalty)), by)[0]
    elif name != "cpu" and backend_module(name).whole_loss is not None and why_not(name, spec, q, k, by) is not None:
        return None
    whole = backend_module(name).whole_loss
    if whole is None:
        return None
    found = whole(spec, tail, leaves, scale, offset, normalize, parts, report_groups, twins)
    if found is not None and (requested or q.device.type == "cpu"):
        _local.path = Path(name, "requested" if requested else "")
    return found


def blocks_of(requested: str) -> int:
    """Blocks of keys that the rows meet: one, or one of each process in a ring."""
    if not requested.startswith(RING):
        return 1
    from fused_nce.core.distributed import ring

    return ring.parse(requested)[0].size


def choose(
    spec: Spec, q: Tensor, k: Tensor | None, requested: str, call: Call = ANY_CALL, scale: float | Tensor = 1.0
) -> tuple[str, Backend]:
    """The backend to run: the requested one (the call's, else `FUSED_NCE_BACKEND`), else the fastest that can.

    Args:
        spec: what is asked of the scores.
        q: (N, D) rows.
        k: (M, D) columns; None if they are the rows.
        requested: a backend's name, or "".
        call: which gradients are wanted; its other fields follow from the spec and the tensors.
        scale: of the scores.

    Raises:
        ValueError: for an unknown name, or when a requested backend cannot run this.
        RuntimeError: under `FUSED_NCE_STRICT=1`, when the automatic choice would be a fallback.
    """
    # What no kernel has is no fallback of plain torch's.
    alone = ", ".join(sorted(spec.atoms & MARGINS))
    names = ("chunked",) if alone else automatic(q, k, planned(call, spec, q, k))
    what, alone = f"{spec.code} on {q.device}", f"no kernel has {alone}" if alone else ""
    return choose_by(lambda name: why_not(name, spec, q, k, scale), names, requested, what, alone)


def choose_by(
    why_not: Callable[[str], str | None], names: tuple[str, ...], requested: str, what: str, alone: str = ""
) -> tuple[str, Backend]:
    """The requested backend, else the first of `names` that can; `what` is for a message, `alone` the reason for a path
    that has no faster one and is no fallback. Raises as `choose` does.
    """
    aside = requested.startswith(ASIDE)
    requested = requested.removeprefix(ASIDE) or os.environ.get("FUSED_NCE_BACKEND", "")
    if requested:
        reason = why_not(requested)
        if reason is not None:
            raise ValueError(f"backend: got {requested!r}, which cannot run this: {reason}")
        if not aside:  # fault: path-of-a-part
            _local.path = Path(requested, "requested")
        return requested, backend_module(requested)
    reasons: list[str] = []
    for name in names:
        reason = why_not(name)
        if reason is None:
            _record(name, "; ".join(reasons), alone)
            return name, backend_module(name)
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend can run {what}: {'; '.join(reasons)}")


def last_path() -> Path | None:
    """The backend of this thread's last call and why it was not a faster one; None before the first call."""
    return getattr(_local, "path", None)


def _record(name: str, reason: str, alone: str) -> None:
    _local.path = Path(name, reason or alone)
    if not reason:
        return
    if os.environ.get("FUSED_NCE_STRICT") == "1":  # fault: strict-mode-ignored
        raise RuntimeError(f"FUSED_NCE_STRICT=1 forbids the fallback to {name!r}: {reason}")
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        _logger.warning("using the %r backend: %s", name, reason)
