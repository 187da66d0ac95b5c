"""The evaluation on the terminal: training figures and table."""

from __future__ import annotations

from typing import Any

from fused_nce.train.report import evaluated, runlog

COLUMNS = 4  # of accuracies, side by side on a terminal


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
    """The accuracies, four columns a block, the speed and the cost of the loss, for a terminal of 100 columns."""
    columns, lines = evaluated.columns(result), []
    for start in range(0, len(columns), COLUMNS):
        block = columns[start : start + COLUMNS]
        heads = [f"{evaluated.NAMES[probe]}, {labels.removeprefix('5-way ')}" for probe, labels in block]
        lines.append(f"{'test accuracy, %':28}" + "".join(f"{head:>18}" for head in heads))
        for encoder, tap in dict.fromkeys((row["encoder"], row["tap"]) for row in result["probes"]):
            cells = [evaluated.shown(evaluated.find(result, encoder, tap, *column)) for column in block]
            name = encoder if tap == evaluated.PIXELS else f"{tap}  {encoder}"
            lines.append(f"{name:28}" + "".join(f"{cell:>18}" for cell in cells))
        lines.append("")
    head, rows = evaluated.measures(result)
    for line in [head, *(row.cells for row in rows)] if rows else []:
        lines.append(f"{line[0]:28}" + "".join(f"{cell:>18}" for cell in line[1:]))
    lines += [""] if rows else []
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
