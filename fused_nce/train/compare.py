"""`fused-nce compare RUN RUN …`: what several runs are worth on one data set, as a page and as a table.

Reads what `fused-nce eval` left in each folder, and computes no accuracy.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from fused_nce.train import config, options
from fused_nce.train.files import printable, write_text
from fused_nce.train.report import compared, runlog

FIELDS = ("run", "method", "trained_on", "data", "tap", "encoder", "probe", "labels")
VALUES = ("accuracy_pct", "sd_pct", "ci95_pct", "width", "value", "unit")


def main(argv: Sequence[str]) -> int:
    """Run `fused-nce compare RUN RUN … [--out NAME] [--data OTHER]`.

    Raises:
        ValueError: for a folder that is no evaluated run, or runs that were evaluated on different data.
    """
    parser = options.parser(prog="fused-nce compare RUN RUN ...", description="One report of several evaluated runs.")
    parser.add_argument("runs", nargs="+", type=str, help="folders that `fused-nce eval` has evaluated")
    parser.add_argument("--out", type=str, default="compare", help="writes OUT.html and OUT.csv")
    parser.add_argument("--data", type=str | None, default=None, help="their evaluation on this other data set")
    values = parser.parse_args(argv)
    runs = read_runs(values.runs, data=values.data)
    out = Path(values.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    page, table = (out.with_name(f"{out.name}.{ending}") for ending in ("html", "csv"))
    write_text(page, compared.render(runs))
    write_csv(table, runs)
    print(printable(f"{compared.count(runs)}: {page}, {table}"))
    return 0


def read_runs(folders: Sequence[str], *, data: str | None = None) -> list[compared.Run]:
    """The runs, in the order given.

    Args:
        folders: of the runs.
        data: another data set that they were evaluated on.

    Raises:
        ValueError: a folder twice, one without an evaluation, or evaluations on different data.
    """
    paths = [Path(folder) for folder in folders]
    real = [path.resolve() for path in paths]
    for path in paths:
        if real.count(path.resolve()) > 1:
            raise ValueError(f"runs: {path} is given twice; need different runs")
    names = [path.name for path in real]
    runs = []
    for path, name in zip(paths, names, strict=True):
        file = path / f"eval{runlog.suffix(data)}.json"
        if not file.is_file():
            again = f"fused-nce eval {path}" + (f" --data {data}" if data else "")
            raise ValueError(f"runs: {path} holds no {file.name}; evaluate it first: {again}")
        result = runlog.read_evaluation(file, ("data_name", "method", "probes", "taps"))
        settings = config.flatten(config.to_dict(config.load(path)))
        steps = result.get("training", {}).get("steps")  # of the weights that were judged
        runs.append(
            compared.Run(name if names.count(name) == 1 else str(path), result, runlog.read_log(path, steps), settings)
        )
    for run in runs[1:]:
        first, other = runs[0].result, run.result
        # Names and labels of the images, where both evaluations say; earlier ones know the folder's name alone.
        told = "digests" in first and "digests" in other
        if (first["digests"] if told else Path(first["data_name"]).name) != (
            other["digests"] if told else Path(other["data_name"]).name
        ):
            names = [result["data_name"] for result in (first, other)]
            on = names[1] if names[0] != names[1] else f"other images or labels of that name ({other['data']})"
            raise ValueError(f"runs: {runs[0].name} was evaluated on {names[0]}, {run.name} on {on}; need one data set")
    return runs


def write_csv(path: Path, runs: list[compared.Run]) -> None:
    """One accuracy a line, of every encoder at every tap."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*FIELDS, *VALUES], extrasaction="ignore")
        writer.writeheader()
        for run in runs:
            result = run.result
            shared = {"run": run.name, "method": result["method"], "data": result["data_name"]}
            shared["trained_on"] = result.get("trained_on", result["data_name"])
            writer.writerows(shared | row for row in result["probes"] + result.get("measures", []))
