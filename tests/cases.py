"""Random problems, each one line of JSON, and the run that holds one against the oracle.

A case that fails prints `python -m tests.repro '<json>'`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_nce import tile_loss, tile_stats
from fused_nce.core import dispatch
from fused_nce.core.spec import Block, Identity, Spec, TanhClip
from fused_nce.core.tails import Nce

from .budget import Budget, eta, precision
from .layouts import LAYOUTS
from .oracle import Coefficients, Oracle, softplus

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EDGES = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
PLANTS = ("random", "margin5", "margin10", "margin20", "margin40", "equal", "huge_row", "zero_row", "small")
UPSTREAMS = ("ones", "zeros", "one_hot", "randn", "big", "small", "expanded")


@dataclass(frozen=True)
class Case:
    """One problem and how it is posed. N = images·rows_per_image, M = n_k·n_c."""

    backend: str
    dtype: str
    seed: int
    images: int = 3
    rows_per_image: int = 1
    n_k: int = 3
    offset: int = 0
    n_c: int = 2
    d: int = 8
    scale: float = 1.0
    tensor_scale: bool = False
    clip: float | None = 20.0
    penalty: float = 0.04
    entry: str = "loss"  # loss: one backward of `loss`; parts: of loss, nce and penalty; stats: of `tile_stats`
    reduction: str = "mean"
    plant: str = "random"
    layouts: tuple[str, str] = ("contiguous", "contiguous")
    upstream: str = "randn"
    needs: str = "qks"  # which of q, k, scale want a gradient
    workspace_mb: float | None = None
    device: str = "cpu"

    @property
    def spec(self) -> Spec:
        """The engine's name for it."""
        return Spec(Block(self.n_c, self.rows_per_image), TanhClip(self.clip) if self.clip is not None else Identity())

    @property
    def line(self) -> str:
        """The command that runs it alone."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: value for name, value in fields.items() if value != getattr(Case, name, None)}
        return f"python -m tests.repro '{json.dumps(changed)}'"


class Sweep:
    """Of random cases: how many ran, and what is wrong with those that failed or are beyond their budget."""

    def __init__(self, record_eta: Callable[[str, str, dict[str, float]], None], backend: str, dtype: str) -> None:
        self.ran, self.failures, self.record = 0, list[str](), partial(record_eta, backend, dtype)

    def add(self, line: str, etas_of: Callable[[], dict[str, float] | None]) -> None:
        """Run a case, which `line` repeats; None is one that the backend refuses, and does not count."""
        try:
            etas = etas_of()
        except Exception as error:
            self.ran += 1
            self.failures.append(f"{type(error).__name__}: {error}\n    {line}")
            return
        if etas is None:
            return
        self.ran += 1
        self.record(etas)
        name, worst = max(etas.items(), key=lambda item: item[1])
        if not worst <= 1:
            self.failures.append(f"{name}: error is {worst:.3g} of its budget\n    {line}")

    def check(self) -> None:
        """Name the first few that failed, worst result each."""
        assert not self.failures, f"{len(self.failures)} of {self.ran} cases failed:\n" + "\n".join(self.failures[:5])


def load(text: str) -> Case:
    """The case that `Case.line` wrote."""
    fields = json.loads(text)
    return Case(**{**fields, "layouts": tuple(fields.get("layouts", Case.layouts))})


def draw(rng: np.random.Generator, backend: str, dtype: str, device: str = "cpu") -> Case:
    """A random case: sizes log-uniform, with the edges of tiles and vectors forced in."""

    def size(most: int, edges: tuple[int, ...] = ()) -> int:
        if edges and rng.random() < 0.35:
            return int(rng.choice(edges))
        return int(math.exp(rng.uniform(0, math.log(most + 1))))

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    while True:
        rows_per_image = pick(1, 1, 1, 1, 2, 3, 7)
        images, n_c, d = max(1, size(130, EDGES) // rows_per_image), size(50), size(257, EDGES)
        extra = pick(0, 0, 1, size(20))
        scores = images * rows_per_image * (images + extra) * n_c
        # Most bugs show on small problems, which are quick; one draw in ten may be large.
        if scores * d <= (4e7 if rng.random() < 0.1 else 1e6):
            break
    case = Case(
        backend=backend,
        dtype=dtype,
        seed=int(rng.integers(2**31)),
        images=images,
        rows_per_image=rows_per_image,
        n_k=images + extra,
        offset=int(rng.integers(extra + 1)),
        n_c=n_c,
        d=d,
        scale=float(f"{pick(1, 1, 1, 1, -1) * 10 ** rng.uniform(-3, 4) / math.sqrt(d):.4g}"),
        tensor_scale=bool(rng.random() < 0.3),
        clip=pick(None, 20.0, 20.0, 10.0, 4.0, 43.0, 44.0, 300.0),
        penalty=pick(0.0, 0.04, 0.05, 3.0),
        entry=pick("loss", "loss", "parts", "stats"),
        reduction=pick("mean", "mean", "sum", "none"),
        plant=pick("random", "random", "random", *PLANTS),
        layouts=(pick(*LAYOUTS), pick(*LAYOUTS)),
        upstream=pick(*UPSTREAMS),
        needs=pick("qks", "qks", "q", "k", "qk", "s", ""),
        workspace_mb=pick(None, None, 0.002, 0.02, 0.2),
        device=device,
    )
    if case.plant.startswith("margin"):
        # Only where the other scores are small does the margin mean p → 1, and a narrow clip would take it back.
        case = dataclasses.replace(
            case,
            rows_per_image=1,
            d=max(case.d, 64),
            scale=float(f"{10 ** rng.uniform(-2, 0) / math.sqrt(max(case.d, 64)):.4g}"),
            clip=pick(None, 44.0, 300.0),
            penalty=pick(0.0, 0.0, 0.04),
        )
    # A backend has a smallest workspace: the tightest that it takes is the one that tests it.
    while case.workspace_mb is not None and case.workspace_mb < 16 and can_run(case) is not None:
        case = dataclasses.replace(case, workspace_mb=2 * case.workspace_mb)
    return case


def features(case: Case) -> tuple[Tensor, Tensor]:
    """(q, k), contiguous, of the case's dtype and plant."""
    generator = torch.Generator().manual_seed(case.seed)
    n, m = case.images * case.rows_per_image, case.n_k * case.n_c
    q = torch.randn(n, case.d, generator=generator, dtype=torch.float64)
    k = torch.randn(m, case.d, generator=generator, dtype=torch.float64)
    if case.plant.startswith("margin"):  # each positive this far above the unplanted scores: p → 1
        lift = float(case.plant.removeprefix("margin")) / (case.scale * q.square().sum(1, keepdim=True))
        rows = torch.arange(0, n, case.rows_per_image)
        own = (torch.arange(case.images) + case.offset)[:, None] * case.n_c + torch.arange(case.n_c)
        k[own.reshape(-1)] += (lift * q)[rows].repeat_interleave(case.n_c, 0)
    elif case.plant == "equal":
        q, k = q[:1].expand_as(q), k[:1].expand_as(k)
    elif case.plant == "huge_row":
        q[n // 2] *= 100
        k[m // 2] *= 30
    elif case.plant == "zero_row":
        q[n // 2], k[m // 2] = 0, 0
    elif case.plant == "small":
        q, k = q * 1e-3, k * 1e-3
    limit = torch.finfo(DTYPES[case.dtype]).max / 2
    return tuple(x.clamp(-limit, limit).to(DTYPES[case.dtype]) for x in (q, k))  # type: ignore[return-value]


def upstream(case: Case, shape: torch.Size, salt: int) -> Tensor:
    """dL/d output, in the accumulation dtype, on the case's device."""
    generator = torch.Generator().manual_seed(case.seed + salt)
    wide = torch.promote_types(DTYPES[case.dtype], torch.float32)
    g = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.device, wide)
    match case.upstream:
        case "ones":
            return torch.ones_like(g)
        case "zeros":
            return torch.zeros_like(g)
        case "one_hot":
            hot = torch.zeros_like(g)
            hot.view(-1)[-1 if salt % 2 else 0] = g.view(-1)[0]
            return hot
        case "big":
            return g * 1024
        case "small":
            return g * 1e-3
        case "expanded":
            return g.view(-1)[0].expand(shape)
        case _:
            return g


@contextmanager
def environment(**settings: str | None) -> Iterator[None]:
    """Environment variables, set for a while."""
    before = {name: os.environ.get(name) for name in settings}
    try:
        for name, value in settings.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def run(case: Case) -> dict[str, float]:
    """η of every value and gradient of a case.

    Raises:
        AssertionError: where a gradient appears that was not asked for, or an input was written to.
    """
    dtype = DTYPES[case.dtype]
    plain = features(case)
    placed = [x.to(case.device, copy=True) for x in plain]
    q, k = (LAYOUTS[name](x).detach() for name, x in zip(case.layouts, placed, strict=True))
    wide = torch.promote_types(dtype, torch.float32)
    scale = torch.tensor(case.scale, dtype=wide, device=case.device) if case.tensor_scale else case.scale
    leaves = {"q": q, "k": k, **({"s": scale} if isinstance(scale, Tensor) else {})}
    for letter, leaf in leaves.items():
        leaf.requires_grad_(letter in case.needs)
    versions = [leaf._version for leaf in leaves.values()]
    real = np.longdouble if dtype == torch.float64 else np.float64
    exact = Oracle(
        *(x.double().numpy() for x in plain),
        # What the backend is given: a host scale meets float32 scores as a float32.
        scale=float(torch.tensor(case.scale, dtype=wide)),
        n_c=case.n_c,
        rows_per_image=case.rows_per_image,
        offset=case.offset,
        clip=case.clip,
        real=real,
    )
    budget = Budget(exact, precision(dtype, case.backend))
    workspace = None if case.workspace_mb is None else str(case.workspace_mb)
    with environment(FUSED_NCE_WORKSPACE_MB=workspace), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fused_nce: one image")
        pose = _stats if case.entry == "stats" else _loss
        etas = pose(case, q, k, scale, exact, budget)
    for letter, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, f"gradient of {letter}: {leaf.grad}"
    assert versions == [leaf._version for leaf in leaves.values()], "an input's version counter moved"
    assert torch.equal(q.cpu(), plain[0]), "q was written to"
    assert torch.equal(k.cpu(), plain[1]), "k was written to"
    return etas


def _loss(case: Case, q: Tensor, k: Tensor, scale: float | Tensor, exact: Oracle, budget: Budget) -> dict[str, float]:
    out = tile_loss(
        q, k, case.spec, Nce(case.penalty, case.reduction), scale=scale, offset=case.offset, backend=case.backend
    )
    element, square, strength = exact.nce, exact.square, case.penalty
    mean, total = element.mean(), element.sum()
    mean_budget, total_budget = budget.mean(budget.nce, element), budget.total(budget.nce, element)
    penalty, penalty_budget = exact.penalty(strength), budget.penalty(strength)
    main, main_budget = (total, total_budget) if case.reduction == "sum" else (mean, mean_budget)
    nce = {"mean": (mean, mean_budget), "sum": (total, total_budget), "none": (element, budget.nce)}[case.reduction]
    rounding = 2 * budget.p.u * (abs(main) + abs(penalty))
    etas = {
        "loss": eta(out.loss, main + penalty, main_budget + penalty_budget + rounding),
        "nce": eta(out.nce, *nce),
        "penalty": eta(out.penalty, penalty, penalty_budget),
        "pos": eta(out.pos, exact.pos, budget.pos),
        "neg_lse": eta(out.rows["neg_lse"], exact.neg_lse, budget.neg_lse),
        "neg_max": eta(out.rows["neg_max"], exact.neg_max, budget.neg_max),
        "square": eta(out.rows["square"], square, budget.square),
        **_report(out.report, exact, budget, case),
    }
    if not out.loss.requires_grad:
        return etas
    g_loss = upstream(case, out.loss.shape, 1)
    unit = 1.0 if case.reduction == "sum" else 1.0 / element.size
    g_element = np.full(element.shape, float(g_loss) * unit)
    g_square = float(g_loss)
    parts, ups = [out.loss], [g_loss]
    if case.entry == "parts":
        g_nce, g_penalty = upstream(case, out.nce.shape, 2), upstream(case, out.penalty.shape, 3)
        parts, ups = [out.loss, out.nce, out.penalty], [g_loss, g_nce, g_penalty]
        share = 1.0 / element.size if case.reduction == "mean" else 1.0
        g_element = g_element + g_nce.double().cpu().numpy() * share
        g_square += float(g_penalty)
    torch.autograd.backward(parts, ups)
    g_square *= strength / (exact.n * exact.m)
    gradients = exact.gradients(exact.nce_coefficients(g_element, g_square))
    allowed = budget.nce_gradients(g_element, g_square, gradients)
    return etas | _gradient_etas(case, (q, k, scale), gradients, allowed)


def _report(report: dict[str, Tensor], exact: Oracle, budget: Budget, case: Case) -> dict[str, float]:
    """η of the numbers for logging."""
    u, n_k = budget.p.u, exact.m // exact.n_c
    chance = math.log1p((n_k - 1) * exact.n_c)
    bound = softplus(exact.neg_lse[:, None] - math.log(exact.n_c) - exact.pos)
    slack = budget.nce + 8 * u * (1 + math.log(exact.n_c) + bound)
    near = (np.abs(exact.pos - exact.neg_max[:, None]) <= budget.pos + budget.neg_max[:, None]).mean()
    finite = np.isfinite(exact.neg_lse).all()
    lse = exact.neg_lse.mean() if finite else -np.inf
    lse_budget = budget.mean(budget.neg_lse, exact.neg_lse) if finite else 1.0
    nce = exact.nce.mean()
    values = {
        "top1": ((exact.pos > exact.neg_max[:, None]).mean(), near + 8 * u),
        "pos_mean": (exact.pos.mean(), budget.mean(budget.pos, exact.pos)),
        "neg_lse_mean": (lse, lse_budget),
        "nce_minus_chance": (nce - chance, budget.mean(budget.nce, exact.nce) + 4 * u * (nce + chance)),
        "mi_bound": (math.log(n_k) - bound.mean(), budget.mean(slack, bound) + 4 * u * (math.log(n_k) + 1)),
    }
    return {f"report {name}": eta(report[name], *pair) for name, pair in values.items()}


def _stats(case: Case, q: Tensor, k: Tensor, scale: float | Tensor, exact: Oracle, budget: Budget) -> dict[str, float]:
    out = tile_stats(q, k, case.spec, scale=scale, offset=case.offset, backend=case.backend)
    etas = {name: eta(out[name], getattr(exact, name), getattr(budget, name)) for name in out}
    if not out["pos"].requires_grad:
        return etas
    wanted = ["pos", "neg_lse", "square"]
    ups = [upstream(case, out[name].shape, i) for i, name in enumerate(wanted)]
    torch.autograd.backward([out[name] for name in wanted], ups)
    d = Coefficients(*(g.double().cpu().numpy() for g in ups))
    gradients = exact.gradients(d)
    return etas | _gradient_etas(case, (q, k, scale), gradients, budget.stats_gradients(d, gradients))


def _gradient_etas(case: Case, leaves: tuple[Any, ...], exact: Any, allowed: Any) -> dict[str, float]:
    return {
        name: eta(leaf.grad, value, error)
        for name, letter, leaf, value, error in zip(("dq", "dk", "dscale"), "qks", leaves, exact, allowed, strict=True)
        if isinstance(leaf, Tensor) and leaf.grad is not None
    }


def can_run(case: Case) -> str | None:
    """Why the case's backend cannot take it; None if it can."""
    sizes = (case.images * case.rows_per_image, case.n_k * case.n_c)
    q, k = (torch.empty(size, case.d, dtype=DTYPES[case.dtype], device=case.device) for size in sizes)
    with environment(FUSED_NCE_WORKSPACE_MB=None if case.workspace_mb is None else str(case.workspace_mb)):
        return dispatch.why_not(case.backend, case.spec, q, k)
