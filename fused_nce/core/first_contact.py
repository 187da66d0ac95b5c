"""The first use of a GPU backend: no number of it is believed before a small problem came out right on this very card.

A card, driver, torch, Triton and build that meet for the first time were never seen together by anybody. So the first
call of each spec, dtype, width and kind of scale runs a problem of a few odd rows on the GPU and in float64 on the CPU,
and one of some more rows that backends take for a large one. A verdict is kept in memory and in the user's cache
folder, a file for each such combination; a backend that failed is one that cannot run the call, and says so.
`FUSED_NCE_FIRST_CONTACT=0` believes everything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fused_nce import _extension
from fused_nce._version import __version__
from fused_nce.core import atoms, tails
from fused_nce.core.prefixes import Prefixed
from fused_nce.core.problem import ASIDE, Backend, Gradients, Needs, Problem, Statistics
from fused_nce.core.spec import Bias, Block, Index, Labels, Separate, Several, Spec
from fused_nce.core.tails import Coefficients, Tail

ON = ("cuda", "triton")  # backends with code for one kind of card
ROWS, COLUMNS = 37, 53  # odd, beyond one tile of rows, and no multiple of a vector
# Of what is taken for large: more of both than a walk of 256, and three blocks of as many where rows are columns.
LARGE, LARGE_ITSELF = (261, 277), (549, 549)
MOST_SCORES, MOST_NUMBERS = 1 << 20, 1 << 22  # of a problem of images, and of its q or k: an oracle takes its time
# Of the largest entry of a statistic or gradient. What a wrong kernel gives is off by its own size; what rounds
# differently, by less than this: weights enter 16-bit products in 16 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
TF32_TOLERANCE = TOLERANCE[torch.float16]  # of float32 whose products may be TF32's, of as many digits as float16's
SCALE = 0.9
FAR = 50.0  # of rows of length one: scores have a shift
STEEP = 30.0  # scores' size where e^t overflows without a shift

PLAYED = "cuda"  # the device type that counts as a card; a test has another
_logger = logging.getLogger("fused_nce")
_verdicts: dict[tuple[str, str], str] = {}  # by device; backend, dtypes, width, scale and spec; "" is sound
_failures: Counter[tuple[str, str]] = Counter()  # of trials whose failure may not last
TRIES = 3
_busy = threading.local()
_NONE = torch.empty(0)


def why_not(
    name: str, of: Callable[[str], Backend], spec: Spec, q: Tensor, k: Tensor | None, scale: float | Tensor
) -> str | None:
    """Why a backend is not to be believed with this spec on this card, or None. k None is q; `of` gives backends.

    A call within a trial, or one that is being captured in a CUDA graph, is not tried.
    """
    device = q.device
    if name not in ON or device.type != PLAYED or os.environ.get("FUSED_NCE_FIRST_CONTACT", "1") == "0":
        return None
    there = str(device)
    products = "tf32 " if tf32(q.dtype, q.dtype if k is None else k.dtype) else ""
    key = f"{name} {_short(q)} {'itself' if k is None else _short(k)} {products}{q.shape[1]} {_kind(spec, scale)} "
    key += spec.code
    if (there, key) not in _verdicts:
        if getattr(_busy, "now", False) or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        _verdicts.update({(there, kept): verdict for kept, verdict in _read(path(device)).items()})
    if (there, key) not in _verdicts:  # fault: trial-never
        with torch.inference_mode(False):  # fault: trial-inference
            with torch.device("cpu"):
                tried = problems(spec, q.dtype, None if k is None else k.dtype, q.shape[1], scale)
            found, lasts = trial(of(name), of("reference"), tried, device)
        _failures[there, key] += not lasts
        if not lasts and _failures[there, key] < TRIES:
            return found
        _verdicts[there, key] = found
        if lasts:
            _write(path(device), key, found)
    return _verdicts[there, key] or None


def trial(
    backend: Backend, reference: Backend, tried: tuple[Problem, Problem], device: torch.device
) -> tuple[str, bool]:
    """What a backend gets wrong in `problems`, in words, "" where all is right; and whether that will last.

    Bounded is the oracle's work, in float64 on the CPU, of all tails: a test holds it to 7 GFLOP. Nothing bounds the
    compilation of kernels, those that the call needs and those of other sizes, nor the card's time; neither was timed
    on a card. An exception, of memory that is short for example, may not come again.
    """
    try:
        for p, as_large in zip(tried, (False, True), strict=True):  # fault: trial-large
            tolerance = allowed(p)
            with believing(as_large), torch.no_grad(), torch.autocast(device.type, enabled=False):
                for what, found, right in _compared(p, backend, reference, device):
                    if (difference := off(found, right)) > tolerance:
                        return (
                            f"its first test on this card failed: {what} of {p.spec.code} in {_short(p.q)}"
                            f"{', taken for large,' if as_large else ''} is off by {difference:.2g} of the largest, "
                            f"more than {tolerance:g}",
                            True,
                        )
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        return f"it raised {type(error).__name__} in its first test on this card: {line[:200]}", False
    return "", True


@contextmanager
def believing(as_large: bool = False) -> Iterator[None]:
    """No trial within, in this thread: what runs is one itself, of problems that count as large or not.

    A backward runs in this thread too, rather than in the card's own, which would know nothing of it. Calls of other
    threads go on as ever: how they are cut up, and so their bits, must not depend on what this one does.
    """
    _busy.now, _busy.large = True, as_large
    try:
        with torch.autograd.set_multithreading_enabled(False):  # fault: trial-other-thread
            yield
    finally:
        _busy.now = _busy.large = False


def large() -> bool:
    """Whether backends take what they are given for large: it then meets the kernels that they have for many rows."""
    return getattr(_busy, "large", False)


def _compared(
    p: Problem, backend: Backend, reference: Backend, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what, found, wanted) by the operators and by plain calls, of every tail that fits."""
    exact = _map(p, lambda x: x.double() if x.is_floating_point() else x)
    there, needs = _map(p, lambda x: x.to(device)), Needs(True, not p.shared, True)
    fitting: list[Tail | None] = [*_tails(p.spec)]
    for tail in fitting or [None]:
        wanted = _run(exact, reference, tail, needs)
        yield from _named(p.spec, _run(there, backend, tail, needs), wanted)
        yield from _plain(there, exact, backend, tail)


def tf32(*dtypes: torch.dtype) -> bool:
    """Whether products of these may be TF32's."""
    if torch.float32 not in dtypes or torch.version.hip is not None:
        return False
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def allowed(p: Problem) -> float:
    """The tolerance of a problem: of the coarser dtype, and by how much more its scale makes of a score's rounding."""
    found = max(TOLERANCE[x.dtype] for x in (p.q, p.k))  # fault: trial-mixed-fine
    scale = float(p.scale) / (p.q.shape[1] ** 0.5 if p.spec.unit_norm else 1.0)  # scores' size
    if tf32(p.q.dtype, p.k.dtype):  # fault: trial-tf32-fine
        return max(found, TF32_TOLERANCE) + 2.5e-4 * scale
    return found + 4e-6 * scale


def _kind(spec: Spec, scale: float | Tensor) -> str:
    """What kernels are compiled for, of a scale."""
    if isinstance(scale, Tensor):
        return "tensor"  # fault: trial-number-for-tensor
    return "near" if atoms.shiftless(Problem(_NONE, _NONE, scale, spec, 0)) else "far"


def _scales(spec: Spec, width: int, scale: float | Tensor, exact: bool) -> tuple[float | Tensor, float | Tensor]:
    """Of the small problem and of the large one, of the given scale's kind: where nothing bounds scores and products
    are exact, e^t of the large one's overflows without a shift.
    """
    kind = _kind(spec, scale)
    first = FAR if kind == "far" and spec.unit_norm and spec.clip is None else SCALE
    steep = kind != "near" and spec.clip is None and exact  # fault: trial-never-steep
    second = STEEP * (width**0.5 if spec.unit_norm else 1.0) if steep else first
    return (_number(first), _number(second)) if kind == "tensor" else (first, second)


def problems(
    spec: Spec, q_dtype: torch.dtype, k_dtype: torch.dtype | None, width: int, scale: float | Tensor = SCALE
) -> tuple[Problem, Problem]:
    """A small one for a spec, and one to be taken for large, on the CPU, always the same. k_dtype None: k is q.

    `scale`: a call's, of whose kind theirs are.
    """
    more = LARGE_ITSELF if k_dtype is None else LARGE
    small, large = _scales(spec, width, scale, not tf32(q_dtype, k_dtype or q_dtype))
    one, two = problem(spec, q_dtype, k_dtype, width), problem(spec, q_dtype, k_dtype, width, *more)
    return one._replace(scale=small), two._replace(scale=large)


def problem(
    spec: Spec, q_dtype: torch.dtype, k_dtype: torch.dtype | None, width: int, rows: int = ROWS, columns: int = COLUMNS
) -> Problem:
    """One of so many rows and columns, or as many more as whole images have: scores of size one, repeated ids.

    Of fewer images, two at least, where they would have more than MOST_SCORES or MOST_NUMBERS. Those of 49 columns an
    image and more than 663 features are then fewer rows than two strips of stored weights have (`triton`): no strip but
    the first is tried. At width 2,560 two would take the oracle 12 GFLOP and more, where `trial` has 7.
    """
    layout, g = spec.layout, torch.Generator().manual_seed(0)
    block = layout if isinstance(layout, Block) else Block(1, 1)
    n = -(-rows // block.rows_per_image) * block.rows_per_image
    m = -(-columns // block.n_c) * block.n_c
    shared = k_dtype is None
    if isinstance(layout, Block):
        per_score, per_number = block.rows_per_image * block.n_c, max(block.rows_per_image, block.n_c) * width
        most = max(2, min(math.isqrt(MOST_SCORES // per_score), MOST_NUMBERS // per_number))
        images = min(most, max(n // block.rows_per_image, m // block.n_c))  # fault: trial-without-end
        n, m = images * block.rows_per_image, images * block.n_c
    elif shared:
        n = m
    q = (_normal(g, n, width) * width**-0.25).to(q_dtype)
    k = q if shared else (_normal(g, m, width) * width**-0.25).to(k_dtype)
    if spec.unit_norm:
        q, k = (torch.nn.functional.normalize(x.float(), dim=1).to(x.dtype) for x in (q, k))
    labels = torch.randint(0, 4, (n,), generator=g)
    # A row is not its own target where it is itself a column.
    targets = (torch.arange(n) + 1 + torch.randint(0, m - 1, (n,), generator=g)) % m
    ids = {Labels: labels, Index: targets}.get(type(layout))
    if isinstance(layout, Several):
        ids = torch.randint(-1, m // 2, (n, layout.p), generator=g)
    guides: tuple[Tensor, ...] | tuple[None, None] = (None, None)
    if "guide" in spec.filters:  # whole numbers, whose products are exact by whatever instructions
        guides = tuple(torch.randint(-2, 3, (rows, 5), generator=g).float() for rows in (n, m))
    return Problem(
        q,
        q if shared else k,
        SCALE,
        spec,
        0,
        bias=_number(-0.5) if isinstance(spec.transform, Bias) else 0.0,
        positives=_normal(g, n, layout.p) if isinstance(layout, Separate) else None,
        row_ids=ids,
        column_ids=(labels if shared else torch.randint(0, 4, (m,), generator=g))
        if isinstance(layout, Labels)
        else None,
        shared=shared,
        ceilings=_ceilings(spec, (q, k), guides),
        guide_q=guides[0],
        guide_k=guides[1],
    )


def _number(value: float) -> Tensor:
    """0-d and float32, whatever torch's default dtype is; so is what `_normal` draws."""
    return torch.tensor(value, dtype=torch.float32)  # fault: trial-default-dtype


def _normal(g: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=g, dtype=torch.float32)


def _ceilings(spec: Spec, scored: Sequence[Tensor], guides: Sequence[Tensor | None]) -> Tensor | None:
    """(K·F, N): a quarter of a row's columns lie above, and none near."""
    lines = []
    for width in spec.prefixes or (None,):
        for name in spec.filters:
            x, y = (cast(Tensor, z).double() for z in (guides if name == "guide" else scored))
            if width is not None and name == "ceiling":
                x, y = (torch.nn.functional.normalize(z[:, :width], dim=1) for z in (x, y))
            ordered = (x @ y.T).sort(dim=1).values
            middle = ordered.shape[1] * 3 // 4
            lines.append(ordered[:, middle - 1 : middle + 1].mean(dim=1))
    return torch.stack(lines).float() if lines else None


def _map(small: Problem, f: Callable[[Tensor], Tensor]) -> Problem:
    """With f of every tensor; q that is k stays so."""
    made: dict[str, Any] = {name: f(x) for name, x in small._asdict().items() if isinstance(x, Tensor)}
    return small._replace(**(made | {"k": made["q"]} if small.shared else made))


def _short(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _tails(spec: Spec) -> Iterator[Tail]:
    """Those that a spec has the statistics for: with a penalty where it has the squares."""
    if spec.prefixes:
        if set(Prefixed.READS) <= set(spec.stats):
            yield Prefixed(0.0, "mean", 1.0, spec.prefixes, tuple(1.0 + i for i in range(spec.n_widths)))
        return
    penalty = 0.01 if "square" in spec.stats else 0.0
    for kind in tails.KERNEL_TAILS:
        if set(kind.READS) <= set(spec.stats) and (spec.n_pos > 0 or not kind.READS_POS):
            yield kind(penalty)


def _run(small: Problem, backend: Backend, tail: Tail | None, needs: Needs) -> tuple[Statistics, Gradients]:
    """Statistics and gradients of a tail, by the way that the op takes; without one, of drawn coefficients."""
    if tail is None:
        found, g = backend.stats(small), torch.Generator().manual_seed(1)
        d = Coefficients(*(None if x is None else _drawn(x, g) for x in found))  # type: ignore[arg-type]
        return found, backend.grads(small, found, d, needs)
    if not small.spec.columns or backend.BOTH_WAYS:
        return backend.loss(small, tail, needs)
    found = backend.stats(small)
    unit = tail.unit(small.n * tail.per_row(small.spec))
    return found, backend.grads(small, found, backend.slopes(small, tail, found, unit, 1.0), needs)


def _drawn(like: Tensor, g: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=g, device="cpu", dtype=torch.float32).to(like)


def _named(
    spec: Spec, found: tuple[Statistics, Gradients], wanted: tuple[Statistics, Gradients]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, found, wanted) of each statistic and gradient that there is."""
    right = wanted[0]._asdict() | wanted[1]._asdict()
    for field, x in (found[0]._asdict() | found[1]._asdict()).items():
        names = {"rows": spec.stats * spec.n_widths, "columns": spec.columns}.get(field)
        if names is not None and x is not None:
            yield from ((f"{field}: {name}", x[i], right[field][i]) for i, name in enumerate(names))
        elif x is not None and x.numel():
            yield field, x, right[field]


def _plain(there: Problem, exact: Problem, backend: Backend, tail: Tail | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same of a plain call, where the backend has one function for it, beside the oracle in torch's own graph.

    Rows as they are, and divided by norms: there one tensor in both roles comes as two views, whose rows lie side by
    side. Of a large problem the latter alone.
    """
    spec, own = exact.spec, isinstance(exact.spec.layout, Separate)
    if backend.whole_loss is None or tail is None or spec.marked:
        return
    for normalize in (True,) if own or large() else (False, True):
        twins = normalize and exact.shared and exact.n % 2 == 0
        ours, exactly = (_leaves(p, twins) for p in (there, exact))
        keys, own_keys = (there.k, there.k[: there.n]) if own else (ours.get("k"), None)
        with torch.enable_grad():
            rows = (ours["q"], keys, ours.get("scale"), None, None, own_keys, None, None)
            factor = 1.0 if "scale" in ours else cast(float, there.scale)
            made = backend.whole_loss(spec, tail, rows, factor, 0, normalize, False, 1, twins)
            if made is None:
                continue
            value, report = _by_operator(exact, tail, exactly, normalize, twins)
            found, wanted = (torch.autograd.grad(y, [*x.values()]) for y, x in ((made[0], ours), (value, exactly)))
        yield "a plain call's loss", made[0], value
        yield "a plain call's report", torch.stack([*made[3].values()]), report
        yield from zip((f"a plain call's d{name}" for name in ours), found, wanted, strict=True)


def _leaves(p: Problem, twins: bool) -> dict[str, Tensor]:
    """What a plain call is differentiated by, by name."""
    one = p.shared or isinstance(p.spec.layout, Separate)
    views = {"q": p.q[0::2], "k": p.q[1::2]} if twins else {"q": p.q} if one else {"q": p.q, "k": p.k}
    learnt = {"scale": p.scale} if isinstance(p.scale, Tensor) else {}
    return {name: x.clone().requires_grad_() for name, x in (views | learnt).items()}


def _by_operator(
    p: Problem, tail: Tail, leaves: dict[str, Tensor], normalize: bool, twins: bool
) -> tuple[Tensor, Tensor]:
    """Loss and report by the operator, which knows neither norms nor own keys: those are torch's own graph."""
    own, scale = isinstance(p.spec.layout, Separate), leaves.get("scale")
    rows = [leaves["q"], *([p.k[: p.n]] if own else [leaves["k"]] if "k" in leaves else [])]
    rows = [torch.nn.functional.normalize(x, dim=1) for x in rows] if normalize else rows
    positives = leaves.get("scale", p.scale) * (rows[0] * rows[1]).sum(dim=1, keepdim=True) if own else None
    if twins:
        rows = [torch.stack(rows, dim=1).flatten(0, 1)]
    k = p.k if own else rows[1] if len(rows) > 1 else None
    needs = [True, k is not None and not own, scale is not None, False, own]
    factor = 1.0 if scale is not None else cast(float, p.scale)
    scores = (rows[0], k, scale, None, positives, *[None] * 5, factor, p.spec.code, 0)
    loss, _, _, report, *_ = torch.ops.fused_nce.loss(*scores, tail.code, needs, False, 1, ASIDE + "reference")
    return loss, report[0]


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of the largest entry; inf where other entries are finite, or other infinities."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double()
    if found.shape != wanted.shape:
        return float("inf")
    most, size = (float(x.abs().amax()) if x.numel() else 0.0 for x in (found - wanted, wanted))
    if math.isfinite(most):  # then so are all
        return most / max(size, 1e-30)
    finite = wanted.isfinite()
    if not torch.equal(found.isfinite(), finite):  # fault: trial-nan-unseen
        return float("inf")
    if not torch.equal(found[~finite].nan_to_num(0.0), wanted[~finite].nan_to_num(0.0)):  # infinities have a sign
        return float("inf")
    if not finite.any():
        return 0.0
    return float((found - wanted)[finite].abs().max() / wanted[finite].abs().max().clamp_min(1e-30))


# ---- verdicts that outlive the process --------------------------------------------------------------------------


@cache
def path(device: torch.device) -> Path | None:
    """Where this card, driver, torch, Triton and build have their verdicts; None for somebody without a home."""
    properties = torch.cuda.get_device_properties(device)
    module, _ = _extension.status()
    built = "none" if module is None else json.dumps(module.build_info(), sort_keys=True, default=str)
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    driver = str(torch.version.hip or torch._C._cuda_getDriverVersion())  # type: ignore[attr-defined]
    tried = repr((ROWS, COLUMNS, LARGE, LARGE_ITSELF, MOST_SCORES, MOST_NUMBERS))  # an older verdict may have seen less
    seen = [__version__, torch.__version__, triton, built, driver, properties.name, tried]
    digest = hashlib.sha256("\n".join([*seen, f"{properties.major}.{properties.minor}"]).encode()).hexdigest()[:16]
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(folder, "fused_nce", f"first-contact-{digest}.json")


def _read(file: Path | None) -> dict[str, str]:
    """The verdicts on disk; none where there is no file, or one that was damaged."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(verdict) for key, verdict in found.items()} if isinstance(found, dict) else {}


def _write(file: Path | None, key: str, verdict: str) -> None:
    """Beside what other processes wrote meanwhile; where nothing can be written, the next process tries again."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f"{file.name}.{os.getpid()}")
        aside.write_text(json.dumps(_read(file) | {key: verdict}, indent=1) + "\n", encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        _logger.debug("first contact: %s", error)
