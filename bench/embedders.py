"""`python -m bench.embedders`: losses of text embedders beside sentence-transformers' own, eager and cached.

The losses of a problem are timed in one interleaved run, gradients included. Memory is what a step holds at its peak in
a process of its own, beyond the embeddings and their gradients, for all alike; errors are those of the value and of the
gradients against sentence-transformers' own loss in float64. Writes `embedders-HOST.json` and a table beside it, after
every problem. A problem that would take more than what is left of `--budget-s`, by what smaller ones took, is left out,
and the table says so.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import host, measure
from bench.text import markdown
from fused_nce import info_nce, last_path
from fused_nce.bench import memory

COLUMNS = {"pairs": 2, "hard negatives": 3, "every direction": 2, "hardness": 3, "gist": 2, "matryoshka": 2}
PART = 32  # of a cached loss: sentence-transformers' default
OURS, EAGER, CACHED = "fused_nce", "sentence-transformers", "sentence-transformers, cached"
NAMES = (OURS, EAGER, CACHED)


def embeddings(kind: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Columns that resemble each other row by row."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n, d, generator=g)
    return [(base + torch.randn(n, d, generator=g)).to(dtype) for _ in range(COLUMNS[kind])]


def loss_of(kind: str, name: str, n: int, d: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function of columns of embeddings that leaves their gradients."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from fused_nce.compat import sentence_transformers as ours

    module: Any = ours if name == OURS else theirs
    prefix, model = "Cached" * (name == CACHED), nn.Sequential(nn.Identity())
    cached: dict[str, Any] = {"mini_batch_size": PART} if prefix else {}
    if kind == "gist":
        guides = [x[:, : d // 2].contiguous() for x in embeddings(kind, n, d)]
        settings: dict[str, Any] = {"temperature": 0.05, "margin_strategy": "absolute", "margin": 0.0}
        loss = object.__new__(getattr(module, f"{prefix}GISTEmbedLoss"))
        nn.Module.__init__(loss)
        settings |= {"contrast_anchors": True, "contrast_positives": True, "gather_across_devices": False}
        for key, value in (settings | cached).items():
            setattr(loss, key, value)
        loss.similarity_fct, loss.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
        loss.show_progress_bar = False
        if name == OURS:
            return lambda columns: ours.guided(loss, columns, guides)
        if name == EAGER:
            return lambda columns: ours._gist_of(loss, columns, guides)
        return lambda columns: loss.calculate_loss([list(x.split(PART)) for x in columns], [[g] for g in guides])
    every: dict[str, dict[str, Any]] = {
        "every direction": {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
        "hardness": {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
    }
    options = every.get(kind, {})
    loss = getattr(module, f"{prefix}MultipleNegativesRankingLoss")(model, **options, **cached)

    def once(columns: Sequence[Tensor]) -> Tensor:
        if prefix:
            parts = [[part.detach().requires_grad_() for part in x.split(PART)] for x in columns]
            value: Tensor = loss.calculate_loss(parts, with_backward=True)
            for x, pieces in zip(columns, parts, strict=True):
                x.backward(torch.cat([part.grad for part in pieces if part.grad is not None]))
            return value
        return ours.ranking(loss, columns) if name == OURS else loss.compute_loss_from_embeddings(list(columns), None)

    if kind != "matryoshka":
        return once
    widths = [d // 4, d // 2, 3 * d // 4, d]
    if name == OURS:
        return lambda x: info_nce(*x, temperature=1 / 20, normalize=True, prefixes=widths).loss

    def nested(columns: Sequence[Tensor]) -> Tensor:
        return torch.stack([once([nn.functional.normalize(x[:, :w], dim=1) for x in columns]) for w in widths]).sum()

    return nested


def fits(kind: str, name: str, n: int, d: int) -> bool:
    """GIST's (N, N, D) tensors within a gigabyte, and the time that a cached loss takes over (32, N, D) ones."""
    limit = {EAGER: 2**27, CACHED: 2**26}.get(name, n * n * d)
    return kind != "gist" or n * n * d <= limit


@dataclass(frozen=True)
class Step:
    """One loss with its gradients, as `fused_nce.bench.memory` has it."""

    kind: str
    name: str
    n: int
    d: int

    @property
    def gradients_bytes(self) -> int:
        """Of all columns."""
        return COLUMNS[self.kind] * self.n * self.d * 4

    def prepare(self) -> Callable[[], object]:
        """A step."""
        loss = loss_of(self.kind, self.name, self.n, self.d)
        columns = [x.requires_grad_() for x in embeddings(self.kind, self.n, self.d)]
        return lambda: self.step(loss, columns)

    def warm_up(self) -> None:
        """On 40 rows."""
        Step(self.kind, self.name, 40, self.d).prepare()()

    @staticmethod
    def step(loss: Callable[[Sequence[Tensor]], Tensor], columns: Sequence[Tensor]) -> Tensor:
        """The gradients are in the columns."""
        for x in columns:
            x.grad = None
        value = loss(columns)
        if value.requires_grad:
            value.backward()
        return value.detach()


def found(kind: str, name: str, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Value and gradients."""
    columns = [x.requires_grad_() for x in embeddings(kind, n, d, dtype)]
    value = Step.step(loss_of(kind, name, n, d), columns)
    return value.double(), torch.cat([x.grad.double() for x in columns if x.grad is not None])


def errors(kind: str, names: Sequence[str], n: int, d: int) -> dict[str, dict[str, float]]:
    """Of each, against upstream's eager loss in float64: of the largest gradient, and of the value."""
    value, gradient = found(kind, EAGER, n, d, torch.float64)
    rows = {}
    for name in names:
        v, g = found(kind, name, n, d, torch.float32)
        worst = float((g - gradient).abs().max() / gradient.abs().max())
        rows[name] = {"value_error": float((v - value).abs() / value.abs()), "gradient_error": worst}
    return rows


# ---- which problems, and for how long ----------------------------------------------------------------------------

PAIRS = tuple(("pairs", n, d) for n in (256, 512, 1024, 2048, 4096, 8192) for d in (384, 1024))
OTHERS = tuple((kind, n, d) for n, d in ((256, 384), (1024, 384), (1024, 1024), (4096, 384)) for kind in COLUMNS)
LAST = (("pairs", 16384, 384), ("matryoshka", 8192, 384), ("hard negatives", 8192, 384), ("pairs", 16384, 1024))
PROBLEMS = (*PAIRS, *(x for x in OTHERS if x[0] != "pairs"), *LAST)
QUICK = (*((kind, 256, 384) for kind in COLUMNS), ("pairs", 2048, 384))
RUNS = 2  # of a step beside the timed ones: a first, and that of the process whose peak counts
PRELOAD = ("sentence_transformers.sentence_transformer.losses",)


SLOWEST_S = {EAGER: 20.0, CACHED: 2.5}  # of a rival's step; a slower one is left out


def measured(
    names: Sequence[str], kind: str, n: int, d: int, threads: int, rounds: int, budget_s: float
) -> dict[str, Any]:
    """One problem: time, memory and, where float64 is quick, errors."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    if n * n * d <= (2**26 if kind == "gist" else 2**30):
        rows = errors(kind, names, n, d)
    steps = {name: Step(kind, name, n, d).prepare() for name in names}
    with measure.without_gc():
        begin = time.perf_counter()
        measure.interleave(steps, 1)
        count = int(min(rounds, max(3, budget_s / (time.perf_counter() - begin))))
        steps[OURS]()
        path = last_path()
        times, busy = measure.quietest(steps, count, 1)
    del steps
    for name in names:
        rows[name] |= measure.spread(times[name])
        rows[name]["peak_memory_mib"] = memory.peak(Step(kind, name, n, d), threads, PRELOAD)["peak_memory_mib"]
    shape = {"loss": kind, "n": n, "d": d, "rounds": count, "others_cpu_share": busy}
    return shape | {"ours_backend": path.backend if path else None, "rivals": rows}


def steps_s(done: Sequence[dict[str, Any]], kind: str, n: int, d: int) -> dict[str, float]:
    """Seconds of a step of each loss that is to run: what it took on its largest smaller problem, by N²·D."""
    found = {}
    for name in NAMES:
        smaller = [x for x in done if x["loss"] == kind and name in x["rivals"]]
        best = max(smaller, key=lambda x: float(x["n"] ** 2 * x["d"]), default=None)
        if not fits(kind, name, n, d):
            continue
        growth = 0.0 if best is None else n * n * d / (best["n"] ** 2 * best["d"])
        seconds = 0.0 if best is None else best["rivals"][name]["time_ms_median"] / 1e3 * growth
        if seconds <= SLOWEST_S.get(name, seconds):
            found[name] = seconds
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    header = [
        "loss", "N", "D", "fused_nce, ms", "eager ÷ ours", "cached ÷ ours", "fused_nce, MiB", "eager, MiB",
        "cached, MiB", "eager ÷ ours, memory", "value error: ours / eager", "gradient error: ours / eager / cached",
    ]  # fmt: skip
    rows = []
    for x in record["problems"]:
        found = [x["rivals"].get(name, {}) for name in NAMES]
        t, m, v, g = (
            [row.get(key) for row in found]
            for key in ("time_ms_median", "peak_memory_mib", "value_error", "gradient_error")
        )
        ratio = [f"{y / t[0]:.2f}×" if y else "–" for y in t[1:]]
        held = [f"{y:,.1f}" if y is not None else "–" for y in m]
        less = f"{m[1] / max(m[0], 0.1):.0f}×" if m[1] is not None else "–"
        wrong = [" / ".join("–" if y is None else f"{y:.0e}" for y in z) for z in (v[:2], g)]
        rows.append([x["loss"], f"{x['n']:,}", f"{x['d']:,}", f"{t[0]:,.3g}", *ratio, *held, less, *wrong])
    machine, versions = record["host"], record["versions"]
    lines = [
        markdown(header, rows),
        "",
        "Loss and gradients of float32 embeddings. Memory: the most that a step holds beyond the embeddings and their "
        "gradients, which all have; for fused_nce a workspace of 16 MiB, and, of more than pairs, unit rows. "
        f"GIST's eager loss makes (N, N, D) tensors: not run where they are above a gigabyte, nor a rival's step above "
        f"{SLOWEST_S[CACHED]:g} s (eager: {SLOWEST_S[EAGER]:g} s). {machine['cpu_model']}, "
        f"{record['threads']} threads; sentence-transformers {record['sentence_transformers']}, torch "
        f"{versions['torch']}; commit {record['code']['commit'][:7]}, {record['date_utc'][:10]}.",
    ]
    if record["left_out"]:
        lines += [
            "",
            "Left out, for want of time: " + ", ".join("{} {:,} × {:,}".format(*x) for x in record["left_out"]) + ".",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure, print and write; returns the JSON's path."""
    parser = argparse.ArgumentParser(prog="python -m bench.embedders", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--rounds", type=int, default=15, help="at most, interleaved; 3 at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget-s", type=float, default=660.0, help="for all problems")
    parser.add_argument("--quick", action="store_true", help="small problems alone, into runs/bench")
    parser.add_argument("--out", type=Path, help="folder; default: bench/results, runs/bench with --quick or --kinds")
    given = parser.parse_args(arguments)
    logging.getLogger("fused_nce").setLevel(logging.ERROR)  # which backend ran is in the record
    os.environ["HF_HUB_OFFLINE"] = "1"
    import sentence_transformers

    torch.set_num_threads(given.threads)
    partly = given.quick or len(given.kinds) < len(COLUMNS)
    out = given.out or host.ROOT / ("runs/bench" if partly else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    path: Path = out / f"embedders-{host.slug()}.json"
    record: dict[str, Any] = {"schema": 1, **host.provenance()}
    record |= {"sentence_transformers": sentence_transformers.__version__, "threads": given.threads}
    record |= {"problems": [], "left_out": []}
    chosen = [x for x in (QUICK if given.quick else PROBLEMS) if x[0] in given.kinds]
    end, shown = time.monotonic() + given.budget_s, tqdm(chosen, unit="problem", disable=None, dynamic_ncols=True)
    for kind, n, d in shown:
        shown.set_postfix_str(f"{kind} {n:,} × {d:,}")
        left, steps = end - time.monotonic(), steps_s(record["problems"], kind, n, d)
        if sum(steps.values()) * (3 + RUNS) > left or left <= 0:
            record["left_out"].append([kind, n, d])
        else:
            problem = measured(list(steps), kind, n, d, given.threads, given.rounds, min(5.0, left / 20))
            record["problems"].append(problem)
        host.write(path, record)
        path.with_suffix(".md").write_text(table(record), encoding="utf-8")
    print(table(record), f"wrote {path}", sep="\n")
    return path


if __name__ == "__main__":
    main()
