"""The evaluation in words and on the terminal: training figures, protocol, table."""

from __future__ import annotations

from typing import Any

from fused_nce.train import report, runlog


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


def protocol(data: str, labels_per_class: int, draws: int, baselines: bool) -> list[str]:
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
        "Linear probe: multinomial logistic regression on standardised features (full-batch L-BFGS to a gradient of "
        "3e-4 in whitened coordinates); its penalty is chosen on a held-out quarter of the probe split, never on the "
        "test images.",
        f"{labels_per_class} labels a class: {draws} draws from the other three quarters, the same for every encoder; "
        "mean ± standard deviation over the draws.",
        "kNN: cosine similarity, votes weighted by exp(similarity / 0.1); 200 neighbours, or 2 % of a bank below "
        "10,000 images (at least 5).",
    ]
    if baselines:
        lines.append(
            "Untrained encoders have the run's architecture; their BatchNorm gets the statistics of the probe split, "
            "without which they would be weaker baselines."
        )
    return lines


def table(result: dict[str, Any]) -> str:
    """The accuracies, the speed and the cost of the loss, for a terminal of 100 columns."""
    columns = report.COLUMNS
    few = f"{result['labels_per_class']}/class"
    heads = [f"{report.NAMES[probe]}, {few if labels == 'few' else 'all'}" for probe, labels in columns]
    lines = [f"{'test accuracy, %':30}" + "".join(f"{head:>18}" for head in heads)]
    for encoder, tap in dict.fromkeys((row["encoder"], row["tap"]) for row in result["probes"]):
        cells = [report.shown(report.find(result, encoder, tap, *column)) for column in columns]
        name = encoder if tap == report.PIXELS else f"{tap}  {encoder}"
        lines.append(f"{name:30}" + "".join(f"{cell:>18}" for cell in cells))
    speed, cost = result["training"]["images_per_s"], result["loss_cost"]
    if speed is not None:
        lines.append(f"\ntraining {speed:,.0f} images/s (median), {result['training']['minutes']:.1f} minutes")
    if cost is not None:
        lines.append(f"{'the loss of one step':30}{'time':>18}{'peak memory':>18}")
        for name in ("fused", "naive"):
            time_ms, peak = cost[name]["time_ms"], report.mebibytes(cost[name]["peak_bytes"])
            lines.append(f"{name:30}{time_ms:>15.1f} ms{peak:>18}")
    return "\n".join(lines)
