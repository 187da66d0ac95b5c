"""The evaluation on the terminal: training figures and table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_nce.train.report import evaluated, runlog

COLUMNS = 100  # of a terminal


def training(log: list[runlog.Line]) -> dict[str, Any]:
    """How the training went, from its log: steps, minutes, medians, and the values of the last line."""
    last = log[-1]
    return {
        "steps": int(last["step"]),
        "minutes": round(float(last.get("time_s", 0.0)) / 60, 2),
        "images_per_s": runlog.median(log, "images_per_s"),
        "loss_share": runlog.median(log, "loss_share"),
        "peak_memory_mb": last.get("peak_memory_mb"),
        "nce_minus_chance": last.get("nce_minus_chance"),
        "skipped": last.get("skipped", 0),
        "damaged": last.get("damaged", 0),
    }


def table(result: dict[str, Any]) -> str:
    """The accuracies, the other measures, the speed and the cost of the loss."""
    columns = evaluated.columns(result)
    heads = [f"{evaluated.NAMES[probe]}, {labels.removeprefix('5-way ')}" for probe, labels in columns]
    accuracies = [["test accuracy, %", *heads]]
    for encoder, tap in dict.fromkeys((row["encoder"], row["tap"]) for row in result["probes"]):
        name = encoder if tap == evaluated.PIXELS else f"{tap}  {encoder}"
        accuracies.append([name, *(evaluated.shown(evaluated.find(result, encoder, tap, *one)) for one in columns)])
    head, rows = evaluated.measures(result)
    lines = _blocks(accuracies) + (_blocks([head, *(row.cells for row in rows)]) if rows else [])
    speed, cost = result["training"]["images_per_s"], result["loss_cost"]
    if speed is not None:
        minutes = result["training"]["minutes"]
        lines.append(f"training {speed:,.0f} {evaluated.things(result)}/s (median), {minutes:.1f} minutes")
    if cost is not None:
        lines.append(f"{'the loss of one step':30}{'time':>18}{'peak memory':>18}")
        for name in ("fused", "naive"):
            time_ms, peak = cost[name]["time_ms"], evaluated.mebibytes(cost[name]["peak_bytes"])
            lines.append(f"{name:30}{time_ms:>15.1f} ms{peak:>18}")
    return "\n".join(lines)


def _blocks(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines, the columns in as many blocks as a terminal's width asks for, a blank line behind each."""
    first = max([28, *(len(row[0]) for row in rows)])
    width = max([18, *(2 + len(cell) for row in rows for cell in row[1:])])
    many, lines = max(1, (COLUMNS - first) // width), []
    for start in range(1, len(rows[0]), many):
        for row in rows:
            lines.append(f"{row[0]:{first}}" + "".join(f"{cell:>{width}}" for cell in row[start : start + many]))
        lines.append("")
    return lines
