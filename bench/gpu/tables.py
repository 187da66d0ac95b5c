"""Markdown from a GPU record: what a run prints, what it writes beside its JSON, and what the documents show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.gpu.rivals import LABELS
from bench.gpu.verdict import backends_ms, cells, floor_ms, time_ms
from bench.text import markdown, number
from bench.verdict import Cell

Record = dict[str, Any]
NONE_YET = (
    "No GPU figures are committed yet: no run on a card has been recorded. `bash bench/gpu.sh` makes one, and "
    "`python -m bench.tables` brings its figures here."
)


def card_line(record: Record) -> str:
    """The card, the versions and the commit in one sentence."""
    card, code, versions = record["card"], record["code"], record["versions"]
    parts = [card["name"]]
    parts += [f"driver {card['driver']}"] if "driver" in card else []
    parts += [f"{card['sm_clock_mhz']:.0f} MHz"] if isinstance(card.get("sm_clock_mhz"), float) else []
    parts += [f"GEMM {card['gemm_tflop_per_s']:.3g} TFLOP/s"]
    parts += [f"copy {card['copy_tb_per_s']:.3g} TB/s"] if "copy_tb_per_s" in card else []
    parts += [f"torch {versions['torch']}", f"Triton {versions['triton']}", f"kernels: {versions['kernels']}"]
    dirty = " with local changes" if code["dirty"] else ""
    return f"{', '.join(parts)}; commit {code['commit'][:7]}{dirty}, {record['date_utc'][:10]}."


def main_table(record: Record) -> str:
    """Every problem: our time and backend, the rivals, the bound, the ratios, memory."""
    clock = record["clock"]
    rows = []
    for row in record["cases"]:
        ours = time_ms(row, "ours", clock)
        others = [time_ms(row, name, clock) for name in ("naive", "compile", "bound")]
        ratio = [None if ours is None or other is None else other / ours for other in others]
        share = None if ratio[2] is None else 100 * ratio[2]
        peaks = [row["rivals"].get(name, {}).get("peak_memory_mb") for name in ("ours", "naive", "compile")]
        rows.append(
            [
                row["label"],
                f"{number(ours)} ({row['ours_backend'] or 'none'})",
                *(number(ms) for ms in others),
                number(floor_ms(record, row)),
                *(number(value) for value in ratio[:2]),
                number(share),
                *(number(peak) for peak in peaks),
            ]
        )
    header = [
        f"loss and gradients, bf16; {clock} time in ms",
        "fused_nce (backend)", "eager", "compile", "least GEMMs, here", "at the card's rate",
        "eager / ours", "compile / ours", "% of the bound", "extra MB, ours", "eager", "compile",
    ]  # fmt: skip
    return markdown(header, rows)


def clocks_table(record: Record) -> str:
    """What else a user may wait for: eager wall time, and the device time of a replayed graph."""
    rows = []
    for row in record["cases"]:
        line = [row["label"]]
        for name in LABELS:
            line += [_spread(row, name, clock) for clock in ("device", "wall", "graph")]
        rows.append(line)
    header = ["ms, median ± half the interquartile range"]
    header += [f"{label}: {clock}" for label in LABELS.values() for clock in ("device", "wall", "graph")]
    return markdown(header, rows)


def _spread(row: Record, name: str, clock: str) -> str:
    found = row["rivals"].get(name, {})
    if f"{clock}_ms_median" not in found:
        return "–"
    return f"{number(found[f'{clock}_ms_median'])} ± {number(found[f'{clock}_ms_iqr'] / 2, 2)}"


def targets_table(record: Record) -> str:
    """Each target with its value, pass or miss, and the reasons for the misses."""
    judged = [(row["label"], {cell.name: cell for cell in cells(record, row)}) for row in record["cases"]]
    judged = [(label, found) for label, found in judged if found]
    if not judged:
        return "None of the problems with targets was measured."
    names = list(dict.fromkeys(name for _, found in judged for name in found))
    rows = [[label, *(_verdict(found[name]) if name in found else "" for name in names)] for label, found in judged]
    missed = [(label, cell) for label, found in judged for cell in found.values() if not cell.passed]
    total = sum(len(found) for _, found in judged)
    reasons = [f"- {label}, {cell.name} {number(cell.value)} ({cell.target}): {cell.why}." for label, cell in missed]
    return "\n".join(
        [markdown(["target", *names], rows), "", f"{total - len(missed)} of {total} targets met.", *reasons]
    )


def _verdict(cell: Cell) -> str:
    value = number(cell.value)
    return f"{value} ✓" if cell.passed else f"**{value}** ✗ ({cell.target})"


def backends_table(record: Record) -> str:
    """Which backend is fastest on each problem, and what the automatic choice took."""
    found = [backends_ms(row, record["clock"]) for row in record["cases"]]
    names = list(dict.fromkeys(name for times in found for name in times))
    rows = []
    for row, times in zip(record["cases"], found, strict=True):
        fastest = row["fastest_backend"]
        marked = [f"**{number(times[n])}**" if n == fastest else number(times.get(n)) for n in names]
        rows.append(
            [row["label"], *marked, row["ours_backend"] or "none", "✓" if fastest == row["ours_backend"] else "✗"]
        )
    return markdown(["ms; the fastest in bold", *names, "chosen", "right"], rows)


def refusals(record: Record) -> str:
    """Who did not take part and why; empty where all did."""
    lines = [
        f"- {row['label']}, {name}: {reason}."
        for row in record["cases"]
        for name, reason in row["refused"].items()
        if not (name == "cpu" and record["card"]["slug"] != record["host"]["slug"])
    ]
    lines += [f"- {label}: {reason}." for label, reason in record["left_out"].items()]
    return "\n".join(["Not measured:", *lines]) if lines else ""


def report(record: Record) -> str:
    """The whole of it."""
    parts: list[Callable[[Record], str]] = [
        card_line, main_table, targets_table, backends_table, clocks_table, refusals
    ]  # fmt: skip
    return "\n\n".join(text for part in parts if (text := part(record)))


def block(record: Record | None) -> str:
    """What the documents show of the newest committed record."""
    if record is None:
        return NONE_YET
    return "\n\n".join([card_line(record), main_table(record), targets_table(record), backends_table(record)])
