"""Losses of text embedders beside sentence-transformers' own: time, peak memory and error, on embeddings.

`python -m bench.embedders --rows 256,1024 --widths 384 --out FILE.json` with sentence-transformers installed. Losses of
a shape are timed in one interleaved run, gradients included; the peak is that of a process of its own; the error is the
largest of the gradients', relative to the largest gradient in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import host, measure
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

    def nested(columns: Sequence[Tensor]) -> Tensor:
        return torch.stack([once([nn.functional.normalize(x[:, :w], dim=1) for x in columns]) for w in widths]).sum()

    return nested


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


def error(kind: str, name: str, n: int, d: int) -> float:
    """Of the gradients, against upstream's own loss in float64."""
    found = []
    for loss, dtype in ((name, torch.float32), (EAGER, torch.float64)):
        columns = [x.requires_grad_() for x in embeddings(kind, n, d, dtype)]
        Step.step(loss_of(kind, loss, n, d), columns)
        found.append(torch.cat([x.grad.double() for x in columns if x.grad is not None]))
    return float((found[0] - found[1]).abs().max() / found[1].abs().max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.embedders", description=__doc__)
    parser.add_argument("--rows", default="256,512,1024,2048,4096,8192,16384")
    parser.add_argument("--widths", default="384,1024")
    parser.add_argument("--kinds", default=",".join(COLUMNS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--error-rows", type=int, default=1024, help="errors are taken up to so many rows")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for kind in given.kinds.split(","):
        for d in map(int, given.widths.split(",")):
            for n in map(int, given.rows.split(",")):
                names = [name for name in NAMES if not (kind == "gist" and name == EAGER and n * n * d > 2**31)]
                steps = {name: Step(kind, name, n, d).prepare() for name in names}
                for step in steps.values():
                    step()
                times = measure.interleave(steps, given.rounds, lambda: None)
                for name in names:
                    row = {"loss": kind, "rows": n, "width": d, "name": name, "time_ms": statistics.median(times[name])}
                    row |= memory.peak(Step(kind, name, n, d), given.threads)
                    if n <= given.error_rows:
                        row["gradient_error"] = error(kind, name, n, d)
                    rows.append(row)
                    wrong = f"  error {row['gradient_error']:.1e}" if "gradient_error" in row else ""
                    cost = f"{row['time_ms']:10.1f} ms {row['peak_memory_mib']:9.1f} MiB"
                    print(f"{kind:16} N {n:6} D {d:5} {name:30} {cost}{wrong}")
    if given.out:
        record = {"host": host.facts(), "versions": host.versions(), "threads": given.threads, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
