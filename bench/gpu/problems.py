"""What is measured on a GPU: one loss on one score matrix each, and what is asked of it. bf16, loss and gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fused_nce.backends.triton import plan
from fused_nce.bench import formulas
from fused_nce.core.cost import Call
from fused_nce.core.spec import Bias, Block, Separate, Spec, TanhClip
from fused_nce.core.tails import Nce, Sigmoid
from fused_nce.core.workspace import GPU_DEFAULT_MB
from fused_nce.measure import CLIP, PENALTY

TINY = "tiny "
SWEEP = "sweep over widths"
SIZES = "another size, for the cost model"
HELD_OUT = "a shape that the cost model is tried at"
CALLS = {  # what a loss asks of a backend, as the benchmark calls it
    "amdim_nce": Call(penalised=PENALTY > 0),
    "nt_xent": Call(shared=True),
    "clip_loss": Call(columns=True),
}
GRADIENTS = ("scores", "grad_q", "grad_k")  # the GEMMs that no loss with both gradients can do without


@dataclass(frozen=True)
class Target:
    """What is asked of our automatic choice on one H200; times of the device, like with like in the ratios."""

    device_ms: float  # at most
    naive_over_ours: float  # at least
    compile_over_ours: float  # at least
    peak_mb: float  # at most, above inputs and gradients, in 10^6 bytes
    graph_ms: float | None = None  # at most, as a replayed CUDA graph


@dataclass(frozen=True)
class Problem(formulas.Problem):
    """One, and what is asked of it."""

    gemms: tuple[str, ...] = GRADIENTS
    target: Target | None = None
    workspace_mb: int | None = None  # the limit for this call, None for the default
    role: str = "table"

    @property
    def flop(self) -> int:
        """Of the least GEMMs, 2·N·M·D each."""
        return len(self.gemms) * self.steps * 2 * self.n * self.m * self.d

    @property
    def rows_alone(self) -> bool:
        """Whether keys want no gradient of their own."""
        return "grad_k" not in self.gemms

    def call(self, dtype: torch.dtype = torch.bfloat16) -> Call:
        """What it asks of a backend."""
        found = CALLS.get(self.loss, Call())._replace(k=not self.rows_alone)
        sizes = self.n, self.m, self.d, (dtype, dtype)
        limit = (self.workspace_mb or GPU_DEFAULT_MB) << 20
        return found.planned(found.columns, *plan.ways(self.spec, *sizes, found.shared, limit))

    @property
    def spec(self) -> Spec:
        """What it does to a score."""
        plain = Spec(Block(1), stats=Nce().stats)
        specs = {
            "amdim_nce": Spec(Block(self.n_c), TanhClip(CLIP)),
            "moco_nce": replace(plain, layout=Separate(1)),
            "nt_xent": replace(plain, layout=Block(2, 2), drop_self=True, unit_norm=True),
            "info_nce": replace(plain, unit_norm=True),
            "clip_loss": replace(plain, columns=("neg_lse",)),
            "siglip_loss": Spec(Block(1), Bias(), stats=Sigmoid().stats),
        }
        return specs.get(self.loss, plain)

    @property
    def fits_cost(self) -> bool:
        """Whether its time is one of those that the rule of the choice is fitted to."""
        return self.loss == "amdim_nce" and self.workspace_mb is None and self.role != HELD_OUT

    @property
    def scores(self) -> int:
        """Entries of one score matrix."""
        return self.n * self.m

    def tiny(self) -> Problem:
        """The same call at a size that any machine runs at once, and so named: what tries the runner."""
        n, n_c = min(self.n, 8), min(self.n_c, 3)
        m = n * n_c if n_c > 1 else n if self.n == self.m else 24
        label, d, steps = TINY + self.label, self.d // 16, min(self.steps, 2)
        return replace(self, label=label, n=n, m=m, d=d, n_c=n_c, steps=steps)


def amdim(images: int, d: int, n_c: int = 49, target: Target | None = None, workspace_mb: int | None = None) -> Problem:
    """One antecedent an image against n_c consequents of each."""
    suffix = "" if workspace_mb is None else f", in {workspace_mb} MiB"
    label = f"AMDIM {images}×{n_c}, D {d}{suffix}"
    return Problem("amdim_nce", label, images, images * n_c, d, n_c, target=target, workspace_mb=workspace_mb)


def of_rows(problem: Problem) -> Problem:
    """The same whose keys want no gradient."""
    return replace(problem, label=f"{problem.label}, rows alone", gemms=("scores", "grad_q"))


def square(loss: str, name: str, n: int, d: int, target: Target | None = None, **more: Any) -> Problem:
    """As many rows as columns."""
    return Problem(loss, f"{name} {n:,}², D {d}", n, n, d, target=target, **more)


GLOBAL = amdim(1008, 2560, target=Target(1.2, 4.4, 1.18, 130.0))
BOUNDED = replace(amdim(1008, 2560, workspace_mb=32), target=None)
BOUNDED_SLOWDOWN = 1.3  # BOUNDED over GLOBAL, at most

# The queue's keys want no gradient: two GEMMs. "≈ 0" of extra memory is read as a sixteenth of the bf16 scores.
MOCO = Problem(
    *("moco_nce", "MoCo 256 × 65,536, D 128", 256, 65536, 128), gemms=("scores", "grad_q"),
    target=Target(0.035, 10.0, 2.8, 2.1),
)  # fmt: skip
# Both sides' statistics must be there before any weight: in a bounded workspace the scores are computed twice.
TWO_SIDED = ("scores", "scores_again", "grad_q", "grad_k")
TABLE = (
    amdim(128, 1024, target=Target(0.035, 9.0, 2.0, 5.0, graph_ms=0.022)),
    amdim(126, 2560, target=Target(0.045, 7.0, 1.5, 5.0)),
    GLOBAL,
    BOUNDED,
    MOCO,
    # Rows and columns are one tensor, dz = (W + Wᵀ)z: two GEMMs.
    square("nt_xent", "SimCLR", 65536, 128, Target(8.0, 10.0, 2.8, 256.0), gemms=("scores", "grad_q")),
    square("clip_loss", "CLIP", 32768, 512, Target(7.2, 3.8, 1.9, 256.0), gemms=TWO_SIDED),
    square("clip_loss", "CLIP", 32768, 1024, Target(13.5, 3.8, 1.9, 256.0), gemms=TWO_SIDED),
    square("cpc_nce", "CPC 5 ×", 12544, 1024, Target(8.2, 2.5, 1.2, 256.0), steps=5),
    square("info_nce", "InfoNCE", 8192, 256),
)

# Where the Triton kernels hand over to the GEMM loop: one shape, many widths.
CROSSOVER_WIDTHS = (64, 128, 192, 256, 384, 512)
CROSSOVER = tuple(replace(amdim(256, d), role=SWEEP) for d in CROSSOVER_WIDTHS)
# A time at two sizes tells what a call costs from what a score does: sixteen times the scores.
LARGER = tuple(replace(amdim(1024, d), role=SIZES) for d in (64, 128, 512))

# Of losses both ways, whose weights the Triton kernels store: for the rule of the choice, from counts alone.
BOTH_WAYS = tuple(square("clip_loss", "CLIP", 8192, d, role=SWEEP) for d in (64, 128, 256, 512, 1024, 2560))

# Likewise, of losses without a clip and a penalty, and of those with both beyond what the card is to measure.
PLAIN = (
    square("info_nce", "InfoNCE", 1024, 256, role=SWEEP),
    *(square("info_nce", "InfoNCE", 8192, d, role=SWEEP) for d in (64, 128, 192, 256, 384, 512, 1024, 2560)),
)
MANY, MOST = 32768, 65536
SQUARES = (
    *(replace(amdim(8192, d, 1), role=SWEEP) for d in (128, 384)),
    *(replace(amdim(MANY, d, 1), role=SWEEP) for d in (64, 128, 192, 256, 320, 384, 512, 1024, 2560)),
    *(replace(amdim(MOST, d, 1), role=SWEEP) for d in (64, 128, 256, 384, 1024, 2560)),
    replace(amdim(1344, 128), role=SWEEP),
    *(square("info_nce", "InfoNCE", MANY, d, role=SWEEP) for d in (128, 320, 384, 1024)),
    *(square("info_nce", "InfoNCE", MOST, d, role=SWEEP) for d in (64, 128, 256, 384, 512, 1024, 2560)),
    *(square("clip_loss", "CLIP", MANY, d, role=SWEEP) for d in (128, 2560)),
)
ROWS_ALONE = tuple(of_rows(p) for p in SQUARES if p.n == MANY or (p.n == MOST and p.d in (128, 1024)))
# Beside those of TABLE that no cost is fitted to.
HELD = tuple(
    replace(p, role=HELD_OUT)
    for p in (
        *(
            square("info_nce", "InfoNCE", n, d)
            for n, d in ((16384, 256), (16384, 320), (32768, 512), (49152, 320), (40960, 512), (MOST, 768))
        ),
        *(
            amdim(n, d, n_c)
            for n, d, n_c in ((16384, 192, 1), (16384, 512, 1), (49152, 128, 1), (2048, 256, 49), (MOST, 768, 1))
        ),
        *(square("clip_loss", "CLIP", n, d) for n, d in ((16384, 768), (16384, 1536), (MOST, 1024))),
        *(of_rows(p) for p in (amdim(8192, 256, 1), amdim(MOST, 256, 1), square("info_nce", "InfoNCE", MANY, 256))),
        of_rows(square("clip_loss", "CLIP", MANY, 1024)),
    )
)
# In float16, whose weights the Triton kernels never store: thin passes over wide rows.
THIN = tuple(replace(p, role=SWEEP) for p in (*CROSSOVER[4:], *TABLE[:3], LARGER[-1], *PLAIN[-4:]))

# Where launches are what a call costs.
SMALL = (
    square("info_nce", "InfoNCE", 1024, 256),
    square("nt_xent", "NT-Xent", 1024, 128, gemms=("scores", "grad_q")),
)

# Beside fused losses that others publish, at the size that one of them names.
PUBLISHED = (
    square("clip_loss", "CLIP", 65536, 512, gemms=TWO_SIDED),
    square("siglip_loss", "SigLIP", 32768, 512),
)

ALL = (*TABLE, *SMALL, *CROSSOVER, *LARGER, *PUBLISHED)  # in the order of a run: what is judged first
QUICK_TABLE = tuple(p for p in TABLE if p.loss in ("amdim_nce", "moco_nce"))
QUICK_CROSSOVER = (*(p for p in CROSSOVER if p.d in (64, 192, 512)), *LARGER[:1])
