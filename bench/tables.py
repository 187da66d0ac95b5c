"""Markdown from a results JSON, and from there into the documents, between `<!-- bench:NAME -->` and `<!-- /bench -->`.

`python -m bench.tables` rewrites the blocks of README.md and docs/*.md; `--check` only compares, and exits 1 where one
differs: no figure in them is typed by hand. The losses' table and pages come from their registry likewise.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from bench import (
    call,
    cases,
    counted,
    decode,
    family_tables,
    fit,
    losses,
    premise,
    roofline,
    scaling,
    speedrun_table,
    training,
)
from bench.gpu import problems as gpu_problems
from bench.gpu import tables as gpu_tables
from bench.host import ROOT, newest, records
from bench.rivals import RIVALS
from bench.rivals.bound import LIBRARIES
from bench.text import markdown
from bench.verdict import cells, judged, linear_fit, time_ms

PUBLISHED = ROOT / "bench/results/cpu-amd-epyc-2c-avx512.json"  # the host that the documents quote
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
Record = dict[str, Any]


def shape(row: Record) -> str:
    """n_a × n_c, D."""
    return f"{row['n_a']}×{row['n_c']}, {row['d']}"


def host_line(record: Record) -> str:
    """The machine, the versions and the commit in one sentence."""
    return family_tables.host_line(record, record["cases"], f", {record['host']['threads']} threads")


def main_table(record: Record) -> str:
    """Times, ratios and peak memory of the judged shapes, and the host below."""
    names = [name for name in ("ours", "naive", "compile") if all(name in r["rivals"] for r in judged(record))]
    rows = []
    for row in judged(record):
        times = [f"{time_ms(row, name):.1f}" for name in names]
        ratios = [f"{time_ms(row, name) / time_ms(row, 'ours'):.2f}×" for name in names if name != "ours"]
        bound = f"{time_ms(row, 'ours') / time_ms(row, 'bound'):.2f}×"
        peaks = [f"{row['rivals'][name]['peak_memory_mib']:.0f}" for name in names]
        rows.append([shape(row), *times, *ratios, bound, *peaks])
    labels = [RIVALS[name].label for name in names]
    header = [
        "images × locations, width",
        *(f"{label}, ms" for label in labels),
        *(f"faster than {label}" for label in labels[1:]),
        "of three bare GEMMs",
        *(f"{label}, MiB" for label in labels),
    ]
    note = "Loss and both gradients, float32; peak memory above inputs and gradients."
    return f"{markdown(header, rows)}\n\n{note} {host_line(record)}"


def targets_table(record: Record) -> str:
    """Each target with its value, pass or miss, and the reasons for the misses."""
    found = [(row, cells(record, row)) for row in judged(record)]
    names = list(dict.fromkeys(cell.name for _, line in found for cell in line))
    by_name = [(row, {cell.name: cell for cell in line}) for row, line in found]
    rows = [
        [
            shape(row),
            *(line[name].text if name in line else "–" for name in names),
            f"{time_ms(row, 'naive') / time_ms(row, 'bound'):.2f}" if "naive" in row["rivals"] else "–",
        ]
        for row, line in by_name
    ]
    missed = [(row, cell) for row, line in found for cell in line if not cell.passed]
    total = sum(len(line) for _, line in found)
    text = markdown(["images × locations, width", *names, "naive / bound"], rows)
    reasons = _left_out(record) + "\n".join(
        f"- {shape(row)}, {cell.name} {cell.value:.2f} ({cell.target}): {cell.why}." for row, cell in missed
    )
    return f"{text}\n\n{total - len(missed)} of {total} targets met.\n{reasons}".rstrip()


def _left_out(record: Record) -> str:
    """What this CPU cannot show."""
    lines = []
    if "avx512_bf16" not in record["host"]["isa_flags"]:
        lines.append("- fp32 / bf16: not judged, for this CPU has no bf16 instructions.\n")
    for dtype in (cases.FLOAT32, cases.BFLOAT16):
        gemms = [gemm for row in judged(record, dtype) for gemm in row["bound"]["gemms"].values()]
        for library in ("mm", "onednn"):  # the others are packages that may be absent
            if any(library not in gemm["gflop_per_s"] for gemm in gemms):
                lines.append(
                    f"- {dtype}: {LIBRARIES[library].label} has no such product on this CPU, and is not in the bound.\n"
                )
    return "".join(lines)


def bound_table(record: Record) -> str:
    """The three GEMMs of the bound at each library, the winner in bold."""
    rows: list[list[str]] = []
    timed = [found["gflop_per_s"] for row in record["cases"] for found in row["bound"]["gemms"].values()]
    libraries = list(dict.fromkeys(name for rates in timed for name in rates))
    for row in judged(record):
        line = [shape(row)]
        for found in row["bound"]["gemms"].values():
            rates = found["gflop_per_s"]
            cells = {name: f"{rates[name]:.0f}" if name in rates else "not here" for name in libraries}
            line.append(" / ".join(f"**{x}**" if name == found["winner"] else x for name, x in cells.items()))
        rows.append([*line, f"{time_ms(row, 'bound'):.1f}", f"{row['bound']['time_ms_iqr']:.1f}"])
    labels = " / ".join(LIBRARIES[name].label for name in libraries)
    gemms = ["S = q·kᵀ", "dq = W·k", "dk = Wᵀ·q"]
    text = markdown(["images × locations, width", *gemms, "bound, ms", "spread, ms"], rows)
    return f"{text}\n\nGFLOP/s of {labels}; the faster one counts."


def spread_table(record: Record) -> str:
    """Medians with interquartile ranges, and rounds."""
    names = [name for name in RIVALS if all(name in r["rivals"] for r in judged(record))]
    rows = []
    for row in judged(record):
        times = [f"{time_ms(row, n):.2f} ± {row['rivals'][n]['time_ms_iqr'] / 2:.2f}" for n in names]
        rows.append([shape(row), *times, str(row["rounds"]), f"{row['others_cpu_share']:.1%}"])
    return markdown(
        ["images × locations, width", *(f"{RIVALS[n].label}, ms" for n in names), "rounds", "others' share"], rows
    )


def memory_fit(record: Record) -> str:
    """Peak memory over the batch sweep, with a straight line through the four largest batches for ours."""
    lines = []
    for d in sorted({row["d"] for row in record["cases"]}):
        sweep = [r for r in record["cases"] if r["d"] == d and r["dtype"] == "float32" and "ours" in r["rivals"]]
        if len(sweep) < 4:
            continue
        sweep.sort(key=lambda row: int(row["n_a"]))
        batches = [float(row["n_a"]) for row in sweep]
        peaks = [row["rivals"]["ours"]["peak_memory_mib"] for row in sweep]
        # Smaller batches do not fill the workspace, so a line through them too would only show it filling.
        intercept, slope, residual = linear_fit(batches[-4:], peaks[-4:])
        line = f"- Width {d}, {batches[0]:.0f} to {batches[-1]:.0f} images: fused_nce at most {max(peaks):.1f} MiB"
        line += f"; from {batches[-4]:.0f} images on {intercept:.1f} + {slope * 1000:.1f} MiB a thousand images"
        line += f", within {residual:.1f} MiB"
        if all("naive" in row["rivals"] for row in sweep):
            naive = [row["rivals"]["naive"]["peak_memory_mib"] for row in sweep]
            line += f". Eager torch {naive[0]:.0f} to {naive[-1]:.0f} MiB, {naive[-1] / peaks[-1]:.0f} times as much"
        lines.append(line + ".")
    return "\n".join(lines) or "Fewer than four batch sizes of one width: no fit."


def report(record: Record) -> str:
    """What a run prints, and writes beside its JSON."""
    parts = [host_line(record), targets_table(record), spread_table(record), bound_table(record), memory_fit(record)]
    return "\n\n".join(parts)


def newest_gpu_record() -> Record | None:
    """The last committed run on a card; None before there is one."""
    return newest(PUBLISHED.parent, "gpu-*.json")


def newest_of(pattern: str, command: str, text: Callable[[Record], str], isa: str) -> str:
    """A text of the newest run with an instruction set; before there is one, what makes it."""
    found = [x for x in records(PUBLISHED.parent, pattern) if x["host"]["torch_cpu_capability"] == isa]
    return text(found[0]) if found else f"No run with {isa} is committed yet: `{command}` makes one."


def family(text: Callable[[Record], str], isa: str = "AVX512") -> str:
    """Of the losses' family."""
    return newest_of("family-*.json", "python -m bench.family", text, isa)


def amdim(text: Callable[[Record], str], isa: str, _: Record) -> str:
    """Of AMDIM's shapes."""
    return newest_of("cpu-*.json", f"python -m bench --isa {isa.lower()}", text, isa)


BLOCKS: dict[str, Callable[[Record], str]] = {
    "cpu-table": main_table,
    "cpu-targets": targets_table,
    "cpu-bound": bound_table,
    "cpu-spread": spread_table,
    "cpu-memory-fit": memory_fit,
    "cpu-host": host_line,
    **{
        f"cpu-{name}-avx2": partial(amdim, text, "AVX2")
        for name, text in (("table", main_table), ("targets", targets_table), ("bound", bound_table))
    },
    "cpu-spread-avx2": partial(amdim, spread_table, "AVX2"),
    "family-table": lambda record: family(family_tables.table),
    "family-largest": lambda record: family(family_tables.largest),
    "family-table-avx2": lambda record: family(family_tables.table, "AVX2"),
    "family-from": lambda record: "\n\n".join(family(family_tables.faster_from, isa) for isa in ("AVX512", "AVX2")),
    "slower": lambda record: family_tables.slower(records(PUBLISHED.parent, "family-*.json")),
    "when-it-matters": lambda record: roofline.table(),
    "api": lambda record: losses.api(),
    "losses": lambda record: losses.table("docs/losses.md"),
    "losses-page": lambda record: f"{losses.table('')}\n\n{losses.reference()}",
    "cifar10-budget": lambda record: training.budget_table("cifar10"),
    "cifar10-accuracy": lambda record: training.accuracy_table("cifar10"),
    **{
        f"{study}-{name}": partial(
            lambda table, folder, record: table("cifar10", folder), table, training.RESULTS / study
        )
        for study in ("baselines", "recipes", "longer")
        for name, table in (("budget", training.budget_table), ("accuracy", training.accuracy_table))
    },
    "fsdd-budget": lambda record: training.budget_table("fsdd"),
    "fsdd-accuracy": lambda record: training.accuracy_table("fsdd"),
    "premise": lambda record: premise.block(),
    "speedrun": lambda record: speedrun_table.block(),
    "scaling": lambda record: scaling.tables(),
    "gpu-model": lambda record: counted.table(),
    "gpu-choice": lambda record: fit.choice_table(),
    "gpu-launches": lambda record: counted.launches_table((*gpu_problems.TABLE, *gpu_problems.SMALL)),
    "gpu-memory": lambda record: counted.memory_table(),
    "decode": lambda record: decode.block(ROOT / "bench/results"),
    "call": lambda record: call.block(ROOT / "bench/results"),
    "gpu": lambda record: gpu_tables.block(newest_gpu_record()),
}


def render(text: str, record: Record, source: str) -> str:
    """A document with its blocks filled in.

    Raises:
        ValueError: for a block of an unknown name.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise ValueError(f"{source}: got block bench:{name}, need one of {sorted(BLOCKS)}")
        return f"{match[1]}{BLOCKS[name](record)}\n{match[4]}"

    return BLOCK.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the documents; 1 where one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 where a block differs from the JSON"
    )
    options = parser.parse_args(argv)
    record = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = render(old, record, path.name)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not options.check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'differs from ' + PUBLISHED.name if options.check else 'rewritten'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
