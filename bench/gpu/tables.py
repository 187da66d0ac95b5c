"""Markdown from a GPU record: what a run prints, what it writes beside its JSON, and what the documents show."""

from __future__ import annotations

from typing import Any

from bench.gpu.rivals import CHUNKER, LABELS, LIBRARIES
from bench.gpu.verdict import backends_ms, best_other, cells, floor_ms, time_ms
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
    facts = {
        "driver": "driver {}",
        "sm_clock_mhz": "{:.0f} MHz",
        "gemm_tflop_per_s": "GEMM {:.3g} TFLOP/s",
        "copy_tb_per_s": "copy {:.3g} TB/s",
    }
    known = {
        name: text for name, text in facts.items() if isinstance(card.get(name), float) or name == "driver" in card
    }
    parts = [card["name"], *(text.format(card[name]) for name, text in known.items())]
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
        figures = [*others, floor_ms(record, row), *ratio[:2], share, *peaks]
        ahead = best_other(row, clock)
        library = f"{_label(ahead[0])} {number(ahead[1])}" if ahead else "–"
        rows.append([row["label"], f"{number(ours)} ({row['ours_backend'] or 'none'})", *map(number, figures), library])
    header = [
        f"loss and gradients, bf16; {clock} time in ms",
        "fused_nce (backend)", "eager", "compile", "least GEMMs, here", "at the card's rate",
        "eager / ours", "compile / ours", "% of the bound", "extra MB, ours", "eager", "compile", "best other, ms",
    ]  # fmt: skip
    return markdown(header, rows)


def _label(name: str) -> str:
    return f"compile, {CHUNKER}" if name == CHUNKER else LIBRARIES[name].label


def clocks_table(record: Record) -> str:
    """What else a user may wait for: eager wall time, and the device time of a replayed graph."""

    def spread(row: Record, name: str, clock: str) -> str:
        found = row["rivals"].get(name, {})
        if f"{clock}_ms_median" not in found:
            return "–"
        return f"{number(found[f'{clock}_ms_median'])} ± {number(found[f'{clock}_ms_iqr'] / 2, 2)}"

    every = [(name, label, clock) for name, label in LABELS.items() for clock in ("device", "wall", "graph")]
    rows = [[row["label"], *(spread(row, name, clock) for name, _, clock in every)] for row in record["cases"]]
    header = ["ms, median ± half the interquartile range", *(f"{label}: {clock}" for _, label, clock in every)]
    return markdown(header, rows)


def targets_table(record: Record) -> str:
    """Each target with its value, pass or miss, and the reasons for the misses."""
    judged = [(row["label"], found) for row in record["cases"] if (found := cells(record, row))]
    if not judged:
        return "None of the problems with targets was measured."
    names = list(dict.fromkeys(cell.name for _, found in judged for cell in found))
    every = [(label, cell) for label, found in judged for cell in found]
    rows = [
        [label, *(next((_verdict(cell) for cell in found if cell.name == name), "") for name in names)]
        for label, found in judged
    ]
    missed = [(label, cell) for label, cell in every if not cell.passed]
    reasons = [f"- {label}, {cell.name} {number(cell.value)} ({cell.target}): {cell.why}." for label, cell in missed]
    met = f"{len(every) - len(missed)} of {len(every)} targets met."
    return "\n".join([markdown(["target", *names], rows), "", met, *reasons])


def _verdict(cell: Cell) -> str:
    value = number(cell.value)
    return f"{value} ✓" if cell.passed else f"**{value}** ✗ ({cell.target})"


def backends_table(record: Record) -> str:
    """Which backend is fastest on each problem, and what the automatic choice took."""
    found = [backends_ms(row, record["clock"]) for row in record["cases"]]
    names = list(dict.fromkeys(name for times in found for name in times))
    rows = []
    for row, times in zip(record["cases"], found, strict=True):
        fastest, chosen = row["fastest_backend"], row["ours_backend"]
        marked = [f"**{number(times[n])}**" if n == fastest else number(times.get(n)) for n in names]
        rows.append([row["label"], *marked, chosen or "none", "✓" if fastest == chosen else "✗"])
    return markdown(["ms; the fastest in bold", *names, "chosen", "right"], rows)


def refusals(record: Record) -> str:
    """Who did not take part and why; empty where all did."""
    on_gpu = record["card"]["slug"] != record["host"]["slug"]
    refused = [(row["label"], row["refused"].items()) for row in record["cases"]]
    lines = [
        f"- {label}, {name}: {why}."
        for label, found in refused
        for name, why in found
        if not (on_gpu and name == "cpu")
    ]
    lines += [f"- {label}: {reason}." for label, reason in record["left_out"].items()]
    return "\n".join(["Not measured:", *lines]) if lines else ""


def report(record: Record) -> str:
    """The whole of it."""
    parts = card_line, main_table, targets_table, backends_table, clocks_table, refusals
    return "\n\n".join(text for part in parts if (text := part(record)))


def block(record: Record | None) -> str:
    """What the documents show of the newest committed record."""
    parts = card_line, main_table, targets_table, backends_table
    return NONE_YET if record is None else "\n\n".join(part(record) for part in parts)
