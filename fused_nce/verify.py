"""Is the loss that I swap in the one I had? Value, gradients, time and memory of both, on the user's own batch."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_nce.core import checks
from fused_nce.measure import peak_bytes

Loss = Callable[..., Any]
PROBES = 2  # how often the inputs are moved by a rounding; one alone can leave a single number where it was


class Difference(NamedTuple):
    """How far one result is from upstream's."""

    name: str  # "loss", or "gradient of input 0"
    largest: float  # max |upstream|
    relative: float  # max |ours − upstream| / largest; inf where only ours is not zero, NaN where either is not finite
    roundings: float  # max |ours − upstream| / what one rounding of the inputs does to upstream's own result


class Cost(NamedTuple):
    """One loss with its gradients."""

    value: float  # the loss
    time_ms: float  # median
    peak_mib: float | None  # highest beyond what was held before, gradients included; None where it cannot be measured


class Verification(NamedTuple):
    """What `verify` found; `print` shows it as a table."""

    differences: tuple[Difference, ...]
    upstream: Cost
    ours: Cost
    memory: str  # how the peaks were measured, or why they were not

    @property
    def worst(self) -> float:
        """The largest difference in roundings; NaN if any is."""
        found = [row.roundings for row in self.differences]
        return float("nan") if any(x != x for x in found) else max(found)

    def __str__(self) -> str:
        lines = [f"{'':24}{'largest':>12}{'difference':>12}{'roundings':>12}"]
        lines += [f"{x.name:24}{x.largest:12.4g}{x.relative:12.2g}{x.roundings:12.2g}" for x in self.differences]
        lines += ["", f"{'':24}{'upstream':>12}{'ours':>12}"]
        for name, key, digits in (
            ("loss", "value", 6),
            ("time, ms", "time_ms", 4),
            ("peak memory, MiB", "peak_mib", 4),
        ):
            pair = (getattr(self.upstream, key), getattr(self.ours, key))
            lines.append(f"{name:24}" + "".join(f"{'-' if x is None else format(x, f'.{digits}g'):>12}" for x in pair))
        return "\n".join([*lines, "", f"memory: {self.memory}"])


def verify(
    upstream_loss: Loss,
    ours: Loss,
    *inputs: Any,
    repeats: int = 5,
    within: float | None = None,
    show: bool = True,
) -> Verification:
    """Compare two losses on copies of one batch; neither the inputs, the losses' state nor the random state change.

    The unit of a difference is measured, not assumed: every float input is moved by one unit in its last place, up or
    down at random, and the change of upstream's own result is what its inputs' dtype leaves undetermined. A handful of
    roundings is agreement; a wrong formula is off by thousands.

    Args:
        upstream_loss: called as upstream_loss(*inputs); a module is copied, its state (a memory bank) included.
        ours: the same, and drawn from the same random state.
        inputs: the arguments, tensors or tuples, lists and dicts of them, which count one by one. Gradients are
            compared of the tensors that require one; if none does, of all float ones.
        repeats: timed runs of each, interleaved, after one that is not timed.
        within: raise where a difference is above so many roundings; None never raises.
        show: print the table.

    Returns:
        Verification. A loss may return a tensor, an `NCEOutput` (its `loss`), or a dict, tuple or list, whose float
        tensors are summed, as trainers do.

    Raises:
        ValueError: for no float tensor among the inputs, repeats < 1, or under `within` for a difference above it.
        TypeError: for a loss that returns no float tensor.

    Example:
        ```
        q, k = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
        plain = lambda q, k: torch.nn.functional.cross_entropy(q @ k.T / 0.1, torch.arange(8))
        verify(plain, info_nce, q, k)
        ```
    """
    checks.checked_int("repeats", repeats, at_least=1)
    leaves, where = pytree.tree_flatten((inputs, {}))
    upstream_loss, ours, inputs = of_leaves(upstream_loss, where), of_leaves(ours, where), tuple(leaves)
    wanted = _wanted(inputs)
    state = torch.random.get_rng_state()
    devices = sorted({x.device.index for x in inputs if isinstance(x, Tensor) and x.is_cuda})
    with torch.random.fork_rng(devices):
        differences, values = compare(upstream_loss, ours, inputs, wanted, state)
        times = [[_timed(loss, inputs, wanted, state) for loss in (upstream_loss, ours)] for _ in range(repeats)]
        peaks = [_peak_mib(loss, inputs, wanted, state) for loss in (upstream_loss, ours)]
    costs = [Cost(x, statistics.median(row[i] for row in times), peaks[i]) for i, x in enumerate(values)]
    result = Verification(differences, costs[0], costs[1], _how(inputs, peaks))
    if show:
        print(result)
    check_within(differences, within)
    return result


def compare(
    upstream_loss: Loss, ours: Loss, inputs: Sequence[Any], wanted: Sequence[int], state: Tensor
) -> tuple[tuple[Difference, ...], tuple[float, float]]:
    """The differences, of the loss and of the gradients by the inputs `wanted`, and both values.

    Modules are copied first, other callables are called as they are. `state` is torch's, from which both draw.
    """
    found = [_run(loss, inputs, wanted, state) for loss in (upstream_loss, ours)]
    moved = [_run(upstream_loss, _nudged(inputs, seed), wanted, state) for seed in range(PROBES)]
    names = ["loss", *(f"gradient of input {i}" for i in wanted)]
    rows = zip(names, *found, *moved, strict=True)
    differences = tuple(_difference(name, theirs, mine, near) for name, theirs, mine, *near in rows)
    return differences, (float(found[0][0]), float(found[1][0]))


class _OfLeaves(nn.Module):
    """A module of the leaves of its arguments; a module, so that `compare` copies its state."""

    def __init__(self, loss: nn.Module, where: pytree.TreeSpec) -> None:
        super().__init__()
        self.loss, self.where = loss, where

    def forward(self, *leaves: Any) -> Any:
        """The loss."""
        return _call(self.loss, self.where, *leaves)


def _call(loss: Loss, where: pytree.TreeSpec, *leaves: Any) -> Any:
    args, options = pytree.tree_unflatten(leaves, where)
    return loss(*args, **options)


def of_leaves(loss: Loss, where: pytree.TreeSpec) -> Loss:
    """The loss as a function of the leaves of (args, options); a module stays one."""
    return _OfLeaves(loss, where) if isinstance(loss, nn.Module) else functools.partial(_call, loss, where)


def check_within(differences: Sequence[Difference], within: float | None) -> None:
    """None above so many roundings.

    Raises:
        ValueError: naming the worst.
    """
    worst = max(differences, key=lambda x: float("inf") if x.roundings != x.roundings else x.roundings)
    if within is not None and not worst.roundings <= within:
        raise ValueError(
            f"ours: {worst.name} differs by {worst.relative:.2g} of its largest value, "
            f"{worst.roundings:.3g} roundings, need <= {within:g}"
        )


def _wanted(inputs: Sequence[Any]) -> list[int]:
    """The places of the inputs whose gradients are compared."""
    floats = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
    if not floats:
        raise ValueError(f"inputs: got {len(inputs)} arguments without a float tensor, need at least one")
    return [i for i in floats if inputs[i].requires_grad] or floats


def _copied(inputs: Sequence[Any], wanted: Sequence[int]) -> list[Any]:
    return [
        x.detach().clone().requires_grad_(i in wanted) if isinstance(x, Tensor) else copy.deepcopy(x)
        for i, x in enumerate(inputs)
    ]


def _nudged(inputs: Sequence[Any], seed: int) -> list[Any]:
    """The inputs with every float a unit in its last place up or down."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(x: Tensor) -> Tensor:
        up = torch.randint(2, x.shape, generator=generator).to(x.device).mul(2).sub(1)
        return (x.double() * (1 + _eps(x) * up)).to(x.dtype)

    return [nudge(x.detach()) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def _eps(x: Tensor) -> float:
    """A unit in the last place of what a loss sees of x: under autocast it may see 16 bits."""
    kind, eps = x.device.type, torch.finfo(x.dtype).eps
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps) if cast else eps  # fault: verify-float32-roundings


def _total(out: Any) -> Tensor:
    """The number that is minimised."""
    out = getattr(out, "loss", out)
    if isinstance(out, Mapping):
        out = list(out.values())
    parts = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
    parts = [x for x in parts if isinstance(x, Tensor) and x.is_floating_point()]
    if not parts:
        raise TypeError(f"loss: got {type(out).__name__} from it, need a float tensor, or a dict or tuple with one")
    return torch.stack([x.sum() for x in parts]).sum()


def _prepared(loss: Loss, inputs: Sequence[Any], wanted: Sequence[int], state: Tensor) -> Callable[[], list[Tensor]]:
    """One step from copies made now: the loss, and the wanted gradients (zeros for an input that has none)."""
    loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss
    arguments = _copied(inputs, wanted)
    leaves = [arguments[i] for i in wanted]
    torch.random.set_rng_state(state)

    def step() -> list[Tensor]:
        with torch.enable_grad():
            total = _total(loss(*arguments))
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [total.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]

    return step


def _run(loss: Loss, inputs: Sequence[Any], wanted: Sequence[int], state: Tensor) -> list[Tensor]:
    return _prepared(loss, inputs, wanted, state)()


def _difference(name: str, upstream: Tensor, ours: Tensor, near: Sequence[Tensor]) -> Difference:
    if upstream.shape != ours.shape:  # a broadcast would hide it
        raise ValueError(f"ours: got {name} of shape {tuple(ours.shape)}, need upstream's {tuple(upstream.shape)}")
    exact = upstream.double()
    largest = float(exact.abs().max())
    error = float((ours.double() - exact).abs().max())
    moved = max(float((x.double() - exact).abs().max()) for x in near)
    eps = max(_eps(x) for x in (upstream, ours))  # bfloat16 losses hide what a nudge does
    unit = max(moved, eps * largest)
    return Difference(name, largest, _ratio(error, largest), _ratio(error, unit))


def _ratio(error: float, unit: float) -> float:
    return error / unit if unit else 0.0 if error == 0 else float("inf") if error == error else error


# ---- time and memory --------------------------------------------------------------------------------------------


def _synchronize(inputs: Sequence[Any]) -> None:
    for x in inputs:
        if isinstance(x, Tensor) and x.is_cuda:
            torch.cuda.synchronize(x.device)


def _timed(loss: Loss, inputs: Sequence[Any], wanted: Sequence[int], state: Tensor) -> float:
    """Milliseconds of one step."""
    step = _prepared(loss, inputs, wanted, state)
    _synchronize(inputs)
    start = time.perf_counter()
    step()
    _synchronize(inputs)
    return 1e3 * (time.perf_counter() - start)


def _how(inputs: Sequence[Any], peaks: Sequence[float | None]) -> str:
    if any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        return "torch's allocator on the GPU"
    if None in peaks:
        return "not measured: this system has no resettable high-water mark of a process"
    return "high-water mark of the process above what it held before the step, other threads' memory included"


def _peak_mib(loss: Loss, inputs: Sequence[Any], wanted: Sequence[int], state: Tensor) -> float | None:
    """The highest memory of one step beyond what was held before it."""
    step = _prepared(loss, inputs, wanted, state)
    device = next((x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda), None)
    if device is not None:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return float(torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        return peak_bytes(step) / 2**20
    except (OSError, AttributeError, TypeError):
        return None
