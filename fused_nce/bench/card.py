"""`fused-nce doctor --gpu`: every loss on the backends of this card against float64 on the CPU, as a report to send.

The first call of a kind tries its own kernel (`core/first_contact.py`); this tries all that a card may ever be asked
for, and keeps no verdict.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_nce.bench.progress import Progress
from fused_nce.core import first_contact
from fused_nce.losses.registry import LOSSES, Entry, Size

WIDTHS = (16, 72, 200, 256, 1024)  # of a tile and between; beyond 256 kernels read them in panels
DTYPES = tuple(first_contact.TOLERANCE)


class Trial(NamedTuple):
    """One loss on one backend."""

    backend: str
    dtype: str
    loss: str
    width: int
    wrong: str  # what is, in words; "": nothing
    refused: str  # why the backend does not run it; "": it does
    off: float  # the largest difference, in units of the largest entry
    seconds: float  # the compilation of what was not compiled yet included


def trials(device: torch.device, backends: Sequence[str], widths: Sequence[int] = WIDTHS) -> Iterator[Trial]:
    """Every loss × width × dtype × backend, one after the other; a failure ends none of the others."""
    for name, width, dtype, backend in cases(backends, widths):
        begin = time.perf_counter()
        wrong = refused = ""
        off = 0.0
        try:
            wrong, off = compared(LOSSES[name], width, dtype, backend, device)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0][:200]
            _, cannot, why = line.partition("which cannot run this: ")
            wrong, refused = ("", why) if cannot else (f"it raised {type(error).__name__}: {line}", "")
        short = str(dtype).removeprefix("torch.")
        yield Trial(backend, short, name, width, wrong, refused, off, time.perf_counter() - begin)


def cases(backends: Sequence[str], widths: Sequence[int]) -> list[tuple[str, int, torch.dtype, str]]:
    """(loss, width, dtype, backend) of each trial; losses without scores of pairs have no kernel."""
    names = [name for name, entry in LOSSES.items() if not entry.closed]
    return [(name, w, dtype, b) for b in backends for dtype in DTYPES for w in widths for name in names]


def compared(entry: Entry, width: int, dtype: torch.dtype, backend: str, device: torch.device) -> tuple[str, float]:
    """What is wrong, in words, "" where nothing is; and the largest difference.

    Of a few odd rows, and of some more that backends take for many.
    """
    most, sizes = 0.0, ((first_contact.ROWS, first_contact.COLUMNS), first_contact.LARGE)
    for (rows, columns), as_large in zip(sizes, (False, True), strict=True):  # fault: card-large
        off, what = _off(entry, Size(rows, columns, width), dtype, backend, device, as_large)
        allowed = first_contact.TOLERANCE[dtype]
        if not off <= allowed:
            large = " of a problem taken for large" if as_large else ""
            return f"{what}{large} is off by {off:.2g} of the largest, more than {allowed:g}", off
        most = max(most, off)
    return "", most


def _off(
    entry: Entry, size: Size, dtype: torch.dtype, backend: str, device: torch.device, as_large: bool
) -> tuple[float, str]:
    """The largest difference, and of what."""
    drawn = entry.example(0, size)
    narrow = {  # tuples are weights and guides, which have a dtype of their own
        name: _each(x, lambda x: x.to(dtype) if x.dim() else x) if isinstance(x, Tensor) else x
        for name, x in drawn.items()
    }
    exact = _gradients(entry, {name: _each(x, Tensor.double) for name, x in narrow.items()}, "reference")
    there = {name: _each(x, lambda x: x.to(device), floating=False) for name, x in narrow.items()}
    with first_contact.believing(as_large):
        found = _gradients(entry, there, backend)
    return max((first_contact.off(found[name], exact[name]), name) for name in exact)


def _each(x: Any, change: Callable[[Tensor], Tensor], floating: bool = True) -> Any:
    """A change of a tensor, or of every tensor of a tuple; of the floating ones alone, or of all."""
    if isinstance(x, tuple):
        return tuple(_each(part, change, floating) for part in x)
    return change(x) if isinstance(x, Tensor) and (x.is_floating_point() or not floating) else x


def _gradients(entry: Entry, inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """The loss and the gradient of each input that has one."""
    leaves = {name: x.detach().requires_grad_() for name, x in entry.differentiable(inputs).items()}
    loss = entry.function(**inputs | leaves, backend=backend).loss
    made = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss, **{f"the gradient of {name}": x for name, x in zip(leaves, made, strict=True)}}


def report(found: Sequence[Trial]) -> str:
    """A line for each backend and dtype, and one for each trial that failed and each reason why some did not run."""
    lines = []
    for backend, dtype in dict.fromkeys((x.backend, x.dtype) for x in found):
        ran = [x for x in found if (x.backend, x.dtype) == (backend, dtype)]
        right = [x for x in ran if not x.wrong and not x.refused]
        worst = max(right, key=lambda x: x.off, default=None)
        lines.append(
            f"{backend:8} {dtype:9} {len(right)} of {len(ran)} right"
            + (f", worst {worst.off:.1e} of the largest entry ({worst.loss}, width {worst.width})" if worst else "")
            + f", {sum(x.seconds for x in ran):.0f} s"
        )
        lines += [f"  WRONG  {x.loss}, width {x.width}: {x.wrong}" for x in ran if x.wrong]
        refused = Counter(x.refused for x in ran if x.refused)
        lines += [f"  not its own: {count} of {len(ran)}: {reason}" for reason, count in refused.items()]
    wrong = sum(bool(x.wrong) for x in found)
    lines.append(f"{len(found)} trials, {wrong} wrong" + ("; please send this report" if wrong else ""))
    idle = [name for name in dict.fromkeys(x.backend for x in found) if not ran_any(found, name)]
    lines += [f"{name} ran nothing: its kernels are not tested" for name in idle]
    return "\n".join(lines)


def ran_any(found: Sequence[Trial], backend: str) -> bool:
    """Whether a backend took any trial."""
    return any(not x.refused for x in found if x.backend == backend)


def main(backends: Sequence[str] = first_contact.ON, widths: Sequence[int] = WIDTHS) -> int:
    """Print the report of each card; 1 where something is wrong, or nothing ran.

    Raises:
        ValueError: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--gpu: torch sees no GPU here, needed: at least one")
    return max(shown(torch.device("cuda", i), backends, widths) for i in range(torch.cuda.device_count()))


def shown(device: torch.device, backends: Sequence[str], widths: Sequence[int]) -> int:
    """One device's report, printed; 1 where something is wrong, or nothing ran.

    What breaks the card's context would make everything after it look wrong: the first such error is the last trial.
    """
    with Progress(len(cases(backends, widths))) as tick:
        found = []
        for trial in trials(device, backends, widths):
            found.append(trial)
            tick(f"{trial.backend} {trial.dtype} {trial.loss}")
            if "CUDA error" in trial.wrong or "HIP error" in trial.wrong:
                print(f"stopped: {device} is of no use any more to this process")
                break
    print(f"every loss on {device} against float64\n{report(found)}")
    return int(any(trial.wrong for trial in found) or not any(ran_any(found, name) for name in backends))
