"""Markdown of `bench.family`'s records: the README's table, from which size on ours is faster, where it is slower."""

from __future__ import annotations

import math
from typing import Any

from bench.family import RIVALS
from bench.rivals.bound import LIBRARIES
from bench.text import markdown, number

Record = dict[str, Any]
Row = dict[str, Any]
TIE = 0.98  # a rival within 2 % of ours is as fast: medians of one run move by as much
SMALL_SCORES = 128 * 128  # below, a call is its fixed cost


def time_ms(row: Row, rival: str) -> float:
    """Median time of a rival."""
    return float(row["rivals"][rival]["time_ms_median"])


def host_line(record: Record, rows: list[Row], threads: str = "") -> str:
    """Machine, instruction set, versions, commit, and how quiet it was."""
    host, code = record["host"], record["code"]
    busy = max(row["others_cpu_share"] for row in rows)
    return (
        f"{host['cpu_model']}, {host['cores']} cores, {isa(record)}{threads}; torch {record['versions']['torch']}; "
        f"commit {code['commit'][:7]}{' with local changes' if code['dirty'] else ''}, {record['date_utc'][:10]}. "
        f"Others used at most {busy:.1%} of the cores."
    )


def isa(record: Record) -> str:
    """The instruction set that torch used, and whether the CPU has a wider one that was turned off."""
    used, flags = record["host"]["torch_cpu_capability"], record["host"]["isa_flags"]
    if "amx_bf16" in flags and used == "AVX512":
        return "AVX-512 with AMX"
    return f"{used} (AVX-512 turned off)" if used == "AVX2" and "avx512f" in flags else str(used)


def largest(record: Record) -> str:
    """`table`, of each loss its largest scores alone."""
    kept = {row["loss"]: row for row in sorted(record["problems"], key=lambda row: int(row["n"] * row["m"]))}
    labels = {row["label"] for row in kept.values()}
    return table({**record, "problems": [row for row in record["problems"] if row["label"] in labels]})


def table(record: Record, threads: int | None = None) -> str:
    """Each problem: our time, how much faster than the rivals, memory, and errors."""
    threads = threads or max(row["threads"] for row in record["problems"])
    shown = [row for row in record["problems"] if row["threads"] == threads]
    rows = []
    for row in shown:
        ours, names = time_ms(row, "ours"), row["rivals"]
        ratios = [f"{time_ms(row, name) / ours:.2f}×" if name in names else "–" for name in ("eager", "compile")]
        others = [n for n in names if n not in ("eager", "compile", "chunked", "ours")]
        best = min(others, key=lambda name: time_ms(row, name), default=None)
        other = f"{RIVALS[best].label} {time_ms(row, best) / ours:.2f}×" if best else "–"
        peaks = [
            f"{max(0.0, names[n].get('peak_memory_mib', math.nan)):.1f}" if n in names else "–"
            for n in ("ours", "eager")
        ]
        wrong = [f"{names[n]['gradient_error']:.0e}" if n in names else "–" for n in ("ours", "eager")]
        rows.append(
            [
                row["label"],
                number(ours),
                *ratios,
                other,
                f"{ours / row['bound_ms']:.2f}×{_libraries(row)}",
                *peaks,
                " / ".join(wrong),
            ]
        )
    header = [
        "problem", "fused_nce, ms", "eager ÷ ours", "torch.compile ÷ ours", "best other ÷ ours",
        "of the least GEMMs", "fused_nce, MiB", "eager, MiB", "gradient error: ours / eager",
    ]  # fmt: skip
    note = f"Loss and gradients, float32, {threads} threads; memory above inputs and gradients; "
    named = any("bound_libraries" in row for row in record["problems"])
    note += f"the least GEMMs are those of {'the library named' if named else 'torch.mm'}."
    return f"{markdown(header, rows)}\n\n{note} {host_line(record, shown)}"


def _libraries(row: Row) -> str:
    """Whose GEMMs are the least: one name, or one for each of the scores and the gradients; torch.mm alone before."""
    names = [LIBRARIES[name].label for name in row.get("bound_libraries", {}).values()]
    return f" ({' / '.join(names if len(set(names)) > 1 else names[:1])})" if names else ""


def faster_from(record: Record) -> str:
    """Per loss: the size from which on no rival beats ours, at every size measured and any number of threads."""
    parts = []
    for loss in dict.fromkeys(row["loss"] for row in record["problems"]):
        rows = sorted((row for row in record["problems"] if row["loss"] == loss), key=lambda row: row["n"] * row["m"])
        slower = [i for i, row in enumerate(rows) if _winners(row)]
        rest = rows[slower[-1] + 1 :] if slower else rows
        sizes = f"{rest[0]['n']:,} × {rest[0]['m']:,}" if rest else "none of the sizes measured"
        parts.append(f"`{loss}` {sizes}")
    names = {name for row in record["problems"] for name in row["rivals"]} - {"ours", "chunked"}
    rivals = "; ".join(RIVALS[name].label for name in RIVALS if name in names)
    host = f"{record['host']['cpu_model']}, {isa(record)}"
    at = "at every size measured from these on"
    return f"No slower than {rivals} (2 % counts as equal) on {host}, {at}: {', '.join(parts)}."


def _winners(row: Row) -> list[str]:
    ours = time_ms(row, "ours")
    return [n for n in row["rivals"] if n not in ("ours", "chunked") and time_ms(row, n) < TIE * ours]


def slower(found: list[Record]) -> str:
    """Every measured problem at which a rival wins: by how much, and what the numbers say of why."""
    rows = []
    for record in found:
        for row in record["problems"]:
            for name in _winners(row):
                ours, other = time_ms(row, "ours"), time_ms(row, name)
                where = f"{record['host']['cpu_model']}, {isa(record)}, {row['threads']} threads"
                rows.append(
                    [
                        row["label"],
                        where,
                        RIVALS[name].label,
                        number(other),
                        number(ours),
                        f"{ours / other:.2f}×",
                        _why(row, other),
                    ]
                )
    if not rows:
        return "None of the measured problems."
    header = ["problem", "where", "rival", "rival, ms", "fused_nce, ms", "slower by", "why"]
    return markdown(header, rows)


def _why(row: Row, other: float) -> str:
    ours, floor = time_ms(row, "ours"), row["bound_ms"]
    if row["n"] * row["m"] <= SMALL_SCORES:
        return f"the call, not the scores: {ours - floor:.2f} ms of {ours:.2f} are no GEMM"
    if other < floor:
        return f"the rival beats the least GEMMs by themselves, {number(floor)} ms; ours takes {ours / floor:.2f}× them"
    return f"ours takes {ours / floor:.2f}× the least GEMMs, the rival {other / floor:.2f}×"
