"""The evaluation in words and on the terminal: training figures, protocol, table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fused_nce.train import report, runlog
from fused_nce.train.protocols import PROTOCOLS

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


def protocol(data: str, protocols: list[str], draws: int, tasks: int, baselines: bool) -> list[str]:
    """What a reader must know to judge the accuracies, one sentence a line."""
    split = (
        "The images of pre-training, of the probes and of the test are disjoint."
        if data == "digits"
        else "Probes are fitted on the labelled training images and judged on the test images, which nothing else sees."
    )
    lines = [
        split,
        "Not transductive: BatchNorm uses the statistics of pre-training (eval mode), never of test images; every test "
        "image counts.",
        "A map is averaged over a 2 × 2 grid; a vector, such as f1, stays.",
        *of_protocols(protocols, draws, tasks),
    ]
    if baselines:
        lines.append(
            "Untrained encoders have the run's architecture; their BatchNorm gets the statistics of the probe split, "
            "without which they would be weaker baselines."
        )
    return lines


def of_protocols(protocols: Sequence[str], draws: int, tasks: int, *, things: str = "images") -> list[str]:
    """How each of them is run."""
    lines = [PROTOCOLS[name].text.replace("images", things) for name in protocols]
    lines += [f"Few labels: {draws} draws."] if "few" in protocols else []
    lines += [f"Few-shot: {tasks} tasks."] if "few-shot" in protocols else []
    return lines


def table(result: dict[str, Any]) -> str:
    """The accuracies, four columns a block, the speed and the cost of the loss, for a terminal of 100 columns."""
    columns, lines = report.columns(result), []
    for start in range(0, len(columns), COLUMNS):
        block = columns[start : start + COLUMNS]
        heads = [f"{report.NAMES[probe]}, {labels.removeprefix('5-way ')}" for probe, labels in block]
        lines.append(f"{'test accuracy, %':28}" + "".join(f"{head:>18}" for head in heads))
        for encoder, tap in dict.fromkeys((row["encoder"], row["tap"]) for row in result["probes"]):
            cells = [report.shown(report.find(result, encoder, tap, *column)) for column in block]
            name = encoder if tap == report.PIXELS else f"{tap}  {encoder}"
            lines.append(f"{name:28}" + "".join(f"{cell:>18}" for cell in cells))
        lines.append("")
    speed, cost = result["training"]["images_per_s"], result["loss_cost"]
    if speed is not None:
        minutes = result["training"]["minutes"]
        lines.append(f"training {speed:,.0f} {report.things(result)}/s (median), {minutes:.1f} minutes")
    if cost is not None:
        lines.append(f"{'the loss of one step':30}{'time':>18}{'peak memory':>18}")
        for name in ("fused", "naive"):
            time_ms, peak = cost[name]["time_ms"], report.mebibytes(cost[name]["peak_bytes"])
            lines.append(f"{name:30}{time_ms:>15.1f} ms{peak:>18}")
    return "\n".join(lines)
